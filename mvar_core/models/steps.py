"""The steps of a block between its matrix products, each defined by a chain of operations.

On a CPU these steps are bound by memory, and under autocast by float32 copies. So training there runs functions that
work image by image, so that what they need in between stays in the processor's caches, and whose backward pass computes
again from the input what the chain would have kept.
"""

# Shape suffixes: B batch, L tokens, C width, H heads, D head width; b one image.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6
WORTHWHILE_ELEMENTS = 1 << 16
"""Elements per image from which working image by image pays; below, calls cost more than memory."""


def pays(x: Tensor) -> bool:
    """Whether the fast path is faster than the chain."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.numel() >= x.shape[0] * WORTHWHILE_ELEMENTS
        and not torch.compiler.is_compiling()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer will compute in: autocast's dtype where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def modulated_norm(
    x_BLC: Float[Tensor, "B L C"], scale_B1C: Float[Tensor, "B 1 C"], shift_B1C: Float[Tensor, "B 1 C"]
) -> Float[Tensor, "B L C"]:
    """LayerNorm without affine parameters (eps 1e-6), times (1 + scale), plus shift.

    The fast path returns the dtype that the next layer computes in.
    """
    if pays(x_BLC):
        output: Tensor = _ModulatedNorm.apply(x_BLC, scale_B1C, shift_B1C, compute_dtype(x_BLC))
        return output
    normed = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=EPS)
    return torch.addcmul(shift_B1C, normed, 1 + scale_B1C)


class _ModulatedNorm(torch.autograd.Function):
    """Per image, a modulated norm is a LayerNorm with weight 1 + scale and bias shift: one kernel, forth and back."""

    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor, dtype: torch.dtype) -> Tensor:
        weight_B1C, bias_B1C = 1 + scale_B1C.float(), shift_B1C.float()
        output_BLC = torch.empty(x_BLC.shape, dtype=dtype)
        statistics = []
        for x_bLC, weight_1C, bias_1C, output_bLC in zip(x_BLC, weight_B1C, bias_B1C, output_BLC, strict=True):
            normed, mean, rstd = torch.native_layer_norm(
                x_bLC.float(), weight_1C.shape[1:], weight_1C[0], bias_1C[0], EPS
            )
            output_bLC.copy_(normed)
            statistics.append((mean, rstd))
        ctx.save_for_backward(x_BLC, weight_B1C, bias_B1C)
        ctx.statistics = statistics
        ctx.modulation_dtype = scale_B1C.dtype
        return output_BLC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BLC,) = gradients
        x_BLC, weight_B1C, bias_B1C = ctx.saved_tensors
        dx_BLC = torch.empty_like(x_BLC)
        dscale_B1C, dshift_B1C = torch.empty_like(weight_B1C), torch.empty_like(bias_B1C)
        for image, (mean, rstd) in enumerate(ctx.statistics):
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                gradient_BLC[image].float(),
                x_BLC[image].float(),
                weight_B1C.shape[2:],
                mean,
                rstd,
                weight_B1C[image, 0],
                bias_B1C[image, 0],
                [True, True, True],
            )
            dx_BLC[image] = dx
            dscale_B1C[image, 0] = dweight
            dshift_B1C[image, 0] = dbias
        return dx_BLC, dscale_B1C.to(ctx.modulation_dtype), dshift_B1C.to(ctx.modulation_dtype), None


def normalise_heads(x_BLHD: Float[Tensor, "B L H D"], scale_H: Float[Tensor, " H"] | None) -> Float[Tensor, "B L H D"]:
    """Each head's vector over its length, times the head's scale; in float32, returned in the input's dtype."""
    if pays(x_BLHD):
        output: Tensor = _NormaliseHeads.apply(x_BLHD, scale_H)
        return output
    directions = F.normalize(x_BLHD.float(), dim=-1)
    return (directions if scale_H is None else directions * scale_H[:, None]).to(x_BLHD.dtype)


