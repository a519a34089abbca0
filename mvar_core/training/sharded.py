"""Checkpoints of sliced models: a directory into which every process writes its slices, and that any number reads.

The slices are in torch.distributed.checkpoint's format; what is not sliced lies beside them in state.pt.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvar_core.errors import CheckpointError
from mvar_core.io.files import atomic_path, sync_directory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from mvar_core.training.strategy import Strategy

SHARDED = ".sharded"
"""How the names of such directories end."""
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


UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError)
"""What reading a damaged file raises."""


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """What to raise for a checkpoint that cannot be read."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"{path} cannot be read as a training checkpoint: {reason[0]}",
        "Delete it to resume from the one before, or start anew with --overwrite.",
    )


def save_shards(path: Path, content: Mapping[str, Any], strategy: Strategy) -> None:
    """Write `path` whole or not at all; all processes call this together.

    Args:
        path: The directory.
        content: Nested mappings; tensors that are sliced are written slice by slice.
        strategy: Connects the processes.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    sliced, rest, places = _part(content)
    temporary = path.with_name(f".{path.name}.tmp")
    if strategy.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    strategy.wait()
    save(sliced, storage_writer=FileSystemWriter(temporary))  # returns when all have written
    if strategy.first:
        with atomic_path(temporary / _REST, durable=True) as file:
            torch.save({"rest": rest, "places": places}, file)
        sync_directory(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        sync_directory(path.parent)
    strategy.wait()


def load_shards(path: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Read a directory that any number of processes wrote.

    Args:
        path: The directory.
        mesh: Processes that each take a slice, and call this together; without it, tensors are whole and on the CPU.

    Raises:
        CheckpointError: The directory is damaged, or holds code.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        kept = torch.load(path / _REST, map_location="cpu", weights_only=True)
        content, places = kept["rest"], kept["places"]
        reader = _reader(path)
        described = reader.read_metadata().state_dict_metadata
        tensors = {key: _empty(described[key].size, described[key].properties.dtype, mesh) for key in places}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it says that it reads alone
            load(tensors, storage_reader=reader, no_dist=mesh is None)
    except (*UNREADABLE, KeyError, TypeError, CheckpointException) as error:
        raise damaged(path, error) from None
    for key, tensor in tensors.items():
        target = content
        *parents, name = places[key]
        for parent in parents:
            target = target[parent]
        target[name] = tensor
    return dict(content)


def _part(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, list[str | int]]]:
    """The sliced tensors by a name for each, everything else as it was nested, and where the tensors belong in it."""
    from torch.distributed.tensor import DTensor

    sliced: dict[str, Tensor] = {}
    places: dict[str, list[str | int]] = {}

    def walk(value: Any, place: list[str | int]) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for name, inner in value.items():
            if isinstance(inner, DTensor):
                key = "/".join(map(str, [*place, name]))
                sliced[key], places[key] = inner, [*place, name]
            else:
                kept[name] = walk(inner, [*place, name])
        return kept

    return sliced, walk(content, []), places


def _empty(size: Any, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(size, dtype=dtype)
    from torch.distributed.tensor import Shard, empty

    return empty(*size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def _reader(path: Path) -> Any:
    """Torch's reader of such directories, but for the index: torch would run whatever code the index names."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / _METADATA).open("rb") as file:
                metadata = IndexUnpickler(file).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


class IndexUnpickler(pickle.Unpickler):
    """Takes the plain classes that an index consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the index stands for.

        Raises:
            UnpicklingError: It is no part of a checkpoint.
        """
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python 3.11.0 to 3.11.3 write the member of an enumeration
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which is no part of a checkpoint")


def _member(kind: Any, name: str) -> Enum:
    """A member of an enumeration, in the place of getattr, which would reach anything."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"its index asks {kind!r} for {name!r}, which is no part of a checkpoint")
