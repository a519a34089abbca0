"""torch.compile for the blocks while they train."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch

from mvar_core.errors import BackendError
from mvar_core.models.transformer import Transformer

_COMPILERS = ("c++", "g++", "clang++", "cl")


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch cannot.

    Raises:
        BackendError: Says what is missing and how to get it.
    """
    if device.type == "mps":
        raise BackendError("The blocks cannot be compiled on MPS.", "Train without --compile.")
    if device.type == "cuda" and find_spec("triton") is None:
        raise BackendError(
            "Compiling for a GPU needs triton, which is not installed.", "Install triton, or train without --compile."
        )
    wanted = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((wanted,) if wanted else _COMPILERS)):
        found = f"CXX is {wanted!r}, which is not there" if wanted else f"none of {', '.join(_COMPILERS)} is there"
        raise BackendError(
            f"torch.compile needs a C++ compiler; {found}.",
            "Install one (for example `apt install g++`) or set CXX, or train without --compile.",
        )


@contextmanager
def compiled_blocks(transformer: Transformer, wanted: bool) -> Iterator[None]:
    """While entered, the transformer's blocks are compiled, if that is wanted.

    Names of parameters stay. Each block is compiled by itself, which takes a fraction of the time that the whole model
    takes.
    """
    if not wanted:
        yield
        return
    for block in transformer.blocks:
        block.compile(dynamic=False)
    try:
        yield
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None


def uncompiled(module: torch.nn.Module) -> AbstractContextManager[object]:
    """While entered, compiled blocks run as they are written: measures and samples have many shapes, each only once."""
    compiled = any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
