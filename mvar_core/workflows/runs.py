"""What every training shares: its result, options of Python calls, the run directory, first weights, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, RunConfig
from mvar_core.data.images import ImageSource, open_images
from mvar_core.data.sources import Subset
from mvar_core.distributed import World
from mvar_core.errors import DataError
from mvar_core.io.files import require_new_directory
from mvar_core.io.resumable import DirectoryLock
from mvar_core.progress import Progress
from mvar_core.results import DryRun, Result
from mvar_core.runtime import generator, peak_memory_bytes
from mvar_core.training.finetune import START_REPORT
from mvar_core.training.trainer import Outcome, StepReport

RUN_FILES = ("config.yaml", "checkpoints", "tokens", START_REPORT)
"""Any of these in a directory says that a run was begun there."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Result):
    """How a training ended.

    `loss` is averaged over the last line of metrics.jsonl; `model` is the run directory, which is also a model
    directory, without a transformer where a tokenizer was trained; `seconds` and throughput are over all sessions of
    the run. `interrupted` says that Ctrl-C or SIGTERM ended it early; the same call resumes it.
    """

    steps: int
    loss: float
    model: Path
    seconds: float
    images_per_second: float = 0.0
    peak_memory_bytes: int = 0
    interrupted: bool = False
    processes: int = 1


Trained = TypeVar("Trained", bound=TrainingResult)


def ended(outcome: Outcome, out: Path, batch_size: int, device: torch.device, processes: int) -> dict[str, Any]:
    """Fields of a `TrainingResult`."""
    return {
        "steps": outcome.steps,
        "loss": outcome.loss,
        "model": out,
        "seconds": outcome.seconds,
        "images_per_second": outcome.steps * batch_size / max(outcome.seconds, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(device),
        "interrupted": outcome.interrupted,
        "processes": processes,
    }


def planned(
    kind: type[Trained], config: RunConfig, machine: Machine, out: Path, total: int, plan: list[str], **facts: int
) -> Trained:
    """The result of a dry run: what would be done to train `total` steps."""
    dry_run = DryRun(
        configuration=config.model_dump(mode="json", exclude_none=True),
        steps=(*plan, f"write {out}"),
        cost=cost_of(config, machine),
        facts=facts,
    )
    return kind(steps=total, loss=float("nan"), model=out, seconds=0.0, dry_run=dry_run)


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainTokenizerOptions(TypedDict, total=False):
    """What all training functions accept; the last five are keys of the training section, by default the preset's."""

    preset: str | None
    settings: Sequence[str]
    seed: int | None
    resume: bool
    overwrite: bool
    dry_run: bool
    steps: int | None
    batch_size: int | None
    micro_batch: int | None
    ema: float | None
    checkpoint_every: int | None


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
class TrainOptions(TrainTokenizerOptions, total=False):
    """What `train` and `finetune_from_var` both accept, as `train` explains it."""

    tokens: Path | str | None
    data: Path | str | None
    tokenizer: Path | str | None
    validation: Path | str | None
    fsdp: bool
    epochs: float | None
    activation_checkpointing: bool | None


@contextmanager
def run_directory(out: Path, world: World, resume: bool, overwrite: bool) -> Iterator[bool]:
    """Keep a run directory for the processes of this job; whether the run resumes from what is there.

    DataError where something else is there, or a run that is neither resumed nor overwritten, or another job has it.
    """

    def check() -> None:
        run_exists = any((out / name).exists() for name in RUN_FILES)
        if overwrite or not (resume and run_exists):
            require_new_directory(out, overwrite)

    def acquire() -> None:
        check()  # before anything is written there
        lock.acquire()
        check()

    lock = DirectoryLock(out)
    try:
        world.run_on_rank_zero(acquire)
        yield not overwrite
    finally:
        lock.release()


def held_out(source: ImageSource) -> ImageSource | None:
    """The split test, or val, of a data set's split train, where it has one with the same classes."""
    if isinstance(source, Subset):
        return source.held_out
    if source.split != "train":
        return None
    for split in ("test", "val"):
        with suppress(DataError):
            found = open_images(source.name, split, source.max_pixels)
            if found.class_names == source.class_names:
                return found
    return None


def seeded(build: Callable[[], torch.nn.Module], *seed: int | str) -> Any:
    """A module whose first weights depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*seed).initial_seed())
        return build()


def step_progress(progress: Progress | None, stage: str) -> Callable[[StepReport], None] | None:
    """Reports training steps as one stage of `progress`; a KeyboardInterrupt from it ends a run as Ctrl-C does."""
    if progress is None:
        return None

    def report(step: StepReport) -> None:
        note = f"loss {step.loss:.4g}, {step.images_per_second:.3g} images/s"
        note += f", {step.skipped} skipped" if step.skipped else ""
        progress(stage, step.step, step.total_steps, unit="steps", note=note)

    return report
