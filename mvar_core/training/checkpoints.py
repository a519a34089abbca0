"""The state of a training run, from which the run goes on as if it had not stopped.

It is one file; of a sliced model it is a directory (mvar_core.training.sharded).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvar_core.errors import CheckpointError
from mvar_core.io.files import atomic_path
from mvar_core.io.resumable import flattened
from mvar_core.training.sharded import UNREADABLE, damaged, load_shards

BEST = "best"
"""Name of the model directory inside a run directory that holds the weights of the best validation."""
_FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})(\.pt|\.sharded)")


@dataclass
class TrainingState:
    """Everything that a resumed run needs and that does not follow from (seed, step).

    Attributes:
        step: Steps done.
        settings: What the run was asked to do: nested mappings of plain values; compared when resuming.
        model: State dict of what is trained.
        optimizer: The optimizer's moments of each parameter, by its name.
        scaler: State dict of the fp16 gradient scaler; empty without one.
        objective: Further tensors that the objective carries from step to step.
        window: Sums of the measures since the last line of metrics.jsonl, and how many steps each sums.
        loss: Training loss, averaged over the last finished line.
        skipped: Steps left out so far because their loss or gradient was not finite.
        seconds: Time spent so far, over all sessions of the run.
        average: Exponential average of the weights, where there is one.
        random: State of the global random number generators.
        skipped_in_a_row: Steps left out just before this one.
        best_step: The step of the best validation so far; None without any.
        best_score: Its score, lower is better.
    """

    step: int
    settings: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, torch.Tensor] = field(default_factory=dict)
    window: torch.Tensor | None = None
    loss: float = float("nan")
    skipped: int = 0
    seconds: float = 0.0
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_score: float = float("inf")


def checkpoints(out: Path) -> list[Path]:
    """Training checkpoints of a run directory, oldest first; of two of the same step the one written last."""
    found = [
        (int(match[1]), path.stat().st_mtime, path)
        for path in (out / "checkpoints").glob("step-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def latest_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a run in `out` resumes from, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def remove_checkpoints(out: Path) -> None:
    """Forget the checkpoints of a run directory, and the model made of the best one, to start it anew."""
    for path in checkpoints(out):
        _remove(path)
    shutil.rmtree(out / BEST, ignore_errors=True)


def best_weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights that the model has at a checkpoint: the averaged ones, where the run averages."""
    path = next((path for path in reversed(checkpoints(out)) if _step(path) == step), checkpoint_path(out, step))
    state = load_checkpoint(path)
    return {**state.model, **state.average}


def checkpoint_path(out: Path, step: int, ending: str = ".pt") -> Path:
    """Where the checkpoint of a step lies."""
    return out / "checkpoints" / f"step-{step:08d}{ending}"


def state_content(state: TrainingState) -> dict[str, Any]:
    """What a checkpoint holds of a state."""
    content = {name: getattr(state, name) for name in state.__dataclass_fields__}
    # Settings travel as JSON: they are compared as text is, without tuples turning into lists.
    content.update(format=_FORMAT, settings=json.dumps(state.settings, sort_keys=True))
    return content


def save_checkpoint(out: Path, state: TrainingState, keep: int = 2) -> Path:
    """Write `out`/checkpoints/step-NNNNNNNN.pt whole or not at all; of the older ones some are kept.

    Args:
        out: The run directory.
        state: What to write. It is on the disk, not only on its way there, when this returns.
        keep: How many of the last checkpoints stay. That of the best validation stays too.
    """
    path = checkpoint_path(out, state.step)
    with atomic_path(path, durable=True) as temporary:
        torch.save(state_content(state), temporary)
    prune_checkpoints(out, state.best_step, keep)
    return path


def prune_checkpoints(out: Path, best_step: int | None, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and that of the best validation, and what killed writers left."""
    steps = sorted({_step(path) for path in checkpoints(out)})
    kept = {*steps[-keep:], best_step}
    newest = {_step(path): path for path in checkpoints(out)}
    for old in checkpoints(out):
        if _step(old) not in kept or old != newest[_step(old)]:
            _remove(old)
    for leftover in (out / "checkpoints").glob(".step-*.tmp"):
        _remove(leftover)


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint of any kind to the CPU; only tensors and plain values are unpickled, never code.

    Raises:
        CheckpointError: The file is missing, damaged, holds code, or is not a training checkpoint.
    """
    if path.is_dir():
        return state_of_content(path, load_shards(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except UNREADABLE as error:
        raise damaged(path, error) from None
    return state_of_content(path, content)


def state_of_content(path: Path, content: Any) -> TrainingState:
    """The state that a checkpoint holds.

    Raises:
        CheckpointError: It was written by another version, or is something else.
    """
    fields = TrainingState.__dataclass_fields__
    needed = {name for name, entry in fields.items() if entry.default is MISSING and entry.default_factory is MISSING}
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not needed <= content.keys():
        found = f"format {content.get('format')!r}" if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is not a training checkpoint of this version (found {found}, expected format {_FORMAT}).",
            "Start anew with --overwrite or another --out.",
        )
    values = {name: content[name] for name in fields if name in content}
    values["settings"] = json.loads(content["settings"])
    return TrainingState(**values)


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run that was asked to do something else.

    Raises:
        CheckpointError: Some settings differ; names them with both values.
    """
    before, now = flattened(found), flattened(json.loads(json.dumps(wanted)))
    absent = "absent"
    differing = [
        f"{key} (checkpoint {before.get(key, absent)}, now {now.get(key, absent)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, absent) != now.get(key, absent)
    ]
    if differing:
        shown = ", ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {shown}.",
            "Go back to those settings to resume it, or choose another --out, or start anew with --overwrite.",
        )


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _remove(path: Path) -> None:
    if path.is_dir():
        # Under a name that is no checkpoint's first: what is half removed must not be resumed from.
        gone = path if path.name.startswith(".") else path.replace(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
