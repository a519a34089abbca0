"""Where a step is computed, and with whom: the one place that knows whether other processes share the work.

The engine asks the strategy to wrap the model, which rows of a batch are this process's, to clip, and to add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvar_core.training.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from mvar_core.training.objective import BatchPart

Value = TypeVar("Value")


class Strategy:
    """One process that does everything itself. Strategies of several processes derive from it.

    Attributes:
        rank: This process's number.
        count: How many processes share each batch.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """What the forward pass goes through; called once, before the optimizer is built on `module`."""
        return module

    def part(self, batch_size: int) -> BatchPart:
        """The rows of a step's batch that this process computes."""
        return BatchPart(batch_size * self.rank // self.count, batch_size * (self.rank + 1) // self.count, batch_size)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Entered around the forward and backward pass of each part; only the last one exchanges gradients."""
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a total norm of `limit` at most (0 does not clip); returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf)

    def scaler(self, device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
        """The scaler of gradients; it does nothing but in float16, for bfloat16 has the range of float32."""
        return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        return values

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is raised in some process; all processes ask together."""
        return flag

    def wait(self) -> None:
        """Until all processes are here."""

    def agree(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        return value

    def copy_first(self, tensor: Tensor) -> None:
        """Give a tensor the first process's values, in all of them."""

    def gather_rows(self, rows: Tensor, part: BatchPart) -> Tensor:
        """The rows of all processes, of a batch of which `rows` are this one's part."""
        return rows

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's whole state dict, in the first process at least; all processes ask together."""
        return dict(module.state_dict())

    def save(self, out: Path, state: TrainingState, keep: int) -> None:
        """Write a checkpoint; all processes call this together."""
        if self.first:
            save_checkpoint(out, state, keep)

    def load(self, path: Path, module: nn.Module) -> TrainingState:
        """Read a checkpoint of any kind, with the tensors as `module` has them; all processes call this together.

        Raises:
            CheckpointError: It is damaged, or not a training checkpoint.
        """
        return load_checkpoint(path)
