"""What a trainer is given and what it returns: the objective, the plan, a report after each step, and the outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mvar_core.config import RunConfig
from mvar_core.config.training import LoopConfig


@dataclass(frozen=True)
class StepReport:
    """One finished step, for progress bars.

    Attributes:
        step: Steps done, this one included.
        total_steps: Steps of the whole run.
        loss: Loss of this step; nan where the step was skipped.
        learning_rate: Learning rate of this step.
        grad_norm: Norm of the gradient before clipping.
        images_per_second: Throughput since the run or the last line of metrics.jsonl began.
        skipped: Steps left out so far because their loss or gradient was not finite.
        metrics: The line just appended to metrics.jsonl; empty on the steps between.
        tokens_per_second: Throughput in tokens.
        peak_memory_bytes: Highest memory so far.
        seconds_left: Until the last step, at the speed of this session; nan before there is one.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    images_per_second: float
    skipped: int
    metrics: Mapping[str, Any]
    tokens_per_second: float = math.nan
    peak_memory_bytes: int = 0
    seconds_left: float = math.nan


OnStep = Callable[[StepReport], None]
OnSample = Callable[[int], np.ndarray | None]
"""Called with the steps done, while the module has the weights that its model directory would get, in evaluation mode;
makes a picture (H, W, 3) uint8 of what it generates."""
PICTURES = "samples"
"""The folder of a run directory where such pictures are kept."""
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class BatchPart:
    """Rows of a step's batch that are computed together: all of them, a micro-batch, or a process's share.

    Attributes:
        start: First row.
        stop: Row after the last.
        total: Rows of the whole batch.
    """

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> int:
        """How many rows the part has."""
        return self.stop - self.start

    def split(self, size: int) -> list[BatchPart]:
        """Parts of `size` rows at most, in order."""
        return [
            BatchPart(start, min(start + size, self.stop), self.total) for start in range(self.start, self.stop, size)
        ]


class Objective(Protocol[Batch]):
    """What is trained, and on what."""

    metric_names: tuple[str, ...]
    """Names of the values that `loss` returns next to the loss; nan there is a measure that a step does not have."""
    num_rows: int
    """Rows that there are to train on."""
    tokens_per_image: int

    def fetch(self, rows: Any, step: int) -> Batch:
        """Read a batch, a tensor or a tuple of tensors with one row each; runs in a thread of its own."""
        ...

    def loss(self, model: nn.Module, batch: Batch, step: int, part: BatchPart) -> tuple[Tensor, Tensor]:
        """Mean loss of some rows with its gradient, and the values named by `metric_names` without one.

        Called under autocast. What is random for a row must not depend on which rows are computed together.

        Args:
            model: What is trained, as it is wrapped for the processes: the loss goes through its `forward`.
            batch: The rows.
            step: Steps done before this one.
            part: Where the rows stand in the step's batch.
        """
        ...

    def prepare(self) -> None:
        """Called once before the first step of a run that does not resume."""
        ...

    def after_step(self, batch: Batch, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after every step that was not skipped, with this process's rows."""
        ...

    def describe(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Means over some steps, as they stand in metrics.jsonl."""
        ...

    def validate(self) -> dict[str, Any]:
        """Measures on held-out data; empty without any."""
        ...

    def score(self, measures: Mapping[str, Any]) -> float | None:
        """By what of `validate`'s measures the best checkpoint is chosen, lower is better; None by nothing."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Tensors carried from step to step next to the model."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...


@dataclass(frozen=True)
class Plan:
    """How an objective is trained.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        train: Batch size, optimizer, micro-batches, averages, the rhythm of logs and checkpoints.
        device: Where to compute; the model is there.
        dtype: Type that autocast computes in; parameters stay in float32.
        seed: Of everything random.
        settings: What a resumed run must agree on.
        resume: Whether to resume from the last checkpoint in `out`.
    """

    total_steps: int
    train: LoopConfig
    device: torch.device
    dtype: torch.dtype
    seed: int
    settings: Mapping[str, Any]
    resume: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: Steps done.
        loss: Training loss, averaged over the last line of metrics.jsonl.
        seconds: Time spent, over all sessions of the run.
        skipped: Steps left out because their loss or gradient was not finite.
        interrupted: Whether Ctrl-C or SIGTERM ended it before its last step; a checkpoint was written.
        best_step: The step of the best validation; None without any. Its checkpoint is kept.
    """

    steps: int
    loss: float
    seconds: float
    skipped: int
    interrupted: bool
    best_step: int | None = None


_FREE_SETTINGS = {
    "steps", "epochs", "accumulate", "micro_batch", "max_skipped", "log_every", "checkpoint_every", "keep",
    "sample_every", "tensorboard", "wandb", "activation_checkpointing", "compile",
}  # fmt: skip
"""Training settings that a resumed run may change: they say how long, how and how often, not what is learned."""


def comparable_settings(config: RunConfig, sections: Collection[str], train: LoopConfig) -> dict[str, Any]:
    """What a resumed run must agree on: sections of the configuration, and what decides what is learned.

    Args:
        config: The run's configuration.
        sections: Top-level keys of the model's configuration.
        train: The training section.
    """
    return {
        **config.model_dump(mode="json", include=set(sections)),
        "train": train.model_dump(mode="json", exclude=_FREE_SETTINGS),
    }