class _NormaliseHeads(torch.autograd.Function):
    """With y = x / |x| and z = s·y: dx = s·(dz - y (y·dz)) / |x|, ds = Σ y·dz."""

    @staticmethod
    def forward(ctx: Any, x_BLHD: Tensor, scale_H: Tensor | None) -> Tensor:
        output_BLHD = torch.empty(x_BLHD.shape, dtype=x_BLHD.dtype)
        lengths_BLH1 = torch.empty((*x_BLHD.shape[:-1], 1))
        for x_bLHD, output_bLHD, lengths_bLH1 in zip(x_BLHD, output_BLHD, lengths_BLH1, strict=True):
            values = x_bLHD.float()
            torch.linalg.vector_norm(values, dim=-1, keepdim=True, out=lengths_bLH1)
            lengths_bLH1.clamp_(min=1e-12)
            directions = values / lengths_bLH1
            output_bLHD.copy_(directions if scale_H is None else directions.mul_(scale_H[:, None]))
        ctx.save_for_backward(x_BLHD, lengths_BLH1, scale_H)
        return output_BLHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BLHD,) = gradients
        x_BLHD, lengths_BLH1, scale_H = ctx.saved_tensors
        dx_BLHD = torch.empty(x_BLHD.shape, dtype=x_BLHD.dtype)
        dscale_H = None if scale_H is None else torch.zeros_like(scale_H)
        for image, lengths_bLH1 in enumerate(lengths_BLH1):
            directions = x_BLHD[image] / lengths_bLH1
            gradient = gradient_BLHD[image].float()
            along_bLH1 = (directions * gradient).sum(dim=-1, keepdim=True)
            dx = torch.addcmul(gradient, directions, along_bLH1, value=-1).div_(lengths_bLH1)
            if scale_H is not None:
                dx.mul_(scale_H[:, None])
                assert dscale_H is not None
                dscale_H += along_bLH1.sum(dim=(0, 2))
            dx_BLHD[image] = dx
        return dx_BLHD, dscale_H


def gated_sum(
    x_BLC: Float[Tensor, "B L C"], branch_BLC: Float[Tensor, "B L C"], gate_B1C: Float[Tensor, "B 1 C"]
) -> Float[Tensor, "B L C"]:
    """The stream plus a branch times its gate."""
    if pays(x_BLC):
        output: Tensor = _GatedSum.apply(x_BLC, branch_BLC, gate_B1C)
        return output
    return x_BLC + branch_BLC * gate_B1C


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLC: Tensor, branch_BLC: Tensor, gate_B1C: Tensor) -> Tensor:
        ctx.save_for_backward(branch_BLC, gate_B1C)
        output_BLC = torch.empty_like(x_BLC)
        for x_bLC, branch_bLC, gate_1C, output_bLC in zip(x_BLC, branch_BLC, gate_B1C, output_BLC, strict=True):
            torch.addcmul(x_bLC, branch_bLC.to(x_bLC.dtype), gate_1C.to(x_bLC.dtype), out=output_bLC)
        return output_BLC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BLC,) = gradients
        branch_BLC, gate_B1C = ctx.saved_tensors
        dbranch_BLC, dgate_B1C = torch.empty_like(branch_BLC), torch.empty_like(gate_B1C)
        for image, gate_1C in enumerate(gate_B1C):
            gradient = gradient_BLC[image]
            dbranch_BLC[image] = gradient * gate_1C.to(gradient.dtype)
            dgate_B1C[image] = (gradient * branch_BLC[image]).sum(dim=0, keepdim=True)
        return gradient_BLC, dbranch_BLC, dgate_B1C


def token_slices(x_BLHD: Float[Tensor, "B L H D"], spans: Sequence[slice]) -> tuple[Tensor, ...]:
    """Slices of the token axis, which may overlap; their gradients meet in one buffer instead of one per slice."""
    bounds = tuple((span.start, span.stop) for span in spans)
    ends = [stop for _, stop in bounds]
    if [start for start, _ in bounds] == [0, *ends[:-1]] and ends[-1] == x_BLHD.shape[1]:
        return x_BLHD.split([stop - start for start, stop in bounds], dim=1)
    slices: tuple[Tensor, ...] = _TokenSlices.apply(x_BLHD, bounds)
    return slices


class _TokenSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLHD: Tensor, bounds: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.bounds, ctx.shape = bounds, x_BLHD.shape
        return tuple(x_BLHD[:, start:stop] for start, stop in bounds)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total_BLHD = gradients[0].new_zeros(ctx.shape)
        for (start, stop), gradient in zip(ctx.bounds, gradients, strict=True):
            total_BLHD[:, start:stop] += gradient
        return total_BLHD, None
