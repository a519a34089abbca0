"""One optimizer step: learning rate, micro-batches, gradient scaling, clipping, and the guard against nan."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvar_core.errors import MvarError
from mvar_core.training.objective import Objective, Plan
from mvar_core.training.optim import build_optimizer, learning_rate
from mvar_core.training.order import batch_rows
from mvar_core.training.strategy import Strategy

MAX_OVERFLOWS_IN_A_ROW = 40  # fp16: the gradient scaler needs some to find its scale, and halves it each time

logger = logging.getLogger("mvar")


@dataclass(frozen=True)
class StepResult:
    """What one step gave.

    Attributes:
        loss: Mean over the batch; nan where the step was left out.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: Of this step.
        values: The loss and the objective's values; None where the step was left out.
        found_loss: The loss, also where the step was left out.
        overflow: Whether it was left out because float16 gradients overflowed, as they now and then do.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    values: Tensor | None
    found_loss: float
    overflow: bool = False


class Stepper:
    """Takes steps, and holds what changes with them: optimizer, gradient scaler, the count of steps left out.

    Args:
        module: What is trained, on its device, in float32.
        objective: Loss and data.
        plan: Steps, batch size, optimizer, device.
        strategy: Where the step is computed.
        no_decay: Names of parameters without weight decay, beside biases and 1-D ones.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective[Any],
        plan: Plan,
        strategy: Strategy,
        no_decay: Collection[str] = (),
    ):
        self.objective = objective
        self.plan = plan
        self.strategy = strategy
        self.model = strategy.wrap(module)
        self.optimizer = build_optimizer(module, plan.train.optimizer, no_decay, plan.device)
        self.scaler = strategy.scaler(plan.device, plan.dtype)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.skipped = 0
        self.skipped_in_a_row = 0

    def rows(self, step: int) -> Any:
        """The rows of the data that a step trains on, over all processes."""
        return batch_rows(step, self.plan.train.batch_size, self.objective.num_rows, self.plan.seed)

    def fetch(self, step: int) -> Any:
        """This process's part of a step's batch."""
        part = self.strategy.part(self.plan.train.batch_size)
        return self.objective.fetch(self.rows(step)[part.start : part.stop], step)

    def take(self, batch: Any, step: int) -> StepResult:
        """Change the model by one step; a step whose loss or gradient is not finite changes nothing.

        Args:
            batch: From `fetch`.
            step: Steps done before this one.
        """
        plan = self.plan
        rate = learning_rate(step, plan.total_steps, plan.train.batch_size, plan.train.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        values = self.strategy.add_up(self.accumulate_gradients(batch, step))
        self.scaler.unscale_(self.optimizer)
        norm = self.strategy.clip(self.parameters, plan.train.optimizer.grad_clip)
        loss_value, norm_value = torch.stack([values[0], norm.float()]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()  # lowers the scale after an overflow
        if not finite:
            self.skipped += 1
            self.skipped_in_a_row += 1
            overflow = self.scaler.is_enabled() and math.isfinite(loss_value)
            return StepResult(math.nan, norm_value, rate, None, loss_value, overflow)
        self.skipped_in_a_row = 0
        self.objective.after_step(batch, step, self.optimizer)
        return StepResult(loss_value, norm_value, rate, values, loss_value)

    def accumulate_gradients(self, batch: Any, step: int) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters, micro-batch by micro-batch.

        Returns:
            This process's share of the loss and of the objective's values: shares of all processes add up to the means.
        """
        plan, own = self.plan, self.strategy.part(self.plan.train.batch_size)
        total: Tensor | None = None
        size = plan.train.micro_batch or math.ceil(own.rows / plan.train.accumulate)
        for part in own.split(size):
            with self.strategy.accumulating(self.model, last=part.stop == own.stop):
                rows = take_rows(batch, part.start - own.start, part.stop - own.start)
                with torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
                    loss, values = self.objective.loss(self.model, rows, step, part)
                share = part.rows / part.total
                # Gradients of several processes are averaged, not added, when they are exchanged.
                self.scaler.scale(loss * (share * self.strategy.count)).backward()
            shared = torch.cat([loss.detach().float().view(1), values.detach().float()]) * share
            total = shared if total is None else total + shared
        assert total is not None
        return total

    def check_skipped(self, step: int, result: StepResult) -> None:
        """Report a step that was left out, and give up after too many in a row.

        Args:
            step: Steps done before it.
            result: What it gave.

        Raises:
            MvarError: Too many steps in a row were not finite; names the last one's rows.
        """
        found = f"loss {result.found_loss}, gradient norm {result.grad_norm}"
        if not result.overflow:
            logger.warning("Step %d was left out: %s.", step + 1, found)
        if self.skipped_in_a_row >= (MAX_OVERFLOWS_IN_A_ROW if result.overflow else self.plan.train.max_skipped):
            rows = self.rows(step)
            shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
            raise MvarError(
                f"{self.skipped_in_a_row} steps in a row were not finite; the last was step {step + 1} ({found}) on"
                f" rows {shown}. skipped.jsonl lists them all.",
                "Try a lower learning rate or --dtype float32; the last checkpoint is from before.",
            )


def take_rows(batch: Any, start: int, stop: int) -> Any:
    """Some rows of a batch: of a tensor, or of each tensor in a tuple."""
    if isinstance(batch, Tensor):
        return batch if (start, stop) == (0, len(batch)) else batch[start:stop]
    return tuple(take_rows(tensor, start, stop) for tensor in batch)
