"""Linear layers whose rows do not depend on how many rows there are.

On a CPU, matrix products of fewer than 8 rows (other than 4) run through kernels that add in another order, so that a
sample generated alone would differ in its last bits from the same sample in a batch. Padding to a few more rows avoids
them and costs nothing that can be measured: so few rows are bound by reading the weights.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_ROWS = 16
"""Rows below which products are padded; measured on x86 with torch 2.13: from 8 rows on, all counts agree."""


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ weight.T + bias over the last axis, each row to the bit the same in any batch on a CPU."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows >= SMALLEST_ROWS:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, SMALLEST_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows].view(*x.shape[:-1], -1)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh approximation) of x @ weight.T + bias over the last axis.

    In bfloat16 on a CPU, where no gradient is asked for, the activation is computed inside the product (oneDNN), from
    its float32 sums: on its own, it costs a fifth of the product's time.
    """
    fuses = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    if fuses and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _has_fused_linear():
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return fused
    return F.gelu(row_stable_linear(x, weight, bias), approximate="tanh")


@lru_cache(maxsize=1)
def _has_fused_linear() -> bool:
    """Whether this build of torch has the fused product and this processor computes bfloat16 with it."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, x[0], "gelu", [], "tanh")
        return True
    except (AttributeError, RuntimeError):
        return False


class RowStableLinear(nn.Linear):
    """A linear layer on `row_stable_linear`."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return row_stable_linear(x, self.weight, self.bias)
