"""The state of a training run, from which the run resumes as if it had not stopped.

A checkpoint is one file. Of a sharded model it is a directory into which every process writes its shards, in
torch.distributed.checkpoint's format, and which any number of processes reads; what is not sharded is in its state.pt.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from mvar_core.distributed import World, world
from mvar_core.errors import CheckpointError, MvarError, one_line
from mvar_core.io.files import atomic_path, naming, remove_leftovers, sha256_of_file, sync_directory
from mvar_core.io.resumable import differences
from mvar_core.io.weights import load_torch_file

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BEST = "best"
"""Name of the model directory inside a run directory that holds the weights of the best validation."""
CHECKPOINTS = "checkpoints"
"""The folder of a run directory where checkpoints are."""
SHARDED = ".sharded"
"""How the names of sharded checkpoints, which are directories, end."""
_FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})(\.pt|\.sharded)")
_REST = "state.pt"
_METADATA = ".metadata"
_INDEX_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile)
"""What reading a damaged file raises."""


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """What to raise for a checkpoint that cannot be read."""
    return CheckpointError(
        f"{path} cannot be read as a training checkpoint: {one_line(error)}",
        "Delete it to resume from the one before, or start over with --overwrite.",
    )


@dataclass(config=ConfigDict(arbitrary_types_allowed=True, strict=True))
class TrainingState:
    """Everything that a resumed run needs, after `step` steps, and that does not follow from (seed, step).

    `settings` are what the run was asked to do: nested mappings of plain values, compared when resuming. `optimizer` is
    its state of each parameter, by name; `scaler` the state dict of the fp16 gradient scaler; `objective` further
    tensors that the objective carries along; `average` the EMA, and `random` the state of the global generators.
    `window`, `loss`, `seconds` and `course` are the recorder's. `best_score` is that of the best validation so far, at
    `best_step`; lower is better. `good_step` is the last checkpoint at which the run had not diverged.
    """

    step: Annotated[int, Field(ge=0, le=10**12)]
    settings: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Tensor] = field(default_factory=dict)
    window: Tensor | None = None
    loss: float = float("nan")
    skipped: int = 0
    seconds: float = 0.0
    average: dict[str, Tensor] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_score: float = float("inf")
    course: tuple[float, ...] = ()
    good_step: int | None = None


def checkpoints(out: Path) -> list[Path]:
    """Training checkpoints of a run directory, oldest first; of two of the same step the one written last."""
    found = [path for path in (out / CHECKPOINTS).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime, path))


def latest_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a run in `out` resumes from, or None."""
    found = checkpoints(out)
    return found[-1] if found else None


def remove_checkpoints(out: Path) -> None:
    """Forget the checkpoints of a run directory, and the model made of the best one, to start over."""
    for path in checkpoints(out):
        _remove(path)
    shutil.rmtree(out / BEST, ignore_errors=True)


def best_weights(out: Path, step: int) -> dict[str, Tensor]:
    """The weights that the model has at a checkpoint: the averaged ones, where the run averages."""
    path = next((path for path in reversed(checkpoints(out)) if _step(path) == step), checkpoint_path(out, step))
    state = load_checkpoint(path)
    return state.model | state.average


def checkpoint_path(out: Path, step: int, ending: str = ".pt") -> Path:
    """Where the checkpoint of a step is."""
    return out / CHECKPOINTS / f"step-{step:08d}{ending}"


def _content(state: TrainingState) -> dict[str, Any]:
    # Settings are stored as JSON, and compared as such: tuples are lists there.
    return {**vars(state), "format": _FORMAT, "settings": json.dumps(state.settings, sort_keys=True)}


def save_checkpoint(out: Path, state: TrainingState, keep: int = 2) -> Path:
    """Write `out`/checkpoints/step-NNNNNNNN.pt whole or not at all; it is on the disk when this returns.

    The last `keep` checkpoints stay, that of the best validation, and the last one before a divergence.
    """
    path = checkpoint_path(out, state.step)
    with atomic_path(path, durable=True) as temporary:
        torch.save(_content(state), temporary)
    prune_checkpoints(out, state, keep)
    return path


