"""The loop that all training shares: resume, step, log, checkpoint, stop between steps when interrupted.

What is trained is an objective; everything a step draws is a function of (seed, step), so that a resumed run does what
an uninterrupted one would have done, to the bit on a CPU in float32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mvar_core.allocator import keeping_all_freed_memory
from mvar_core.config import RunConfig
from mvar_core.distributed import InterruptFlag
from mvar_core.errors import DataError
from mvar_core.io.files import remove_leftovers, write_text
from mvar_core.models.compilation import uncompiled
from mvar_core.training.checkpoints import (
    TrainingState,
    check_settings,
    latest_checkpoint,
    remove_checkpoints,
)
from mvar_core.training.ema import WeightAverage
from mvar_core.training.objective import PICTURES, Objective, OnSample, OnStep, Outcome, Plan
from mvar_core.training.optim import load_moments, moments
from mvar_core.training.order import prefetch
from mvar_core.training.randomness import random_state, set_random_state
from mvar_core.training.reporting import Recorder
from mvar_core.training.step import Stepper
from mvar_core.training.strategy import Strategy
from mvar_core.training.trackers import check_trackers

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
    on_sample: OnSample | None = None,
    strategy: Strategy | None = None,
) -> Outcome:
    """Train `module` on an objective inside a run directory, from its last checkpoint if it has one.

    Writes `out`/config.yaml, metrics.jsonl and checkpoints/. A step whose loss or gradient is not finite is left out
    and recorded in skipped.jsonl. At the end the module has the weights that the model is to have: the averaged ones,
    where the plan asks for an average.

    Args:
        module: What is trained, on its device, in float32.
        objective: Loss and data.
        plan: Steps, batch size, optimizer, device.
        config: Written to config.yaml.
        out: The run directory.
        no_decay: Names of parameters without weight decay, beside biases and 1-D ones.
        on_step: Called after every step; a KeyboardInterrupt from it ends the run as Ctrl-C does.
        on_sample: Called every `sample_every` steps and at the end.
        strategy: Where the steps are computed; by default in this process alone.

    Raises:
        CheckpointError: The last checkpoint is damaged or belongs to a run with other settings.
        ConfigError: A tracker is asked for that is not installed.
        MvarError: Too many steps in a row were not finite.
        DataError: There is nothing to train on.
    """
    if objective.num_rows < 1:
        raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
    check_trackers(plan.train)
    session = _Session(module, objective, plan, out, strategy or Strategy(), no_decay)
    session.on_step, session.on_sample = on_step, on_sample
    if session.strategy.first:
        for directory in (out, out / PICTURES):
            remove_leftovers(directory)
        if not plan.resume:
            remove_checkpoints(out)
    if plan.resume:
        session.resume()
    return session.train(config)


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
        self.average = WeightAverage(module, plan.train.ema) if plan.train.ema else None
        self.step = 0
        self.best_step: int | None = None
        self.best_score = math.inf
        self.on_step: OnStep | None = None
        self.on_sample: OnSample | None = None

    def resume(self) -> None:
        """Take everything back from the last checkpoint, if there is one."""
        path = self.strategy.agree(latest_checkpoint(self.out))
        if path is None:
            return
        state = self.strategy.load(path, self.module)
        check_settings(path, state.settings, self.plan.settings)
        if state.step > self.plan.total_steps:
            logger.warning(
                "%s has already run %d steps, more than the %d asked for.", path, state.step, self.plan.total_steps
            )
        stepper, recorder = self.stepper, self.recorder
        self.module.load_state_dict(state.model)
        load_moments(stepper.optimizer, self.module, state.optimizer)
        if stepper.scaler.is_enabled():
            stepper.scaler.load_state_dict(state.scaler)
        if self.average is not None:
            self.average.load_state(state.average)
        self.objective.load_state(state.objective)
        if state.window is not None:
            recorder.window = state.window.to(self.plan.device)
        self.step, self.best_step, self.best_score = state.step, state.best_step, state.best_score
        stepper.skipped, stepper.skipped_in_a_row = state.skipped, state.skipped_in_a_row
        recorder.loss, recorder.earlier_seconds = state.loss, state.seconds
        set_random_state(state.random, self.plan.device)

    def save(self) -> None:
        """Write a checkpoint of the state after `self.step` steps."""
        state = TrainingState(
            step=self.step,
            settings=dict(self.plan.settings),
            model=self.module.state_dict(),
            optimizer=moments(self.stepper.optimizer, self.module),
            scaler=self.stepper.scaler.state_dict(),
            objective=self.objective.state(),
            window=self.recorder.window,
            loss=self.recorder.loss,
            skipped=self.stepper.skipped,
            seconds=self.recorder.seconds,
            average=self.average.state() if self.average is not None else {},
            random=random_state(self.plan.device),
            skipped_in_a_row=self.stepper.skipped_in_a_row,
            best_step=self.best_step,
            best_score=self.best_score,
        )
        self.strategy.save(self.out, state, self.plan.train.keep)

    def train(self, config: RunConfig) -> Outcome:
        """Take the steps that are left."""
        start, total = self.step, self.plan.total_steps
        values = config.model_dump(mode="json")
        if self.strategy.first:
            write_text(self.out / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            self.recorder.open(self.out, start, values)
        self.module.train()
        if start == 0:
            self.objective.prepare()
        interrupted = False
        try:
            if start < total:
                interrupted = self.take_steps(start, total)
        finally:
            self.recorder.close()
        if self.average is not None and not interrupted:
            self.average.swap()
        self.module.eval()
        recorder, skipped = self.recorder, self.stepper.skipped
        return Outcome(self.step, recorder.loss, recorder.seconds, skipped, interrupted, self.best_step)

    def take_steps(self, start: int, total: int) -> bool:
        """Steps `start` … `total` - 1, with checkpoints; returns whether an interruption ended them early."""
        # On a CPU the model already uses every core: a thread that reads would only stand in its way.
        ahead = 0 if self.plan.device.type == "cpu" else 2
        self.recorder.start(start)
        with (
            keeping_all_freed_memory() if self.plan.device.type == "cpu" else nullcontext(),
            InterruptFlag() as flag,
            closing(prefetch(self.stepper.fetch, start, total, ahead)) as batches,
        ):
            for batch in batches:
                self.take_step(batch, flag)
                interrupted = self.strategy.anywhere(flag.raised) and self.step < total
                if interrupted or self.due(self.plan.train.checkpoint_every):
                    self.save()
                if interrupted:
                    return True
        return False

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.plan.total_steps)

    def take_step(self, batch: Any, flag: InterruptFlag) -> None:
        """One step, and everything that is measured, written and shown of it."""
        stepper, recorder, train = self.stepper, self.recorder, self.plan.train
        result = stepper.take(batch, self.step)
        if result.values is None:
            if not result.overflow:
                recorder.write_skipped(self.step + 1, result, stepper.rows(self.step))
            stepper.check_skipped(self.step, result)
        self.step += 1
        if self.average is not None and result.values is not None:
            self.average.update(self.step - stepper.skipped - 1)
        recorder.add(result.values)
        line = recorder.training_line(self.step, result, stepper.skipped)
        report = recorder.report(self.step, result, stepper.skipped, line)
        if self.due(train.checkpoint_every):
            self.validate()
        if self.due(train.sample_every):
            self.draw_samples()
        if line:
            recorder.restart_clock()
        if self.on_step is not None:
            try:
                self.on_step(report)
            except KeyboardInterrupt:
                flag.raised = True

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While entered, the module is what its model directory would be: in evaluation mode, with averaged weights."""
        self.module.eval()
        try:
            averaged = self.average.in_place() if self.average is not None else nullcontext()
            with torch.no_grad(), averaged, uncompiled(self.module):
                yield
        finally:
            self.module.train()

    def validate(self) -> None:
        """Measure on held-out data, write the line, and remember the best."""
        with self.measuring():
            measures = self.objective.validate()
        if not measures:
            return
        self.recorder.write({"step": self.step, **measures})
        score = self.objective.score(measures)
        if score is not None and score < self.best_score:
            self.best_step, self.best_score = self.step, score

    def draw_samples(self) -> None:
        """Let the caller make a picture of what the model generates."""
        if self.on_sample is None:
            return
        with self.measuring():
            image = self.on_sample(self.step)
        if image is not None:
            self.recorder.picture(self.step, image)
