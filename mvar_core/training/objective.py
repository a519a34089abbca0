"""What the training engine is told: the objective that is trained, the plan of how, and the outcome that it gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mvar_core.config import OptimizerConfig, RunConfig
from mvar_core.training.record import StepReport

OnStep = Callable[[StepReport], None]
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class BatchPart:
    """The rows of a step's batch that are computed together: all of them, or a micro-batch, or a process's share.

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

    def split(self, size: int | None) -> list[BatchPart]:
        """Parts of `size` rows at most, in order; None leaves it whole."""
        size = size or self.rows
        return [
            BatchPart(start, min(start + size, self.stop), self.total) for start in range(self.start, self.stop, size)
        ]


class Objective(Protocol[Batch]):
    """What is trained, and on what."""

    metric_names: tuple[str, ...]
    """Names of the values that `loss` returns beside the loss; nan there is a measure that a step does not have."""
    num_rows: int
    """Rows that there are to train on."""
    tokens_per_image: int

    def fetch(self, rows: Any, step: int) -> Batch:
        """Read a batch, a tensor or a tuple of tensors with one row each; runs in a thread of its own."""
        ...

    def loss(self, model: nn.Module, batch: Batch, step: int, part: BatchPart) -> tuple[Tensor, Tensor]:
        """Mean loss of some rows with its gradient, and the values named by `metric_names` without one.

        Called under autocast. What is drawn for a row must not depend on which rows are computed together.

        Args:
            model: What is trained, as the strategy wrapped it: the loss goes through its `forward`.
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

    def state(self) -> dict[str, Tensor]:
        """Tensors carried from step to step beside the model."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


@dataclass(frozen=True)
class Plan:
    """How an objective is trained.

    Attributes:
        total_steps: Optimizer steps of the whole run.
        batch_size: Rows per step, over all processes.
        optimizer: AdamW's settings.
        log_every: Steps between lines of metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        device: Where to compute; the model is there.
        dtype: Type that autocast computes in; parameters stay in float32.
        seed: Of everything that is drawn.
        settings: What a resumed run must agree on.
        resume: Whether to go on from the last checkpoint in `out`.
        micro_batch: Rows that are computed together; their gradients add up to the batch's. None computes all at once.
    """

    total_steps: int
    batch_size: int
    optimizer: OptimizerConfig
    log_every: int
    checkpoint_every: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    settings: Mapping[str, Any]
    resume: bool = True
    micro_batch: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: Steps done.
        loss: Training loss, averaged over the last line of metrics.jsonl.
        seconds: Time spent, over all sessions of the run.
        skipped: Steps left out because their loss or gradient was not finite.
        interrupted: Whether Ctrl-C ended it before its last step; a checkpoint was written.
    """

    steps: int
    loss: float
    seconds: float
    skipped: int
    interrupted: bool


def comparable_settings(config: RunConfig, sections: Collection[str], train: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must agree on: sections of the configuration, and training settings but for their rhythm.

    Args:
        config: The run's configuration.
        sections: Top-level keys of the model's configuration.
        train: The dumped training section; steps, epochs and the intervals of logs and checkpoints may change.
    """
    free = {"steps", "epochs", "log_every", "checkpoint_every"}
    chosen = config.model_dump(mode="json", include=set(sections))
    return {**chosen, "train": {key: value for key, value in train.items() if key not in free}}