def prune_checkpoints(out: Path, state: TrainingState, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and those that the state names, and what killed writers left."""
    newest = {_step(path): path for path in checkpoints(out)}
    named = (*list(newest)[-keep:], state.best_step, state.good_step)
    kept = [path for step, path in newest.items() if step in named]
    for old in checkpoints(out):
        if old not in kept:
            _remove(old)
    remove_leftovers(out / CHECKPOINTS)


def load_checkpoint(path: Path, mesh: DeviceMesh | None = None) -> TrainingState:
    """Read a checkpoint to the CPU; what is missing, damaged, holds code, or is no checkpoint raises CheckpointError.

    Of one that was sharded, each of the processes of `mesh` reads a shard; they call this together.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    try:
        content = _load_shards(path, mesh) if path.is_dir() else _load_checked(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            found = f"format {content.get('format')!r}" if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(
                f"{path} is not a training checkpoint of this version (found {found}, expected format {_FORMAT}).",
                "Start over with --overwrite or another --out.",
            )
        values = {name: content[name] for name in TrainingState.__dataclass_fields__ if name in content}
        return TrainingState(**{**values, "settings": json.loads(content["settings"])})
    except ValidationError as report:
        first = report.errors()[0]
        raise damaged(path, ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from None
    except (*UNREADABLE, LookupError, TypeError) as error:
        raise damaged(path, error) from None


def _load_checked(path: Path) -> Any:
    """What torch saved, with the checksums that it writes compared."""
    try:
        return load_torch_file(path, mapped=False)
    except MvarError as error:
        raise ValueError(error.message) from None


def check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume a run that was asked to do something else; names what differs (CheckpointError)."""
    if differing := differences(found, wanted, describe="{} (checkpoint {}, now {})".format):
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {differing}.",
            "Use those settings to resume it, choose another --out, or add --overwrite to start over.",
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-").partition(".")[0])


def _remove(path: Path) -> None:
    if path.is_dir():
        # Renamed first: what is half removed must not be resumed from.
        shutil.rmtree(path.replace(path.with_name(f".{path.name}.tmp")), ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_shards(out: Path, state: TrainingState, keep: int, world: World) -> None:
    """`save_checkpoint` of a sharded model, as a directory; all processes call this together."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = checkpoint_path(out, state.step, SHARDED)
    sharded, rest, places = _separated(_content(state))
    temporary = path.with_name(f".{path.name}.tmp")
    if world.is_rank_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        with naming(path):
            temporary.mkdir(parents=True)
    world.barrier()
    with naming(path):
        save(sharded, storage_writer=FileSystemWriter(temporary))  # returns when all have written
    own = {file.name: sha256_of_file(file) for file in temporary.glob(f"__{world.rank}_*")}
    hashes = dict(item for part in world.all_gather_object(own) for item in part.items())
    if world.is_rank_zero:
        with atomic_path(temporary / _REST, durable=True) as file:
            torch.save({"rest": rest, "places": places, "hashes": hashes}, file)
        sync_directory(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        sync_directory(path.parent)
        prune_checkpoints(out, state, keep)
    world.barrier()


def _load_shards(path: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """What a directory that any number of processes wrote holds; without `mesh`, tensors are whole and on the CPU."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        kept = _load_checked(path / _REST)
        content, places = kept["rest"], kept["places"]
        hashes = kept.get("hashes", {})
        here = World() if mesh is None else world()
        wrong = [name for name in here.share(sorted(hashes)) if sha256_of_file(path / name) != hashes[name]]
        if here.any_rank(bool(wrong)):
            raise ValueError(f"{', '.join(wrong) or 'a file'} has changed since it was written")
        with (path / _METADATA).open("rb") as file:  # torch would run any code that it names
            metadata = IndexUnpickler(file).load()
        if any("/" in entry.relative_path for entry in metadata.storage_data.values()):
            raise ValueError("its index names files elsewhere")
        reader = FileSystemReader(path)
        metadata.storage_meta.load_id = reader.load_id
        vars(reader)["read_metadata"] = lambda *_, **__: metadata
        described = metadata.state_dict_metadata
        tensors = {key: _empty(described[key].size, described[key].properties.dtype, mesh) for key in places}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it says that it reads alone
            load(tensors, storage_reader=reader, no_dist=mesh is None)
    except CheckpointException as error:
        raise ValueError(one_line(error)) from None
    for key, tensor in tensors.items():
        target = content
        *parents, name = places[key]
        for parent in parents:
            target = target[parent]
        target[name] = tensor
    return dict(content)


def _separated(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[str | int]]]:
    """The sharded tensors by name, everything else as it was nested, and where the tensors belong in it."""
    from torch.distributed.tensor import DTensor

    sharded: dict[str, Tensor] = {}
    places: dict[str, list[str | int]] = {}

    def walk(value: Any, place: list[str | int]) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for name, inner in value.items():
            if isinstance(inner, DTensor):
                key = "/".join(map(str, [*place, name]))
                sharded[key], places[key] = inner, [*place, name]
            else:
                kept[name] = walk(inner, [*place, name])
        return kept

    return sharded, walk(content, []), places


def _empty(size: Any, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(size, dtype=dtype)
    from torch.distributed.tensor import Shard, empty

    return empty(*size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


class IndexUnpickler(pickle.Unpickler):
    """Accepts the plain classes that an index consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the index means; UnpicklingError where it does not belong in a checkpoint."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 write the member of an enumeration
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which does not belong in a checkpoint")


def _enum_member(kind: Any, name: str) -> Enum:
    """A member of an enumeration, instead of getattr, which would reach anything."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"its index asks {kind!r} for {name!r}, which does not belong in a checkpoint")


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of torch, numpy and Python, which a user's data source or callback may use."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the generators; those that the state does not hold, or this machine does not have, stay as they are."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
