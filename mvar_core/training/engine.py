"""The loop that all training shares: resume, step, guard, log, checkpoint, stop between steps when interrupted.

What is trained is an objective; everything a step draws is a function of (seed, step), so that a resumed run does what
an uninterrupted one would have done, to the bit on a CPU in float32.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from torch import Tensor, nn

from mvar_core.config import OptimizerConfig, RunConfig
from mvar_core.errors import DataError, MvarError
from mvar_core.files import write_text
from mvar_core.runtime import peak_memory_bytes
from mvar_core.training.checkpoints import (
    TrainingState,
    check_settings,
    latest_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from mvar_core.training.interrupt import InterruptFlag
from mvar_core.training.optim import build_optimizer, learning_rate
from mvar_core.training.order import batch_rows, prefetch
from mvar_core.training.record import MetricsLog, StepReport

MAX_SKIPPED_IN_A_ROW = 10
MAX_OVERFLOWS_IN_A_ROW = 40  # fp16: the gradient scaler needs some to find its scale, and halves it each time

OnStep = Callable[[StepReport], None]
Batch = TypeVar("Batch")

logger = logging.getLogger("mvar")


class Objective(Protocol[Batch]):
    """What is trained, and on what."""

    metric_names: tuple[str, ...]
    """Names of the values that `loss` returns beside the loss; nan there is a measure that a step does not have."""
    num_rows: int
    """Rows that there are to train on."""
    tokens_per_image: int

    def fetch(self, rows: Any, step: int) -> Batch:
        """Read the batch of a step; runs in a thread of its own."""
        ...

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Loss with its gradient, and the values named by `metric_names` without one; under autocast."""
        ...

    def prepare(self) -> None:
        """Called once before the first step of a run that does not resume."""
        ...

    def after_step(self, batch: Batch, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after every step that was not skipped."""
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
        batch_size: Rows per step.
        optimizer: AdamW's settings.
        log_every: Steps between lines of metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        device: Where to compute; the model is there.
        dtype: Type that autocast computes in; parameters stay in float32.
        seed: Of everything that is drawn.
        settings: What a resumed run must agree on.
        resume: Whether to go on from the last checkpoint in `out`.
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


def optimise(
    module: nn.Module,
    objective: Objective[Any],
    plan: Plan,
    config: RunConfig,
    out: Path,
    *,
    no_decay: Collection[str] = (),
    on_step: OnStep | None = None,
) -> Outcome:
    """Train `module` on an objective inside a run directory, from its last checkpoint if it has one.

    Writes `out`/config.yaml, metrics.jsonl and checkpoints/. A step whose loss or gradient is not finite is left out.

    Args:
        module: What is trained, on its device, in float32.
        objective: Loss and data.
        plan: Steps, batch size, optimizer, device.
        config: Written to config.yaml.
        out: The run directory.
        no_decay: Names of parameters without weight decay, beside biases and 1-D ones.
        on_step: Called after every step; a KeyboardInterrupt from it ends the run as Ctrl-C does.

    Raises:
        CheckpointError: The last checkpoint is damaged or belongs to a run with other settings.
        MvarError: Ten steps in a row were not finite.
        DataError: There is nothing to train on.
    """
    run = _Run(module, objective, plan, out, no_decay)
    if plan.resume:
        run.resume()
    else:
        remove_checkpoints(out)
    return run.train(config, on_step)


class _Run:
    """One session of a run: the state between steps and how it changes."""

    def __init__(
        self, module: nn.Module, objective: Objective[Any], plan: Plan, out: Path, no_decay: Collection[str]
    ) -> None:
        if objective.num_rows < 1:
            raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
        self.module = module
        self.objective = objective
        self.plan = plan
        self.out = out
        self.optimizer = build_optimizer(module, plan.optimizer, no_decay, plan.device)
        # bf16 has the range of float32; only fp16 needs its gradients scaled.
        uses_scaler = plan.dtype == torch.float16 and plan.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=uses_scaler)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.step = 0
        self.window = torch.zeros(2, 1 + len(objective.metric_names), device=plan.device)
        self.loss = math.nan
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.earlier_seconds = 0.0
        self.started = time.monotonic()
        self.images_since_line = 0
        self.line_started = self.started

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def resume(self) -> None:
        path = latest_checkpoint(self.out)
        if path is None:
            return
        state = load_checkpoint(path)
        check_settings(path, state.settings, self.plan.settings)
        if state.step > self.plan.total_steps:
            logger.warning(
                "%s has already run %d steps, more than the %d asked for.", path, state.step, self.plan.total_steps
            )
        self.module.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        self.objective.load_state(state.objective)
        if state.window is not None:
            self.window = state.window.to(self.plan.device)
        self.step, self.loss = state.step, state.loss
        self.skipped, self.earlier_seconds = state.skipped, state.seconds

    def save(self) -> None:
        save_checkpoint(
            self.out,
            TrainingState(
                step=self.step,
                settings=dict(self.plan.settings),
                model=self.module.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                objective=self.objective.state(),
                window=self.window,
                loss=self.loss,
                skipped=self.skipped,
                seconds=self.seconds,
            ),
        )

    def rows(self, step: int) -> Any:
        return batch_rows(step, self.plan.batch_size, self.objective.num_rows, self.plan.seed)

    def train(self, config: RunConfig, on_step: OnStep | None) -> Outcome:
        write_text(
            self.out / "config.yaml",
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        )
        log = MetricsLog(self.out / "metrics.jsonl", self.step)
        start, total = self.step, self.plan.total_steps
        self.module.train()
        if start == 0:
            self.objective.prepare()
        self.line_started = time.monotonic()
        # On a CPU the model already uses every core: a thread that reads would only stand in its way.
        ahead = 0 if self.plan.device.type == "cpu" else 2
        batches = prefetch(lambda step: self.objective.fetch(self.rows(step), step), start, total, ahead)
        interrupted = False
        with InterruptFlag() as flag, closing(batches):
            for batch in batches:
                loss, grad_norm, rate = self.take_step(batch)
                line = self.write_lines(log, rate, grad_norm)
                report = StepReport(
                    self.step, total, loss, rate, grad_norm, self.images_per_second(), self.skipped, line
                )
                if line:
                    self.images_since_line, self.line_started = 0, time.monotonic()
                if on_step is not None:
                    try:
                        on_step(report)
                    except KeyboardInterrupt:
                        flag.raised = True
                interrupted = flag.raised and self.step < total
                if interrupted or self.step == total or self.step % self.plan.checkpoint_every == 0:
                    self.save()
                if interrupted:
                    break
        self.module.eval()
        return Outcome(self.step, self.loss, self.seconds, self.skipped, interrupted)

    def take_step(self, batch: Any) -> tuple[float, float, float]:
        """One optimizer step. Returns loss (nan where skipped), gradient norm and learning rate."""
        plan, step = self.plan, self.step
        rate = learning_rate(step, plan.total_steps, plan.batch_size, plan.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
            loss, values = self.objective.loss(batch, step)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, plan.optimizer.grad_clip or math.inf)
        loss_value, norm_value = torch.stack([loss.detach().float(), norm.float()]).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # leaves an overflowing step out by itself
            self.scaler.update()
        self.step += 1
        self.images_since_line += plan.batch_size
        if not finite:
            self.count_skipped(step, loss_value, norm_value)
            return math.nan, norm_value, rate
        self.skipped_in_a_row = 0
        values = torch.cat([loss.detach().float().view(1), values.detach().float()])
        self.window += torch.stack([values.nan_to_num(), (~values.isnan()).float()])
        self.objective.after_step(batch, step, self.optimizer)
        return loss_value, norm_value, rate

    def count_skipped(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        overflow = self.scaler.is_enabled() and math.isfinite(loss)
        if not overflow:
            logger.warning("Step %d was left out: loss %s, gradient norm %s.", step + 1, loss, norm)
        if self.skipped_in_a_row >= (MAX_OVERFLOWS_IN_A_ROW if overflow else MAX_SKIPPED_IN_A_ROW):
            rows = self.rows(step)
            shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
            raise MvarError(
                f"{self.skipped_in_a_row} steps in a row were not finite; the last was step {step + 1} (loss {loss},"
                f" gradient norm {norm}) on rows {shown}.",
                "Try a lower learning rate or --dtype float32; the last checkpoint is from before.",
            )

    def images_per_second(self) -> float:
        return self.images_since_line / max(time.monotonic() - self.line_started, 1e-9)

    def write_lines(self, log: MetricsLog, rate: float, grad_norm: float) -> dict[str, Any]:
        """Append to metrics.jsonl what is due after this step; returns the line of training measures, if any."""
        plan, at_end = self.plan, self.step == self.plan.total_steps
        line: dict[str, Any] = {}
        if self.step % plan.log_every == 0 or at_end:
            means = dict(zip(("loss", *self.objective.metric_names), self.window_means(), strict=True))
            self.loss = means["loss"]
            speed = self.images_per_second()
            line = {
                "step": self.step,
                "loss": self.loss,
                **self.objective.describe(means),
                "lr": rate,
                "grad_norm": grad_norm,
                "skipped": self.skipped,
                "images_per_second": speed,
                "tokens_per_second": speed * self.objective.tokens_per_image,
                "peak_memory_bytes": peak_memory_bytes(plan.device),
            }
            log.append(line)
            self.window.zero_()
        if at_end or self.step % plan.checkpoint_every == 0:
            self.module.eval()
            measures = self.objective.validate()
            self.module.train()
            if measures:
                log.append({"step": self.step, **measures})
        return line

    def window_means(self) -> list[float]:
        sums, counts = self.window
        means: list[float] = (sums / counts).tolist()  # nan where no step had the measure
        return means
