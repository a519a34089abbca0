"""Attention in strips, as a CPU trains with it: output and gradients are the reference's."""

import pytest
import torch

from mvar_core.kernels import attend, dense
from mvar_core.kernels.reference import attend_reference
from mvar_core.pyramid import AttentionPattern, Grid

PATTERNS = [
    AttentionPattern(Grid(1, 1)),
    AttentionPattern(Grid(6, 4), prefix_tokens=3),
    AttentionPattern(Grid(13, 13), window=7),
    AttentionPattern(Grid(16, 16), window=3),
    AttentionPattern(Grid(9, 5), window=7),  # wider than one axis
    AttentionPattern(Grid(3, 16), window=5),  # higher than the grid: one strip
    AttentionPattern(Grid(8, 8), window=3, prefix_tokens=5),
]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def tensors(pattern: AttentionPattern, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (pattern.queries, pattern.keys, pattern.keys)
    return [torch.randn(2, 3, size, 8, generator=random).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scores_at_once", [100, 1 << 20])
def test_output_and_gradients(monkeypatch, pattern, dtype, scores_at_once):
    monkeypatch.setattr(dense, "SCORES_AT_ONCE", scores_at_once)
    inputs = tensors(pattern, dtype)
    output = dense._Strips.apply(*inputs, pattern, 0.7)
    expected = attend_reference(*inputs, pattern, 0.7)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(output, inputs, gradient)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    for one, other in zip((output, *found), (expected, *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_scores_of_bfloat16_are_not_rounded_to_it():
    """Scores near 100 differ by less than bfloat16 resolves there; their softmax must still tell them apart."""
    pattern = AttentionPattern(Grid(1, 2))
    q = torch.tensor([10.0, 0.125]).bfloat16().expand(1, 1, 2, 2)
    k = torch.tensor([[10.0, 1.0], [10.0, 0.0]]).bfloat16()[None, None]
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).bfloat16()[None, None].requires_grad_()
    output = dense._Strips.apply(q, k, v, pattern, 1.0)
    assert output[0, 0, 0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(0.125)).item(), rel=1e-2)


def test_strips_read_only_rows_that_some_query_of_theirs_sees():
    found = dense.strips_of_rows(AttentionPattern(Grid(16, 16), window=7))
    rows = [(queries.start // 16, keys.start // 16, keys.stop // 16) for queries, keys in found]
    assert rows == [(0, 0, 7), (4, 1, 11), (8, 5, 15), (12, 9, 16)]


def test_dense_trains_with_them_where_they_pay():
    pattern = AttentionPattern(Grid(16, 16), window=7)
    q, k, v = (torch.randn(4, 8, 256, 8, requires_grad=True) for _ in range(3))
    trained = attend(q, k, v, pattern, scale=1.0, backend="dense")
    small = attend(q[:1], k[:1], v[:1], pattern, scale=1.0, backend="dense")
    with torch.no_grad():
        expected = attend(q, k, v, pattern, scale=1.0, backend="dense")
    assert [type(output.grad_fn).__name__ == "_StripsBackward" for output in (trained, small)] == [True, False]
    torch.testing.assert_close(trained, expected, atol=2e-6, rtol=2e-6)
