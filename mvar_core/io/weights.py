"""Weights that come from outside, as files of tensors: the one place that opens them.

Nothing in a file is run, memory is bounded by the file's size, and what is no weight of a network (whole numbers,
complex or infinite values, sparse or quantized tensors) is refused by its name.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError, one_line
from mvar_core.io.files import sha256_of_file
from mvar_core.untrusted import open_regular

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights, by their names in safetensors files."""

_EXPANDING = {"bytearray", "encode", "Counter"}
"""What torch's restricted unpickler would call although the result can be far larger than the file."""


def read_weights(path: Path, buffers: Callable[[str], bool] = lambda _: False) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing but tensors by name: .safetensors, or .pth, new or legacy.

    Raises:
        CheckpointError: As `load_torch_file` and `state_dict_in`, or values that are not finite.
    """
    if is_safetensors(path):
        return dict(tensors_of(path, shapes_of(path)))
    state = state_dict_in(load_torch_file(path), path, buffers)
    return {name: value if buffers(name) else check_finite(value, name, path) for name, value in state.items()}


def load_torch_file(path: Path, *, mapped: bool = True, checksums: bool = True) -> Any:
    """The content of a .pth file, new or legacy: tensors in containers, nothing that would run code.

    Args:
        path: The file.
        mapped: Map the file into memory rather than read it, where its format (torch 1.6 and later) allows that.
        checksums: Read the file whole and compare the checksums in it, which torch writes and never checks.

    Raises:
        CheckpointError: The file is missing, damaged, or holds code.
    """
    try:
        with open_regular(path, CheckpointError) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            called = _called_in_zip(file, path, checksums) if is_zip else _called(file, pickles=5)
        if not called & _EXPANDING:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        pass
    except Exception as error:  # of any kind: torch reads damaged files without checking them
        raise CheckpointError(
            f"{path} is not a whole torch checkpoint: {one_line(error)[:200]}.", "Download or copy it again."
        ) from None
    raise CheckpointError(
        f"{path} is refused: it holds Python objects that would run code when loaded; expected tensors alone.",
        "If you trust its source, save its state dict again with torch.save(state_dict, path).",
    )


def _called_in_zip(file: IO[bytes], path: Path, checksums: bool) -> set[str]:
    """What the pickle of a new file calls; its records must be as large as they are in the file, not compressed."""
    with ZipFile(file) as archive:
        records = archive.infolist()
        stored = sum(record.file_size for record in records if record.compress_type == ZIP_STORED)
        if stored > path.stat().st_size or any(record.compress_type != ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if checksums and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        (content,) = (record for record in records if record.filename.endswith("/data.pkl"))
        return _called(archive.open(content), pickles=1)


def _called(file: Any, pickles: int) -> set[str]:
    """Names, without modules, of what some pickles call, one after the other; nothing is called."""
    operations = (operation for _ in range(pickles) for operation in pickletools.genops(file))
    return {str(argument).split()[-1] for opcode, argument, _ in operations if opcode.name == "GLOBAL"}


def state_dict_in(content: Any, path: Path, buffers: Callable[[str], bool] = lambda _: False) -> dict[str, Tensor]:
    """What a file holds, if that is weights by name; `buffers` says which names are not weights and may be anything.

    Raises:
        CheckpointError: It is something else, or a tensor is not made of real floating-point numbers that are in the
            file. Whether they are finite is left to `check_finite`, which reads them.
    """
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict; expected tensors by name.")
    state = {str(name): tensor for name, tensor in content.items()}
    weights = {name: tensor for name, tensor in state.items() if not buffers(name)}
    for name, tensor in weights.items():
        if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, "without values": tensor.is_meta}
            found = next((kind for kind, is_so in kinds.items() if is_so), str(tensor.layout).removeprefix("torch."))
            raise CheckpointError(f"{path}: {name} is {found}; expected a dense tensor.", _SAVE_AS_FLOATS)
        if tensor.dtype not in DTYPES.values():
            raise _wrong_dtype(path, name, tensor.dtype)
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > path.stat().st_size:
        raise CheckpointError(
            f"{path} has tensors of more values than the file holds.", "Save a contiguous copy of each tensor."
        )
    return state


def check_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor; CheckpointError where it holds a value that is nan or infinite."""
    if tensor.numel() and not all(math.isfinite(value) for value in tensor.aminmax()):
        count = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{path}: {name} holds {count} values that are not finite (nan or inf).",
            "The training that wrote it may have diverged: use an earlier checkpoint.",
        )
    return tensor


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON object, and its brace."""
    with open_regular(path, CheckpointError) as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file, mapped into memory.

    Raises:
        CheckpointError: It is missing, cut short, or not such a file.
    """
    open_regular(path, CheckpointError).close()
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {one_line(error)[:200]}.", "Download or copy it again."
        ) from None


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by name, read from its header alone.

    Raises:
        CheckpointError: As `open_safetensors`, or a tensor that is not of real floating-point numbers.
    """
    shapes = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise _wrong_dtype(path, name, header.get_dtype())
            shapes[name] = tuple(header.get_shape())
    return shapes


def tensors_of(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, mapped into memory, each checked by `check_finite`."""
    for name in names:
        # Opened again for each tensor: what is converted would stay resident for as long as the file is mapped.
        with open_safetensors(path) as file:
            yield name, check_finite(file.get_tensor(name), name, path)


