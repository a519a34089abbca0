"""What a CPU trains with equals the chain of operations that defines it, gradients included."""

import pytest
import torch
from torch import Tensor

from mvar_core.config.presets import load_config
from mvar_core.models import steps
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import generator

TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 3e-2}


def both(function, *arguments, autocast=False):
    """The fast path and the chain of operations, chosen by the size from which the fast path pays."""
    results = []
    for worthwhile in (1, 1 << 30):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            patch.setattr(steps, "WORTHWHILE_ELEMENTS", worthwhile)
            results.append(function(*arguments))
        autocast = False
    return results


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def compare(fast: Tensor, chain: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    gradient = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9)).to(fast.dtype)
    found = torch.autograd.grad(fast, inputs, gradient)
    wanted = torch.autograd.grad(chain, inputs, gradient.to(chain.dtype))
    for one, other in zip((fast, *found), (chain, *wanted), strict=True):
        scale = other.detach().abs().max().item()
        torch.testing.assert_close(one.float(), other.float(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_modulated_norm(dtype):
    inputs = [random(3, 20, 32), random(3, 1, 32, dtype=dtype, seed=1), random(3, 1, 32, dtype=dtype, seed=2)]
    fast, chain = both(steps.modulated_norm, *inputs, autocast=dtype == torch.bfloat16)
    assert fast.dtype == dtype
    compare(fast, chain, inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("scaled", [True, False])
def test_normalise_heads(dtype, scaled):
    x = random(3, 20, 4, 8, dtype=dtype)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0], requires_grad=True) if scaled else None
    fast, chain = both(steps.normalise_heads, x, scale)
    assert fast.dtype == dtype
    compare(fast, chain, [x, scale] if scaled else [x], TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gated_sum(dtype):
    inputs = [random(3, 20, 32), random(3, 20, 32, dtype=dtype, seed=1), random(3, 1, 32, dtype=dtype, seed=2)]
    fast, chain = both(steps.gated_sum, *inputs)
    assert fast.dtype == torch.float32
    compare(fast, chain, inputs, TOLERANCES[dtype])


def test_token_slices_add_up_where_they_overlap():
    x = random(2, 6, 2, 3)
    for spans in ([slice(0, 2), slice(2, 6)], [slice(0, 2), slice(0, 5), slice(1, 6)]):
        parts = steps.token_slices(x, spans)
        weights = [torch.randn(part.shape) for part in parts]
        found = torch.autograd.grad(parts, x, weights)[0]
        expected = torch.autograd.grad([x[:, span] for span in spans], x, weights)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("attention", ["attention.scale_prefixes=1", "attention.scale_prefixes=all"])
def test_a_model_that_trains_with_them_has_the_same_gradients(monkeypatch, dtype, attention):
    settings = [
        "transformer.depth=2",
        "transformer.embed_dim=32",
        "transformer.num_heads=2",
        "transformer.drop_path=0.3",
    ]
    config = load_config("digits", [*settings, attention])
    torch.manual_seed(0)
    model = Transformer(config).train()
    inputs = torch.randn(4, config.pyramid.num_tokens - 1, config.tokenizer.latent_channels)
    gradients = {}
    for worthwhile in (1 << 30, 1):
        monkeypatch.setattr(steps, "WORTHWHILE_ELEMENTS", worthwhile)
        monkeypatch.setattr("mvar_core.kernels.dense.WORTHWHILE_ELEMENTS", worthwhile)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(torch.arange(4), inputs, attention="dense", generator=generator("test", 0))
        logits.square().mean().backward()
        gradients[worthwhile] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, found in gradients[1].items():
        expected = gradients[1 << 30][name]
        error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < (1e-5 if dtype == torch.float32 else 5e-2), name
