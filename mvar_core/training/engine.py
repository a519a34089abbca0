"""The loop that all training shares: resume, step, log, checkpoint, stop between steps when interrupted.

What is trained is an objective; everything a step draws is a function of (seed, step), so that a resumed run does what
an uninterrupted one would have done, to the bit on a CPU in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mvar_core.config import RunConfig
from mvar_core.errors import DataError
from mvar_core.files import write_text
from mvar_core.training.checkpoints import (
    TrainingState,
    check_settings,
    latest_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from mvar_core.training.interrupt import InterruptFlag
from mvar_core.training.objective import Objective, OnStep, Outcome, Plan
from mvar_core.training.order import prefetch
from mvar_core.training.record import MetricsLog
from mvar_core.training.reporting import Recorder
from mvar_core.training.step import Stepper
from mvar_core.training.strategy import Strategy

logger = logging.getLogger("mvar")


def optimise(
    module: nn.Module,
    objective: Objective[Any],
    plan: Plan,
    config: RunConfig,
    out: Path,
    *,
    no_decay: Collection[str] = (),
    on_step: OnStep | None = None,
    strategy: Strategy | None = None,
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
        strategy: Where the steps are computed; by default in this process alone.

    Raises:
        CheckpointError: The last checkpoint is damaged or belongs to a run with other settings.
        MvarError: Ten steps in a row were not finite.
        DataError: There is nothing to train on.
    """
    if objective.num_rows < 1:
        raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
    session = _Session(module, objective, plan, out, strategy or Strategy(), no_decay)
    if plan.resume:
        session.resume()
    elif session.strategy.first:
        remove_checkpoints(out)
    return session.train(config, on_step)


class _Session:
    """One session of a run: from the last checkpoint to the end, or to an interruption."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective[Any],
        plan: Plan,
        out: Path,
        strategy: Strategy,
        no_decay: Collection[str],
    ) -> None:
        self.module = module
        self.objective = objective
        self.plan = plan
        self.out = out
        self.strategy = strategy
        self.stepper = Stepper(module, objective, plan, strategy, no_decay)
        self.recorder = Recorder(objective, plan)
        self.step = 0

    def resume(self) -> None:
        """Take everything back from the last checkpoint, if there is one."""
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
        self.stepper.optimizer.load_state_dict(state.optimizer)
        if self.stepper.scaler.is_enabled():
            self.stepper.scaler.load_state_dict(state.scaler)
        self.objective.load_state(state.objective)
        if state.window is not None:
            self.recorder.window = state.window.to(self.plan.device)
        self.step, self.recorder.loss = state.step, state.loss
        self.stepper.skipped, self.recorder.earlier_seconds = state.skipped, state.seconds

    def save(self) -> None:
        """Write a checkpoint of the state after `self.step` steps."""
        state = TrainingState(
            step=self.step,
            settings=dict(self.plan.settings),
            model=self.module.state_dict(),
            optimizer=self.stepper.optimizer.state_dict(),
            scaler=self.stepper.scaler.state_dict(),
            objective=self.objective.state(),
            window=self.recorder.window,
            loss=self.recorder.loss,
            skipped=self.stepper.skipped,
            seconds=self.recorder.seconds,
        )
        if self.strategy.first:
            save_checkpoint(self.out, state)

    def train(self, config: RunConfig, on_step: OnStep | None) -> Outcome:
        """Take the steps that are left."""
        plan, start, total = self.plan, self.step, self.plan.total_steps
        if self.strategy.first:
            values = config.model_dump(mode="json")
            write_text(self.out / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        self.module.train()
        if start == 0:
            self.objective.prepare()
        self.recorder.open(MetricsLog(self.out / "metrics.jsonl", start) if self.strategy.first else None)
        # On a CPU the model already uses every core: a thread that reads would only stand in its way.
        ahead = 0 if plan.device.type == "cpu" else 2
        interrupted = False
        with InterruptFlag() as flag, closing(prefetch(self.stepper.fetch, start, total, ahead)) as batches:
            for batch in batches:
                self.take_step(batch, flag, on_step)
                interrupted = self.strategy.anywhere(flag.raised) and self.step < total
                if interrupted or self.at_checkpoint:
                    self.save()
                if interrupted:
                    break
        self.module.eval()
        return Outcome(self.step, self.recorder.loss, self.recorder.seconds, self.stepper.skipped, interrupted)

    @property
    def at_checkpoint(self) -> bool:
        """Whether a checkpoint, and with it a validation, is due."""
        return self.step == self.plan.total_steps or self.step % self.plan.train.checkpoint_every == 0

    def take_step(self, batch: Any, flag: InterruptFlag, on_step: OnStep | None) -> None:
        """One step, and everything that is written and shown of it."""
        result = self.stepper.take(batch, self.step)
        self.step += 1
        recorder, skipped = self.recorder, self.stepper.skipped
        recorder.add(result.values)
        line = recorder.training_line(self.step, result, skipped)
        report = recorder.report(self.step, result, skipped, line)
        if self.at_checkpoint:
            self.validate()
        if line:
            recorder.restart_clock()
        if on_step is not None:
            try:
                on_step(report)
            except KeyboardInterrupt:
                flag.raised = True

    def validate(self) -> None:
        """Measure on held-out data and write the line."""
        self.module.eval()
        measures = self.objective.validate()
        self.module.train()
        if measures:
            self.recorder.write({"step": self.step, **measures})
