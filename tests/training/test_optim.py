from __future__ import annotations

import pytest
import torch
from torch import nn

from mvar_core.config.training import OptimizerConfig
from mvar_core.training.optim import build_optimizer, learning_rate, parameter_groups


def rate(step: int, **settings: object) -> float:
    values = {"lr": 1.0, "lr_batch": None, "warmup": 10, "warmup_start": 0.005, "end": 0.1, **settings}
    return learning_rate(step, 110, 64, OptimizerConfig(**values))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.005),
        (5, 0.5025),  # half-way from 0.005 to 1
        (10, 1.0),
        (14, 1.0),  # (14 - 10) / 99 is still below 5 %
        (15, 0.1 + 0.9 * (1 - 5 / 99) / 0.95),
        (60, 0.1 + 0.9 * (1 - 50 / 99) / 0.95),
        (109, 0.1),
    ],
)
def test_lin0(step, expected):
    assert rate(step, schedule="lin0") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"), [(5, 0.5025), (10, 1.0), (43, 0.1 + 0.9 * 0.75), (76, 0.1 + 0.9 * 0.25), (109, 0.1)]
)
def test_cosine(step, expected):
    assert rate(step, schedule="cosine") == pytest.approx(expected)  # cos(π/3) = 0.5, cos(2π/3) = -0.5


def test_constant():
    assert rate(5, schedule="constant") == pytest.approx(0.5025)
    assert rate(109, schedule="constant") == 1.0


def test_warmup_below_one_is_a_part_of_the_steps():
    assert rate(10, warmup=0.1) == rate(10, warmup=11)
    assert rate(0, warmup=0) == 1.0


def test_rate_is_scaled_by_the_batch():
    assert learning_rate(10, 110, 512, OptimizerConfig(lr=1e-4, lr_batch=256, warmup=10)) == pytest.approx(2e-4)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_rates(total):
    for step in range(total):
        assert 0 < learning_rate(step, total, 8, OptimizerConfig(warmup=50)) <= 1e-4 * 8 / 256


def test_decay_groups(make_config, make_models):
    transformer, _ = make_models(make_config())
    decayed, spared = parameter_groups(transformer, 0.05, transformer.no_decay_names())
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert decayed_names | spared_names == set(names.values())
    assert {"head.weight", "input_projection.weight", "blocks.0.attention.qkv.weight"} <= decayed_names
    assert {
        "head.bias",
        "class_embedding.weight",
        "position_embedding",
        "start_position",
        "scale_embedding.weight",
        "blocks.1.attention.log_head_scale",
        "blocks.1.attention.query_bias",
    } <= spared_names
    assert not any(name.endswith("bias") for name in decayed_names)


def test_frozen_parameters_are_left_out_and_unknown_names_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(module, 0.1)) == 2
    with pytest.raises(ValueError, match="nowhere"):
        parameter_groups(module, 0.1, {"nowhere"})


def test_decay_reaches_only_its_group():
    module = nn.Linear(3, 3)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    optimizer = build_optimizer(module, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert module.weight.allclose(torch.tensor(0.95))
    assert module.bias.equal(torch.ones(3))
