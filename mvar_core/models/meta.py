"""Models without values, to be filled from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_INITIALISERS = frozenset(
    {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "mul_", "div_"}
)


class _WithoutInitialisation(TorchFunctionMode):
    """Skips what would initialise or scale initial values of tensors that have none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISERS:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules made inside have shapes and dtypes but no values (the meta device); no random numbers are consumed.

    To initialise on the meta device, torch would import its compiler and sympy: longer than generating a first image.
    """
    with torch.device("meta"), _WithoutInitialisation():
        yield
