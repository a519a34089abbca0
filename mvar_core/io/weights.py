"""Weights that come from outside, as files of tensors: the one place that opens them.

Nothing in a file is run, memory is bounded by the file's size, and what is no weight of a network (whole numbers,
complex or infinite values, sparse or quantized tensors) is refused by its name.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import math
import os
import pickle
import pickletools
import re
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError, one_line
from mvar_core.io.files import atomic_path, sha256_of_file
from mvar_core.untrusted import open_regular

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights, by their names in safetensors files."""

_EXPANDING = {"bytearray", "encode", "Counter"}
"""What torch's restricted unpickler would call although the result can be far larger than the file."""
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib{module}.{kind}Path") for module in ("", "._local") for kind in ("Posix", "Windows")),
]
"""What training scripts put next to weights, beyond what torch reads by itself; reading it runs nothing."""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components that wrappers for distribution, compiling and averaging put into the names of weights, in any place."""
MOST_TENSORS, DEEPEST = 1_000_000, 32
DOWNLOAD_BLOCK, DOWNLOAD_TIMEOUT_SECONDS = 1 << 18, 30
_AGAIN = "Download or copy it again."
_OTHER_FILES = (
    (rb"\Z", "is empty", _AGAIN),
    (
        rb"version https://git-lfs",
        "is a pointer of Git LFS, not the file that it stands for",
        "Fetch that with `git lfs pull` in its folder, or download it by itself.",
    ),
    (
        rb"\s*<(!doctype|html|head|body|\?xml|!--)",
        "is a web page, as a failed download leaves it",
        "Download the file itself: at huggingface.co its address has /resolve/, not /blob/.",
    ),
    (rb"\s*[{\[]\s*[\"\w{}\[\]-]", "is a JSON text", "Choose the file of weights that belongs to it."),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\(\xb5/\xfd|.{257}ustar", "is an archive", "Unpack it first."),
    (rb"\x93NUMPY", "is a numpy array", "Expected a state dict saved by torch or safetensors."),
    (rb"\x89HDF|GGUF|%PDF|\x89PNG|\xff\xd8\xff|GIF8|RIFF", "is a file of another kind", "Choose the file of weights."),
    (rb"[\t\n\r\x20-\x7e\x80-\xff]{2,}\Z", "is a text file", "Choose the file of weights."),
)
"""How files begin that are found in place of weights, what they are, and what to do."""


def read_weights(path: Path, buffers: Callable[[str], bool] = lambda _: False) -> dict[str, Tensor]:
    """The finite weights of a network, from a file that holds nothing else: .safetensors, or .pth, new or legacy."""
    return dict(finite(check_tensors(read_tensors(path), path, buffers).items(), path))


def read_tensors(path: Path, *, mapped: bool = True, checksums: bool = True) -> dict[str, Tensor]:
    """All tensors of a file by name; the names of nested mappings are joined with dots, those of `WRAPPERS` left out.

    What else is there is not read: texts, numbers, lists, and what optimizers keep by number. Arguments and errors as
    of `load_torch_file`; a file without tensors is one, too.
    """
    found: dict[str, Tensor] = {}
    passed = itertools.count()

    def walk(value: Any, name: tuple[str, ...], depth: int) -> None:
        if depth > DEEPEST or next(passed) > MOST_TENSORS:
            raise CheckpointError(f"{path} holds too many values, or nested too deep.", _SAVE_STATE_DICT)
        if isinstance(value, Tensor) and name:
            full = ".".join(part for part in name if part not in WRAPPERS)
            if full in found:
                raise CheckpointError(f"{path} holds {full} twice, once behind a wrapper's prefix.", _SAVE_STATE_DICT)
            found[full] = value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if isinstance(key, str):
                    walk(inner, (*name, *key.split(".")), depth + 1)

    if is_safetensors(path):
        with open_safetensors(path) as file:
            names = list(file.keys())
        walk({name: _tensor(path, name) for name in names}, (), 0)
    else:
        walk(load_torch_file(path, mapped=mapped, checksums=checksums), (), 0)
    if not found:
        raise CheckpointError(f"{path} holds no state dict; expected tensors by name.", _SAVE_STATE_DICT)
    return found


def load_torch_file(path: Path, *, mapped: bool = True, checksums: bool = True) -> Any:
    """The content of a .pth file, new or legacy: tensors in containers, nothing that would run code.

    `mapped` maps a new file into memory rather than read it; for `checksums`, which torch writes and never checks, it
    is read whole. CheckpointError where it is missing, damaged, of another kind, or holds code.
    """
    objects = ""
    try:
        with open_regular(path, CheckpointError) as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            called = _called_in_zip(file, path, checksums) if is_zip else _called(file, pickles=5)
        if not called & _EXPANDING:
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        objects = "".join(f" ({name})" for name in re.findall(r"GLOBAL ([\w.]{1,80})", str(error))[:1])
    except Exception as error:  # of any kind: torch reads damaged files without checking them
        raise _other_file(path) or CheckpointError(
            f"{path} is not a whole torch checkpoint: {one_line(error)[:200]}.", _AGAIN
        ) from None
    raise CheckpointError(
        f"{path} is refused: it holds Python objects{objects} that would run code when loaded; expected tensors alone.",
        "If you trust its source, save its state dict again with torch.save(state_dict, path).",
    )


def _other_file(path: Path) -> CheckpointError | None:
    """What a file is that is found in place of weights, and what to do; None where that cannot be told."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        hint = f"Name the file in it: {', '.join(files[:4])}." if files else "Name a file of weights."
        if (path / "config.json").is_file():
            hint = (
                "If it is a model directory, use it as it is, as in `mvar sample --checkpoint`: it needs no conversion."
            )
        return CheckpointError(f"{path} is a directory, not a file of weights.", hint)
    with open_regular(path, CheckpointError) as file:
        start = file.read(512)
        for pattern, what, hint in _OTHER_FILES:
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
                return CheckpointError(f"{path} {what}.", hint)
        try:
            names = ZipFile(file).namelist()
        except Exception:  # what a damaged archive raises is of many kinds
            return None
    shown = ", ".join(names[:3]) or "nothing"
    program = any(name.endswith("/constants.pkl") for name in names)
    if not program and any(name.endswith("/data.pkl") for name in names):
        return None
    return CheckpointError(
        f"{path} is {'a TorchScript program' if program else 'a zip archive'}, not a torch checkpoint; in it: {shown}.",
        _SAVE_STATE_DICT if program else "If the checkpoint is in it, unpack it first.",
    )


