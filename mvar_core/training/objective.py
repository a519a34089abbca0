"""What a trainer is given and what it returns: the objective, the plan, a report after each step, and the outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvar_core.config import RunConfig
from mvar_core.config.training import LoopConfig
from mvar_core.errors import MvarError


@dataclass(frozen=True)
class StepReport:
    """One finished step, for progress bars; `loss` is nan where the step was skipped.

    `images_per_second` is since the last line of metrics.jsonl; `skipped` counts the steps that were left out so far.
    """

    step: int
    total_steps: int
    loss: float
    images_per_second: float
    skipped: int


OnStep = Callable[[StepReport], None]
OnSample = Callable[[int], np.ndarray | None]
"""Called with the steps done, while the module has the weights that its model directory would get, in evaluation mode;
makes a picture (H, W, 3) uint8 of what it generates."""
PICTURES = "samples"
"""The folder of a run directory where such pictures are kept."""


@dataclass(frozen=True)
class BatchPart:
    """Rows `start` … `stop` - 1 of a batch of `total` that are computed together: a micro-batch, a process's share."""

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


class Objective:
    """What is trained, and on what; the base of objectives that override what they need.

    Attributes:
        metric_names: Names of the values that `loss` returns next to the loss; nan there is a measure that a step does
            not have.
        watched: Of "loss" and those names, the ones whose sum falls in a training that goes well.
        num_rows: Rows that there are to train on.
        tokens_per_image: Tokens of an image that a step trains, for throughput.
    """

    metric_names: tuple[str, ...]
    watched: tuple[str, ...] = ("loss",)
    num_rows: int
    tokens_per_image: int

    def fetch(self, rows: Any, step: int) -> Any:
        """Read a batch, a tensor or a tuple of tensors with one row each; runs in a thread of its own."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any, step: int, part: BatchPart) -> tuple[Tensor, Tensor]:
        """Mean loss of some rows with its gradient, and the values named by `metric_names` without one.

        Called under autocast. What is random for a row must not depend on which rows are computed together. `model`
        is wrapped for the processes: the loss goes through its `forward`. `part` says where the rows stand in the batch
        of the step, which follows `step` others.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Called once before the first step of a run that does not resume."""

    def after_step(self, batch: Any, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after every step that was not skipped, with this process's rows."""

    def describe(self, means: Mapping[str, float]) -> dict[str, Any]:
        """Means over some steps, as metrics.jsonl shows them."""
        return dict(means)

    def validate(self) -> dict[str, Any]:
        """Measures on held-out data; empty without any."""
        return {}

    def score(self, measures: Mapping[str, Any]) -> float | None:
        """The one of `validate`'s measures that chooses the best checkpoint, lower is better; None without any."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors carried from step to step next to the model."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Plan:
    """How an objective is trained.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        train: Batch size, optimizer, micro-batches, averages, intervals of logs and checkpoints.
        device: Where to compute; the model is there.
        dtype: What autocast computes in; parameters stay in float32.
        seed: Of everything random.
        settings: What a resumed run must agree on.
        resume: Whether to resume from the last checkpoint in the run directory.
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
    """How a run ended, as checkpoints record it.

    Attributes:
        steps: Steps done.
        loss: Training loss, averaged over the last line of metrics.jsonl.
        seconds: Time spent, over all sessions of the run.
        skipped: Steps left out because their loss or gradient was not finite.
        interrupted: Whether Ctrl-C or SIGTERM ended it before its last step; a checkpoint was written.
        best_step: The step of the best validation; None without any, or where the run diverged that of the last
            checkpoint before. Its checkpoint is kept.
        diverged: Why the weights are of no use, if they are.
    """

    steps: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    skipped: int = 0
    interrupted: bool = False
    best_step: int | None = None
    diverged: MvarError | None = None


_FREE_SETTINGS = {
    "steps", "epochs", "accumulate", "micro_batch", "max_skipped", "max_loss_ratio", "log_every",
    "checkpoint_every", "keep", "sample_every", "tensorboard", "wandb", "activation_checkpointing", "compile",
}  # fmt: skip
"""Training settings that a resumed run may change: they say how long, how and how often, not what is learned."""


def comparable_settings(config: RunConfig, sections: Collection[str], train: LoopConfig) -> dict[str, Any]:
    """What a resumed run must agree on: sections of the model's configuration, and what decides what is learned."""
    return {
        **config.model_dump(mode="json", include=set(sections)),
        "train": train.model_dump(mode="json", exclude=_FREE_SETTINGS),
    }
