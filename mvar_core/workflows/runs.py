"""What every training shares: the run directory, first weights, held-out images, progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch

from mvar_core.data.images import ImageSource, open_images, split_name
from mvar_core.errors import DataError
from mvar_core.io.files import require_new_directory
from mvar_core.progress import Progress
from mvar_core.runtime import generator
from mvar_core.training.finetune import START_REPORT
from mvar_core.training.objective import StepReport

RUN_FILES = ("config.yaml", "checkpoints", "tokens", START_REPORT)
"""Any of these in a directory says that a run was begun there."""


class LoopSettings(TypedDict, total=False):
    """Keys of the training section that the training functions accept by name; what is absent is the preset's."""

    steps: int | None
    epochs: float | None
    batch_size: int | None
    micro_batch: int | None
    ema: float | None
    checkpoint_every: int | None
    activation_checkpointing: bool | None


class TokenizerLoopSettings(TypedDict, total=False):
    """The same for tokenizers, which are trained for a number of steps."""

    steps: int | None
    batch_size: int | None
    micro_batch: int | None
    ema: float | None
    checkpoint_every: int | None


def prepare_run(out: Path, resume: bool, overwrite: bool) -> bool:
    """Whether a run in `out` resumes from what is there, after checking that it may.

    Raises:
        DataError: `out` holds something that is not a run, or a run that is neither resumed nor overwritten.
    """
    if overwrite:
        require_new_directory(out, overwrite=True)
        return False
    if resume and any((out / name).exists() for name in RUN_FILES):
        return True
    require_new_directory(out, overwrite=False)
    return True


def held_out(data: str) -> ImageSource | None:
    """The test images of a data set, where it has some of its own."""
    name, split = split_name(data)
    if split != "train":
        return None
    try:
        return open_images(name, "test")
    except DataError:
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