def _called_in_zip(file: IO[bytes], path: Path, checksums: bool) -> set[str]:
    """What the pickle of a new file calls; its records must be as large as they are in the file, not compressed."""
    with ZipFile(file) as archive:
        records = archive.infolist()
        (content,) = (record for record in records if record.filename.endswith("/data.pkl"))
        stored = sum(record.file_size for record in records if record.compress_type == ZIP_STORED)
        if stored > path.stat().st_size or any(record.compress_type != ZIP_STORED for record in records):
            raise ValueError("its records are compressed")
        if checksums and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of {damaged} is wrong")
        return _called(archive.open(content), pickles=1)


def _called(file: Any, pickles: int) -> set[str]:
    """Names, without modules, of what some pickles call, one after the other; nothing is called."""
    operations = (operation for _ in range(pickles) for operation in pickletools.genops(file))
    return {str(argument).split()[-1] for opcode, argument, _ in operations if opcode.name == "GLOBAL"}


def check_tensors(
    tensors: dict[str, Tensor], path: Path, buffers: Callable[[str], bool] = lambda _: False
) -> dict[str, Tensor]:
    """The tensors of a file, if they are weights; `buffers` says which names are not, and may be anything.

    CheckpointError where one is not made of real floating-point numbers that are in the file. Whether they are finite
    is left to `finite`, which reads them.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not buffers(name)}
    for name, tensor in weights.items():
        if not is_dense(tensor):
            kinds = {"nested": tensor.is_nested, "quantized": tensor.is_quantized, "without values": tensor.is_meta}
            found = next((kind for kind, is_so in kinds.items() if is_so), str(tensor.layout).removeprefix("torch."))
            raise CheckpointError(f"{path}: {name} is {found}; expected a dense tensor.", _SAVE_AS_FLOATS)
        if tensor.dtype not in DTYPES.values():
            raise _wrong_dtype(path, name, tensor.dtype)
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > path.stat().st_size:
        raise CheckpointError(
            f"{path} has tensors of more values than the file holds.", "Save a contiguous copy of each tensor."
        )
    return tensors


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read one by one, on this machine."""
    known = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return known and not (tensor.is_nested or tensor.is_quantized)


