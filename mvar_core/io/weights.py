"""Weights that come from outside, as files of tensors: read without running anything that is in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError, one_line
from mvar_core.io.files import sha256_of_file


def load_torch_file(path: Path, *, mapped: bool = True) -> Any:
    """The content of a .pth file: tensors in containers, nothing that would run code.

    Args:
        path: The file.
        mapped: Map the file into memory rather than read it, where its format (torch 1.6 and later) allows that.

    Raises:
        CheckpointError: The file is missing, damaged, or holds code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a .pth file of tensors.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it holds Python objects that would run code when loaded; expected tensors alone.",
            "If you trust its source, save its state dict again with torch.save(state_dict, path).",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole torch checkpoint: {one_line(error)[:200]}.") from None


def state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """What a file holds, if that is tensors by name.

    Raises:
        CheckpointError: It is something else.
    """
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict; expected tensors by name.")
    return {str(name): tensor for name, tensor in content.items()}


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

    def find(self, path: Path | str | None = None, *, exact: bool = False) -> Path:
        """The file on this machine: `path`, or the environment variable's, or one in torch's cache of downloads.

        A file that the user names may hold other weights than the published ones, unless it must be `exact`.

        Raises:
            DataError: No such file, or another one; says where to get it and where to put it.
        """
        named = str(path) if path is not None else os.environ.get(self.variable)
        if named:
            candidate = Path(named).expanduser()
            if not candidate.is_file():
                origin = self.option if path is not None else f"${self.variable}"
                raise DataError(f"{origin}: {candidate} does not exist.", self.how_to_get)
            if exact:
                self.check(candidate)
            return candidate
        for name in self.names:
            if (candidate := self.cache / name).is_file():
                self.check(candidate)
                return candidate
        raise DataError(f"{self.what} ({self.names[0]}) are not on this machine.", self.how_to_get)

    def check(self, path: Path) -> None:
        """Refuse a file whose bytes are not the published ones (DataError)."""
        if (found := sha256_of_file(path)) != self.sha256:
            raise DataError(
                f"{path} does not hold {self.what}: its SHA-256 is {found}, expected {self.sha256}.",
                f"Delete it. {self.how_to_get}",
            )
