from __future__ import annotations

import pytest
import torch
from torch import nn

from mvar_core.training.optim import EMA


def test_the_average_is_the_closed_form():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = EMA(module, 0.5)
    expected = 0.0
    for step in range(40):
        module.weight.data.fill_(float(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        average.update(step)
    assert average.state()["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_in_place_gives_the_weights_back_to_the_bit():
    module = nn.Linear(3, 3)
    average = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1 / 3)
    average.update(0)
    own, averaged = module.weight.clone(), average.state()["weight"].clone()
    assert not torch.equal(own, averaged)
    with pytest.raises(RuntimeError), average.in_place():
        assert torch.equal(module.weight, averaged)
        raise RuntimeError
    assert torch.equal(module.weight, own)
    assert torch.equal(average.state()["weight"], averaged)


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert set(EMA(module, 0.9).state()) == {"weight"}