def finite(tensors: Iterable[tuple[str, Tensor]], path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors, as they come; after the last one a CheckpointError names those that held nan or infinity."""
    wrong = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            wrong.append(f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()})")
        yield name, tensor
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{path}: {', '.join(wrong[:4])}{more} hold values that are not finite (nan or infinite).",
            "The training that wrote it may have diverged: use an earlier checkpoint.",
        )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of a JSON object, and its brace."""
    if path.is_dir():
        raise _other_file(path) or CheckpointError(f"{path} is a directory.")
    with open_regular(path, CheckpointError) as file:
        start = file.read(9)
    return start[8:] == b"{" and b"\0" in start[:8]


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file, mapped into memory; CheckpointError where it is missing, cut short, or not such a file."""
    open_regular(path, CheckpointError).close()
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise (None if is_safetensors(path) else _other_file(path)) or CheckpointError(
            f"{path} is not a whole safetensors file: {one_line(error)[:200]}.", _AGAIN
        ) from None


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes by name in a safetensors file's header; CheckpointError for what are not floating-point numbers."""
    shapes = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise _wrong_dtype(path, name, header.get_dtype())
            shapes[name] = tuple(header.get_shape())
    return shapes


def tensors_of(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, mapped into memory, checked as by `finite`."""
    return finite(((name, _tensor(path, name)) for name in names), path)


def _tensor(path: Path, name: str) -> Tensor:
    # Opened again for each tensor: what is converted would stay resident for as long as the file is mapped.
    with open_safetensors(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


_SAVE_AS_FLOATS = "Weights are dense real numbers: save them as float32."
_SAVE_STATE_DICT = "Save a state dict, with torch.save(model.state_dict(), path), and use that."


def _wrong_dtype(path: Path, name: str, found: object) -> CheckpointError:
    known = "float32, float64, float16 or bfloat16"
    return CheckpointError(
        f"{path}: {name} holds {str(found).removeprefix('torch.')} values; expected {known}.", _SAVE_AS_FLOATS
    )


@dataclass(frozen=True)
class WeightsFile:
    """A published file of a network that mvar measures with.

    `option` of the command line or the environment variable name it; otherwise it has one of the `names` in torch's
    cache of downloads. An `exact` file may hold no other weights than the published ones; others may, where the user
    names them. `otherwise` says what can be done without it.
    """

    what: str
    option: str
    variable: str
    names: tuple[str, ...]
    url: str
    sha256: str
    size: int | None = None
    exact: bool = False
    otherwise: str = ""

    @property
    def cache(self) -> Path:
        """Torch's folder of downloads."""
        return Path(torch.hub.get_dir()) / "checkpoints"

    @property
    def how_to_get(self) -> str:
        """What to do where the file is missing."""
        size = "" if self.size is None else f"{self.size:,} bytes, "
        return (
            f"Download {self.url} ({size}SHA-256 {self.sha256}) to {self.cache / self.names[0]}, or name the file with"
            f" {self.option} or ${self.variable}{'; ' if self.otherwise else ''}{self.otherwise}."
        )

    def find(self, path: Path | str | None = None) -> Path:
        """The file on this machine; DataError, which says where to get it and where to put it, for none or others."""
        named = str(path) if path is not None else os.environ.get(self.variable)
        candidates = [Path(named).expanduser()] if named else [self.cache / name for name in self.names]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            origin = self.option if path is not None else f"${self.variable}"
            absent = f"{self.what} ({self.names[0]}) are not on this machine"
            raise DataError(f"{f'{origin}: {candidates[0]} does not exist' if named else absent}.", self.how_to_get)
        if (self.exact or not named) and (wrong := self.difference(found)):
            hint = f"Delete it or name another file. {self.how_to_get}"
            raise DataError(f"{found} does not hold {self.what}: {wrong}.", hint)
        return found

    def difference(self, path: Path) -> str | None:
        """How a file differs from the published one."""
        size = path.stat().st_size
        if self.size not in (None, size):
            return f"it has {size:,} bytes, expected {self.size:,}"
        found = sha256_of_file(path)
        return None if found == self.sha256 else f"its SHA-256 is {found}, expected {self.sha256}"

    def download(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Download the file, whose size is known, into torch's cache; `progress` gets the bytes so far and in all.

        It is checked before it gets its name. DataError, which says where to get it by hand, where the network or the
        disk failed or other bytes arrived.
        """
        assert self.size is not None
        target = self.cache / self.names[0]
        try:
            with atomic_path(target) as temporary:
                with (
                    urllib.request.urlopen(self.url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response,  # noqa: S310
                    temporary.open("wb") as file,
                ):
                    while file.tell() <= self.size and (block := response.read(DOWNLOAD_BLOCK)):
                        file.write(block)
                        if progress:
                            progress(min(file.tell(), self.size), self.size)
                if wrong := self.difference(temporary):
                    raise DataError(f"What {self.url} sent does not hold {self.what}: {wrong}.", self.how_to_get)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{self.what} cannot be downloaded: {one_line(error)}.", self.how_to_get) from error
        return target
