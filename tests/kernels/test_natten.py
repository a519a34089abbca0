"""What NATTEN's compiled kernels are given, by a stand-in that answers for them: no machine without a GPU has them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from mvar_core.kernels import natten, select
from mvar_core.kernels.backend import AttentionCall
from mvar_core.kernels.reference import attend_reference
from mvar_core.pyramid import AttentionPattern, Grid


class Kernels:
    """na1d and na2d as NATTEN documents them, strict where its kernels are, answered by the reference."""

    def __init__(self):
        self.calls = []

    def na1d(self, query, key, value, **options):
        return self._answer(query, key, value, 1, **options)

    def na2d(self, query, key, value, **options):
        return self._answer(query, key, value, 2, **options)

    def _answer(
        self, query, key, value, axes, *, kernel_size, scale, return_lse, additional_keys=None, additional_values=None
    ):
        *sides, heads, width = query.shape[1:]
        assert return_lse
        assert len(sides) == len(kernel_size) == axes
        assert all(2 <= window <= side for window, side in zip(kernel_size, sides, strict=True))
        assert width % 8 == 0
        assert query.shape == key.shape == value.shape
        extra = (additional_keys, additional_values)
        assert all(x.is_contiguous() for x in (query, key, value, *extra) if x is not None)
        grid = Grid(*(([1] if axes == 1 else []) + sides))
        prefix = 0 if additional_keys is None else additional_keys.shape[1]
        assert additional_keys is None or additional_keys.shape[2:] == (heads, width)
        q, k, v = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))
        if prefix:
            k, v = (torch.cat([more.transpose(1, 2), x], dim=2) for more, x in zip(extra, (k, v), strict=True))
        windows = Grid(*(([1] if axes == 1 else []) + list(kernel_size)))
        self.calls.append((sides, kernel_size, prefix, width))
        output = masked(q, k, v, grid, windows, prefix, scale)
        return output.transpose(1, 2).unflatten(1, sides), torch.zeros(query.shape[:-1])


def masked(q, k, v, grid, windows, prefix, scale):
    rows = [AttentionPattern(Grid(side, 1), window) for side, window in zip(grid, windows, strict=True)]
    seen = [torch.zeros(side, side, dtype=torch.bool) for side in grid]
    for axis, pattern in zip(seen, rows, strict=True):
        for position in range(pattern.queries):
            axis[position, pattern.visible_keys(position)] = True
    own = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).reshape(grid.tokens, grid.tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(own, (prefix, 0), value=True), scale=scale)


@pytest.fixture
def kernels(monkeypatch):
    """A NATTEN with libnatten, on whatever device."""
    stand_in = Kernels()
    package, functional = type(sys)("natten"), type(sys)("natten.functional")
    package.HAS_LIBNATTEN = True
    functional.na1d, functional.na2d = stand_in.na1d, stand_in.na2d
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    monkeypatch.setattr(natten, "_has_kernels", lambda device: True)
    select.select_backend.cache_clear()
    yield stand_in
    select.select_backend.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "sides", "window"),
    [
        (AttentionPattern(Grid(9, 11), 7), [9, 11], (7, 7)),
        (AttentionPattern(Grid(9, 11), 7, 13), [9, 11], (7, 7)),
        (AttentionPattern(Grid(5, 12), 7, 3), [5, 12], (5, 7)),  # wider than one axis
        (AttentionPattern(Grid(4, 6), 9), [4, 6], (4, 6)),  # wider than both: the whole scale
        (AttentionPattern(Grid(5, 6), 0, 2), [5, 6], (5, 6)),  # a whole scale
        (AttentionPattern(Grid(1, 9), 3), [9], (3,)),  # one row: one axis
        (AttentionPattern(Grid(9, 1), 5, 4), [9], (5,)),
        (AttentionPattern(Grid(2, 2), 3), [2, 2], (2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [4, 16, 20, 72])
def test_what_the_kernels_are_given(kernels, make_inputs, pattern, sides, window, width):
    """Sides, windows, prefix as additional keys, widths in multiples of 8, contiguous; and the answer is right."""
    q, k, v, _ = make_inputs(pattern, width=width, heads=3)
    found = natten.attend_natten(q, k, v, pattern, 0.6)
    assert kernels.calls == [(sides, window, pattern.prefix_tokens, -(-width // 8) * 8)]
    torch.testing.assert_close(found, attend_reference(q, k, v, pattern, 0.6), rtol=1e-5, atol=1e-5)


def test_a_window_of_one_needs_no_kernel(kernels, make_inputs):
    for pattern in (AttentionPattern(Grid(5, 6), 1, 3), AttentionPattern(Grid(1, 1), 7)):
        q, k, v, _ = make_inputs(pattern)
        found = natten.attend_natten(q, k, v, pattern, 0.6)
        torch.testing.assert_close(found, attend_reference(q, k, v, pattern, 0.6), rtol=1e-5, atol=1e-5)
    assert not kernels.calls


def test_strided_inputs_reach_the_kernels_contiguous(kernels):
    pattern = AttentionPattern(Grid(6, 7), 3)
    packed = torch.randn(2, pattern.queries, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    found = natten.attend_natten(q, k, v, pattern, 0.7)
    torch.testing.assert_close(found, attend_reference(q, k, v, pattern, 0.7), rtol=1e-5, atol=1e-5)
    assert len(kernels.calls) == 1


def test_gradients_pass_through_padding_and_additional_keys(kernels, make_inputs):
    pattern = AttentionPattern(Grid(4, 5), 3, 2)
    *inputs, gradient = make_inputs(pattern, width=12)
    leaves = [x.requires_grad_() for x in inputs]
    found = torch.autograd.grad(natten.attend_natten(*leaves, pattern, 0.6), leaves, gradient)
    expected = torch.autograd.grad(attend_reference(*leaves, pattern, 0.6), leaves, gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_kernels_on_cuda_before_flex(kernels):
    call = AttentionCall(AttentionPattern(Grid(64, 64), 7), torch.device("cuda", 0), torch.bfloat16)
    assert select.select_backend("auto", call).name == "natten"
