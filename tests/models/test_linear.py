import pytest
import torch
import torch.nn.functional as F

from mvar_core.models import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 40, 24)])
def test_linear_gelu_is_a_linear_and_a_gelu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=random).to(dtype) for size in (shape, (32, 24), (32,)))
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        found = linear.linear_gelu(x, weight, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    x.requires_grad_()
    torch.testing.assert_close(linear.linear_gelu(x, weight, bias).double(), exact, rtol=tolerance, atol=tolerance)
    linear.linear_gelu(x, weight, bias).sum().backward()
    assert x.grad is not None


def test_without_the_fused_product_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(5, 24).bfloat16(), torch.randn(32, 24).bfloat16(), torch.zeros(32).bfloat16()
    with torch.no_grad():
        fused = linear.linear_gelu(x, weight, bias)
        monkeypatch.setattr(linear, "_has_fused_linear", lambda: False)
        torch.testing.assert_close(linear.linear_gelu(x, weight, bias), fused, rtol=2e-2, atol=2e-2)
