"""Tensors that users pass, as tensors, arrays or nested lists: refused by name where they cannot be used."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mvar_core.errors import DataError, MvarError, shown


def tensor_argument(
    values: Any,
    expected: str,
    kind: Literal["whole", "real", "bool"],
    *shapes: tuple[int | None, ...],
    error: type[MvarError] = DataError,
) -> Tensor:
    """A tensor, an array or nested lists as an ordinary tensor: int64, float of any width, or bool.

    Empty ones are of every kind; in `shapes`, None is any length. Anything else than what is `expected`, with which the
    message begins, is an `error`.
    """
    try:
        found = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise error(f"{expected}; found {type(values).__name__} {shown(values)}.") from None
    if found.is_nested or found.layout != torch.strided or found.is_quantized or found.is_meta:
        raise error(f"{expected}; found a {found.dtype} tensor that is sparse, quantized, nested or without values.")
    text = f"{str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
    real, truth = found.is_floating_point(), found.dtype == torch.bool
    fits = {"real": real, "bool": truth, "whole": not (real or truth or found.is_complex())}[kind]
    allowed = not shapes or any(
        len(shape) == found.ndim and all(length in (None, own) for length, own in zip(shape, found.shape, strict=True))
        for shape in shapes
    )
    if not allowed or not (fits or not found.numel()):
        raise error(f"{expected}; found {text}.")
    dtype = {"whole": torch.long, "bool": torch.bool, "real": found.dtype if real else torch.float32}[kind]
    return found.detach().to(dtype)
