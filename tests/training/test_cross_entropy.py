from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvar_core.training import transformer as module


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_losses_and_gradients(monkeypatch, label_smoothing, chunk):
    monkeypatch.setattr(module, "WORTHWHILE_ELEMENTS", 1)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    logits = (5 * torch.randn(11, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets, weights = torch.arange(11), torch.linspace(-1, 1, 11)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    wanted = torch.autograd.grad(expected, logits, weights)[0]
    copy = logits * 1.0
    losses = module.cross_entropy(copy, targets, label_smoothing)
    found = torch.autograd.grad(losses, logits, weights, retain_graph=True)[0]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(losses, logits, weights)


def test_few_logits_and_those_without_gradient_are_left_alone(monkeypatch):
    logits = torch.randn(3, 4, requires_grad=True)
    before = logits.detach().clone()
    module.cross_entropy(logits, torch.arange(3))
    monkeypatch.setattr(module, "WORTHWHILE_ELEMENTS", 1)
    with torch.no_grad():
        module.cross_entropy(logits, torch.arange(3))
    assert logits.detach().equal(before)
