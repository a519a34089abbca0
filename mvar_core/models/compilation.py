"""torch.compile for the blocks of a transformer, in training and in sampling."""

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
    """Refuse to compile where torch cannot (BackendError, which says what is missing and how to get it)."""
    if device.type == "mps":
        raise BackendError("The blocks cannot be compiled on MPS.", "Leave out --compile.")
    if device.type == "cuda" and find_spec("triton") is None:
        raise BackendError(
            "Compiling for a GPU needs triton, which is not installed.", "Install triton, or leave out --compile."
        )
    wanted = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((wanted,) if wanted else _COMPILERS)):
        found = f"CXX is {wanted!r}, which is not there" if wanted else f"none of {', '.join(_COMPILERS)} is there"
        raise BackendError(
            f"torch.compile needs a C++ compiler; {found}.",
            "Install one (for example `apt install g++`) or set CXX, or leave out --compile.",
        )


@contextmanager
def compiled_blocks(transformer: Transformer, wanted: bool) -> Iterator[None]:
    """While entered, the transformer's blocks are compiled, if that is wanted; names of parameters stay.

    Each block is compiled by itself, in a fraction of the time that the whole model would need.
    """
    blocks = transformer.blocks if wanted else []
    for block in blocks:
        block.compile(dynamic=False)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def compile_for_sampling(transformer: Transformer, device: torch.device) -> None:
    """Compile the blocks for as long as the transformer lives; a model that has run once compiles nothing again.

    Shapes are static: one graph per scale and micro-batch. On CUDA, scale-Markov models run as CUDA graphs; a cache of
    keys and values would be overwritten by them. BackendError where torch cannot compile.
    """
    check_compiler(device)
    keeps_keys = any(pattern.prefix_tokens for pattern in transformer.patterns)
    mode = "reduce-overhead" if device.type == "cuda" and not keeps_keys else None
    for block in transformer.blocks:
        block.compile(dynamic=False, mode=mode)


@contextmanager
def room_for_shapes(transformer: Transformer) -> Iterator[None]:
    """While entered, torch keeps a compiled block for every scale: by default it gives up after eight shapes."""
    if not is_compiled(transformer):
        yield
        return
    import torch._dynamo.config

    # Each scale in the shape of its micro-batch, with and without the unconditional half.
    limit = max(8, 4 * transformer.pyramid.num_scales)
    with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=64 * limit):
        yield


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module or one of its submodules is compiled."""
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules())


def uncompiled(module: torch.nn.Module) -> AbstractContextManager[object]:
    """While entered, compiled blocks run as they are written: measures and samples have many shapes, each only once."""
    return torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext()
