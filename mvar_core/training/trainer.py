"""The loop that all training shares: resume, step, log, checkpoint, and stop between steps when interrupted.

What is trained is an objective; everything random in a step is a function of (seed, step), so that a resumed run does
what an uninterrupted one would have done, to the bit on a CPU in float32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mvar_core.allocator import keeping_all_freed_memory
from mvar_core.config import RunConfig
from mvar_core.config.training import LoopConfig, TokenizerTrainConfig, TrainConfig
from mvar_core.distributed import interrupt_flag
from mvar_core.errors import ConfigError, DataError, MvarError
from mvar_core.io.files import remove_leftovers, write_text
from mvar_core.models.compilation import uncompiled
from mvar_core.training.checkpoints import (
    BEST,
    CHECKPOINTS,
    UNREADABLE,
    TrainingState,
    best_weights,
    check_settings,
    damaged,
    latest_checkpoint,
    prune_checkpoints,
    random_state,
    remove_checkpoints,
    set_random_state,
)
from mvar_core.training.metrics import SKIPPED, Recorder, StepResult, check_trackers
from mvar_core.training.optim import EMA, build_optimizer, learning_rate, load_optimizer_state, optimizer_state
from mvar_core.training.parallel import BatchPart, Parallel, local_tensor
from mvar_core.untrusted import write_yaml

MAX_OVERFLOWS_IN_A_ROW = 40  # fp16: the gradient scaler needs some to find its scale, and halves it each time
_CARRIED = ("step", "skipped", "skipped_in_a_row", "best_step", "best_score", "good_step")
"""Of a trainer, what a checkpoint holds under the same name."""
BLOWN_UP, RECOVERED = 3, 0.9  # times the first loss: what no healthy training reaches, and what it falls below

logger = logging.getLogger("mvar")
Fetched = TypeVar("Fetched")


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


class Objective:
    """What is trained, and on what; the base of objectives that override what they need.

    Attributes:
        metric_names: Names of the values that `loss` returns next to the loss; nan there is a measure that a step does
            not have.
        watched: Of "loss" and those names, the ones whose mean falls in a training that goes well.
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

    def validate(self) -> tuple[dict[str, Any], float]:
        """Measures on held-out data, empty without any, and what chooses the best checkpoint: lower is better."""
        return {}, math.inf

    def state(self) -> dict[str, Tensor]:
        """Tensors carried from step to step next to the model."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Plan:
    """How an objective is trained; the model is on `device`, in float32, and `dtype` is what autocast computes in.

    `settings` are what a resumed run must agree on; `resume` says whether to resume from the last checkpoint.
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

    `loss` is the training loss, averaged over the last line of metrics.jsonl; `seconds` are those of all sessions;
    `skipped` counts steps whose loss or gradient was not finite. An `interrupted` run was ended before its last step,
    and wrote a checkpoint. The checkpoint of the best validation, `best_step`, is kept; of a run that `diverged`, whose
    weights are of no use, the last one before. `val_loss` is a transformer's, on the validation tokens.
    """

    steps: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    skipped: int = 0
    interrupted: bool = False
    best_step: int | None = None
    diverged: MvarError | None = None
    val_loss: float | None = None


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


class Trainer:
    """Trains `module` on an objective inside a run directory, from its last checkpoint if it has one.

    Writes `out`/config.yaml, metrics.jsonl and checkpoints/. A step whose loss or gradient is not finite is left out
    and recorded in skipped.jsonl. The module is on its device, in float32. A KeyboardInterrupt from `on_step` ends the
    run as Ctrl-C does; `on_sample` is called every `sample_every` steps and at the end. `no_decay` names parameters
    without weight decay, in addition to biases and 1-D ones.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        plan: Plan,
        out: Path,
        *,
        parallel: Parallel,
        no_decay: Collection[str] = (),
        on_step: OnStep | None = None,
        on_sample: OnSample | None = None,
    ):
        self.module, self.objective, self.plan, self.out = module, objective, plan, out
        self.on_step, self.on_sample, self.parallel = on_step, on_sample, parallel
        self.model = parallel.wrap(module)
        self.optimizer = build_optimizer(module, plan.train.optimizer, no_decay, plan.device)
        # Does nothing but in float16: bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == torch.float16)
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.ema = EMA(module, plan.train.ema) if plan.train.ema else None
        self.recorder = Recorder(objective, plan)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.best_step: int | None = None
        self.good_step: int | None = None
        self.section = "train_tokenizer" if isinstance(plan.train, TokenizerTrainConfig) else "train"
        self.best_score = math.inf

    def run(self, config: RunConfig) -> Outcome:
        """Take the steps that are left; then the module has the weights of the model, averaged where the plan says so.

        Raises:
            CheckpointError: The last checkpoint is damaged or belongs to a run with other settings.
            ConfigError: A tracker is asked for that is not installed.
            MvarError: Too many steps in a row were not finite; that the run diverged is in the outcome.
            DataError: There is nothing to train on.
        """
        if self.objective.num_rows < 1:
            raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
        check_trackers(self.plan.train)
        values, rank_zero = config.model_dump(mode="json"), self.parallel.world.is_rank_zero
        if rank_zero:
            for directory in (self.out, self.out / PICTURES, self.out / CHECKPOINTS, self.out / BEST):
                remove_leftovers(directory)
            if not self.plan.resume:
                remove_checkpoints(self.out)
        if self.plan.resume:
            self.restore()
        if self.step >= self.plan.total_steps:
            logger.info("%s has finished its %d steps already: nothing is left to train.", self.out, self.step)
        if rank_zero:
            write_text(self.out / "config.yaml", write_yaml(values))
            self.recorder.open(self.out, self.step, values)
        self.module.train()
        if self.step == 0:
            self.objective.prepare()
        interrupted = False
        try:
            if self.step < self.plan.total_steps:
                interrupted = self.take_steps()
        finally:
            for tracker in self.recorder.trackers:
                tracker.close()
        if self.ema is not None and not interrupted:
            self.ema.swap()
        self.module.eval()
        if not interrupted:
            self.check_weights()
        recorder, best, diverged = self.recorder, self.best_step, None
        if not interrupted and (reason := self.divergence()) is not None:
            best = self.good_step if best is None or best > (self.good_step or 0) else best
            kept = f"{self.out / BEST} has those of step {best}" if best else "there is no checkpoint from before"
            lower = self.plan.train.optimizer.lr / 10
            diverged = MvarError(
                f"{self.out}: {reason}. Its weights are not saved as a model; {kept}.",
                f"Start over with --overwrite --set {self.section}.optimizer.lr={lower:g}, or keep the weights as they"
                f" are: --set {self.section}.max_loss_ratio=0.",
            )
        return Outcome(self.step, recorder.loss, recorder.seconds, self.skipped, interrupted, best, diverged)

    def leave(self, outcome: Outcome, save: Callable[[Path, Mapping[str, Tensor], int], None], best: bool) -> None:
        """Leave the model of a run that was not interrupted: save(directory, weights, steps), also the `best` one.

        Of a run that diverged, only the last good weights are saved; then its error is raised.
        """
        weights = self.parallel.full_state(self.module) if not outcome.interrupted else {}
        if weights and self.parallel.world.is_rank_zero:
            if outcome.best_step is not None and (best or outcome.diverged is not None):
                save(self.out / BEST, best_weights(self.out, outcome.best_step), outcome.best_step)
            if outcome.diverged is None:
                save(self.out, weights, outcome.steps)
        self.parallel.world.barrier()
        if outcome.diverged is not None:
            raise outcome.diverged

    def divergence(self) -> str | None:
        """Whether the run has diverged, and how; None where it has not, or need not be told."""
        first, highest, last = self.recorder.course or (math.nan,) * 3
        ratio = self.plan.train.max_loss_ratio
        if ratio and self.skipped * 2 > self.step:
            return f"the training diverged: {self.skipped} of {self.step} steps were not finite and left out"
        # The loss that blew up and is back where it began belongs to weights that have learned nothing since.
        if ratio and (last > ratio * first or (highest > BLOWN_UP * first and last > RECOVERED * first)):
            course = f"its loss began at {first:.4g}, rose to {highest:.4g} and ended at {last:.4g}"
            return f"the training diverged: {course}"
        return None

    def restore(self) -> None:
        """Restore everything from the last checkpoint, if there is one."""
        path = self.parallel.world.broadcast_object(latest_checkpoint(self.out))
        if path is None:
            return
        state = self.parallel.load(path, self.module)
        check_settings(path, state.settings, self.plan.settings)
        if state.step > (asked := self.plan.total_steps):
            logger.warning("%s has already run %d steps, more than the %d asked for.", path, state.step, asked)
        try:
            self.apply(state)
        except (*UNREADABLE, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise damaged(path, error) from None
        if self.parallel.world.is_rank_zero:  # what was not removed because the process was killed before
            prune_checkpoints(self.out, state, self.plan.train.keep)
        self.parallel.world.barrier()

    def apply(self, state: TrainingState) -> None:
        """Continue from what a checkpoint holds."""
        self.module.load_state_dict(state.model)
        load_optimizer_state(self.optimizer, self.module, state.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        if self.ema is not None:
            self.ema.load_state(state.average)
        self.objective.load_state(state.objective)
        if state.window is not None:
            self.recorder.window = state.window.to(self.plan.device).view_as(self.recorder.window)
        for name in _CARRIED:
            setattr(self, name, getattr(state, name))
        self.recorder.loss, self.recorder.earlier_seconds = state.loss, state.seconds
        self.recorder.course = state.course
        set_random_state(state.random, self.plan.device)

    def save(self) -> None:
        """Write a checkpoint of the state after `self.step` steps."""
        self.check_weights()
        if (reason := self.divergence()) is None:
            self.good_step = self.step
        else:
            logger.warning("Step %d: %s so far.", self.step, reason.replace("ended", "is"))
        state = TrainingState(
            **{name: getattr(self, name) for name in _CARRIED},
            settings=dict(self.plan.settings),
            model=self.module.state_dict(),
            optimizer=optimizer_state(self.optimizer, self.module),
            scaler=self.scaler.state_dict(),
            objective=self.objective.state(),
            window=self.recorder.window,
            loss=self.recorder.loss,
            course=self.recorder.course,
            seconds=self.recorder.seconds,
            average=self.ema.state() if self.ema is not None else {},
            random=random_state(self.plan.device),
        )
        self.parallel.save(self.out, state, self.plan.train.keep)

    def check_weights(self) -> None:
        """Refuse to save weights that are not finite (MvarError): a step of finite gradients can lead there."""
        weights = {**dict(self.module.named_parameters()), **(self.ema.state() if self.ema is not None else {})}
        wrong = [name for name, weight in weights.items() if not local_tensor(weight.detach()).isfinite().all()]
        if self.parallel.world.any_rank(bool(wrong)):
            raise MvarError(
                f"After step {self.step} weights are not finite ({', '.join(wrong[:3]) or 'in another process'})."
                f" They are not saved; {self.last_checkpoint()}.",
                f"Start over with a lower learning rate ({self.section}.optimizer.lr) and --overwrite.",
            )

    def last_checkpoint(self) -> str:
        """The last checkpoint, in words."""
        path = latest_checkpoint(self.out)
        return "there is no checkpoint yet" if path is None else f"the last checkpoint is {path}"

    def take_steps(self) -> bool:
        """The steps that are left, with checkpoints; returns whether an interruption ended them early."""
        # On a CPU the model already uses every core: a thread that reads would only stand in its way.
        on_cpu, total = self.plan.device.type == "cpu", self.plan.total_steps
        self.recorder.restart_clock()
        with (
            keeping_all_freed_memory() if on_cpu else nullcontext(),
            interrupt_flag() as flag,
            closing(prefetch(self.fetch, self.step, total, 0 if on_cpu else 2)) as batches,
        ):
            for batch in batches:
                self.take_step(batch, flag)
                interrupted = self.parallel.world.any_rank(flag.is_set()) and self.step < total
                if interrupted or self.due(self.plan.train.checkpoint_every):
                    self.save()
                if interrupted:
                    return True
        return False

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.plan.total_steps)

    def take_step(self, batch: Any, flag: Event) -> None:
        """One step, and everything that is measured, written and shown of it."""
        recorder, train = self.recorder, self.plan.train
        result = self.take(batch, self.step)
        if result.values is None:
            self.check_skipped(result)
        self.step += 1
        if self.ema is not None and result.values is not None:
            self.ema.update(self.step - self.skipped - 1)
        recorder.add(result.values)
        loss = math.nan if result.values is None else result.loss
        report = StepReport(self.step, self.plan.total_steps, loss, recorder.images_per_second, self.skipped)
        if due := self.due(train.log_every):
            recorder.write_training(self.step, result, self.skipped)
        if self.due(train.checkpoint_every):
            self.validate()
        if self.due(train.sample_every) and self.on_sample is not None:
            with self.measuring():
                image = self.on_sample(self.step)
            if image is not None:
                for tracker in recorder.trackers:
                    tracker.picture(self.step, image)
        if due:
            recorder.restart_clock()
        if self.on_step is not None:
            try:
                self.on_step(report)
            except KeyboardInterrupt:
                flag.set()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While entered, the module is what its model directory would be: in evaluation mode, with averaged weights."""
        self.module.eval()
        try:
            averaged = self.ema.in_place() if self.ema is not None else nullcontext()
            with torch.no_grad(), averaged, uncompiled(self.module):
                yield
        finally:
            self.module.train()

    def validate(self) -> None:
        """Measure on held-out data, write the line, and remember the best."""
        with self.measuring():
            measures, score = self.objective.validate()
        if measures:
            self.recorder.write({"step": self.step, **measures})
        if score < self.best_score:
            self.best_step, self.best_score = self.step, score

    def rows(self, step: int) -> Any:
        """The rows of the data that a step trains on, over all processes."""
        return batch_rows(step, self.plan.train.batch_size, self.objective.num_rows, self.plan.seed)

    def fetch(self, step: int) -> Any:
        """This process's share of a step's batch."""
        part = self.parallel.part(self.plan.train.batch_size)
        return self.objective.fetch(self.rows(step)[part.start : part.stop], step)

    def take(self, batch: Any, step: int) -> StepResult:
        """Change the model by the step after `step` others; where loss or gradient is not finite, change nothing."""
        plan = self.plan
        rate = learning_rate(step, plan.total_steps, plan.train.batch_size, plan.train.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        values = self.parallel.world.all_reduce_sum(self.accumulate_gradients(batch, step))
        self.scaler.unscale_(self.optimizer)
        norm = self.parallel.clip(self.parameters, plan.train.optimizer.grad_clip)
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
            return StepResult(loss_value, norm_value, rate, None, overflow)
        self.skipped_in_a_row = 0
        self.objective.after_step(batch, step, self.optimizer)
        return StepResult(loss_value, norm_value, rate, values)

    def accumulate_gradients(self, batch: Any, step: int) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters, micro-batch by micro-batch.

        Returns this process's share of the loss and of the objective's values; the sum over all processes is the mean.
        """
        plan, own = self.plan, self.parallel.part(self.plan.train.batch_size)
        total: Tensor | None = None
        size = plan.train.micro_batch or math.ceil(own.rows / plan.train.accumulate)
        for part in own.split(size):
            with self.parallel.accumulating(self.model, last=part.stop == own.stop):
                rows = take_rows(batch, part.start - own.start, part.stop - own.start)
                with torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
                    loss, values = self.objective.loss(self.model, rows, step, part)
                share = part.rows / part.total
                # Gradients of several processes are averaged, not added, when they are exchanged.
                self.scaler.scale(loss * (share * self.parallel.world.world_size)).backward()
            shared = torch.cat([loss.detach().float().view(1), values.detach().float()]) * share
            total = shared if total is None else total + shared
        assert total is not None
        return total

    def check_skipped(self, result: StepResult) -> None:
        """Report a step that was left out; too many in a row raise MvarError."""
        number, rows = self.step + 1, self.rows(self.step)
        found = f"loss {result.loss}, gradient norm {result.grad_norm}"
        if not result.overflow:
            line = {"step": number, "loss": result.loss, "grad_norm": result.grad_norm, "rows": rows.tolist()}
            self.recorder.append(SKIPPED, line)
            logger.warning("Step %d was left out: %s.", number, found)
        if self.skipped_in_a_row >= (MAX_OVERFLOWS_IN_A_ROW if result.overflow else self.plan.train.max_skipped):
            shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
            raise MvarError(
                f"{self.skipped_in_a_row} steps in a row were not finite; the last was step {number} ({found}) on"
                f" rows {shown}. {self.out / SKIPPED} lists them all; {self.last_checkpoint()}.",
                f"Start over with a lower learning rate ({self.section}.optimizer.lr) and --overwrite, or resume with"
                " --dtype float32.",
            )


def take_rows(batch: Any, start: int, stop: int) -> Any:
    """Some rows of a batch: of a tensor, or of each tensor in a tuple."""
    if isinstance(batch, Tensor):
        return batch if (start, stop) == (0, len(batch)) else batch[start:stop]
    return tuple(take_rows(tensor, start, stop) for tensor in batch)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: 0.1 s and 10 MB at 2.56 M rows.

    A Feistel network needs no memory, but takes more time over the epoch, for an order that is less random.
    """
    permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    permutation = permutation.astype(np.min_scalar_type(count - 1))
    permutation.flags.writeable = False  # it is shared through the cache
    return permutation


def batch_rows(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Rows (batch_size,) int64 of the step that follows `step` others, out of `count`; DataError where there are none.

    Each epoch is a fresh permutation, which depends on (seed, epoch) alone. A batch at the end of an epoch continues
    into the next, so that every row is seen equally often.
    """
    if count < 1:
        raise DataError("There is nothing to train on: the data holds no images.", "Check --data or --tokens.")
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, count)
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _permutation(count, seed, int(epoch))[places[chosen]]
    return rows


def planned_steps(config: TrainConfig, rows: int) -> int:
    """How many optimizer steps a run takes: `steps` where given, else `epochs` passes over `rows`."""
    if config.steps is not None:
        return config.steps
    if config.epochs is None:
        raise ConfigError("Neither train.steps nor train.epochs is set.", "Add --steps or --epochs.")
    return max(1, math.ceil(config.epochs * rows / config.batch_size))


def prefetch(fetch: Callable[[int], Fetched], start: int, stop: int, ahead: int = 2) -> Generator[Fetched, None, None]:
    """Results of `fetch(start)` … `fetch(stop - 1)` in order, read by one thread while the caller computes.

    One thread, because sources of images need not be safe to read from several. `ahead` steps are read ahead; 0 reads
    in the caller's thread.
    """
    if ahead == 0:
        yield from map(fetch, range(start, stop))
        return
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mvar-batches")
    try:
        waiting: list[Future[Fetched]] = []
        for step in range(start, stop):
            waiting.append(executor.submit(fetch, step))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