_SAVE_AS_FLOATS = "Weights are dense real numbers: save them as float32."


def _wrong_dtype(path: Path, name: str, found: object) -> CheckpointError:
    known = "float32, float64, float16 or bfloat16"
    return CheckpointError(
        f"{path}: {name} holds {str(found).removeprefix('torch.')} values; expected {known}.", _SAVE_AS_FLOATS
    )


@dataclass(frozen=True)
class WeightsFile:
    """A published file of a network that mvar measures with.

    Attributes:
        what: What it holds, as in "VGG16's weights".
        option: The command line's option that names it.
        variable: The environment variable that names it.
        names: Under which names it lies in torch's cache of downloads; new downloads have the first.
        url: Where it is published.
        sha256: Of the published file.
        otherwise: What can be done without it.
    """

    what: str
    option: str
    variable: str
    names: tuple[str, ...]
    url: str
    sha256: str
    otherwise: str = ""

    @property
    def cache(self) -> Path:
        """Torch's folder of downloads."""
        return Path(torch.hub.get_dir()) / "checkpoints"

    @property
    def how_to_get(self) -> str:
        """What to do where the file is missing."""
        return (
            f"Download {self.url} (SHA-256 {self.sha256}) to {self.cache / self.names[0]}, or name the file with"
            f" {self.option} or ${self.variable}{'; ' if self.otherwise else ''}{self.otherwise}."
        )

    def find(self, path: Path | str | None = None) -> Path:
        """The file on this machine: `path`, or the environment variable's, or one in torch's cache of downloads.

        A file that the user names may hold other weights than the published ones, one in the cache may not.

        Raises:
            DataError: No such file, or another one; says where to get it and where to put it.
        """
        named = str(path) if path is not None else os.environ.get(self.variable)
        if named:
            candidate = Path(named).expanduser()
            if not candidate.is_file():
                origin = self.option if path is not None else f"${self.variable}"
                raise DataError(f"{origin}: {candidate} does not exist.", self.how_to_get)
            return candidate
        cached = next((self.cache / name for name in self.names if (self.cache / name).is_file()), None)
        if cached is None:
            raise DataError(f"{self.what} ({self.names[0]}) are not on this machine.", self.how_to_get)
        if (found := sha256_of_file(cached)) != self.sha256:
            raise DataError(
                f"{cached} does not hold {self.what}: its SHA-256 is {found}, expected {self.sha256}.",
                f"Delete it. {self.how_to_get}",
            )
        return cached
