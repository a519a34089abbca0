from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from mvar_core.analysis.measure import StageClock, allocation_peak
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config.presets import load_config

CPU = torch.device("cpu")


def test_allocations_count_what_lives_together():
    held = torch.ones(1000)
    with allocation_peak() as live:
        a = torch.empty(1_000_000)  # 4 MB
        b = torch.empty(500_000)  # 2 MB
        del a
        c = torch.empty(250_000)  # 1 MB, while b lives
        view = c[10:]
        del b, c, held  # what was there before counts neither way
    assert live.peak_bytes == 6_000_000
    assert view.shape == (249_990,)


def test_allocations_count_the_scratch_space_of_kernels():
    x = torch.randn(64, 4096)
    with allocation_peak() as live:
        y = x.double().softmax(-1)
        del y
    double = 64 * 4096 * 8
    assert live.peak_bytes == 2 * double
    image = torch.randn(1, 32, 64, 64)
    convolution = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad(), allocation_peak() as live:
        convolution(image)
    assert live.peak_bytes >= image.nbytes


def test_allocations_of_a_backward_pass_are_seen():
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(512, 256)
    with allocation_peak() as live:
        loss = (x @ weight).square().sum()
        loss.backward()
    product, gradient = 512 * 256 * 4, 256 * 256 * 4
    assert weight.grad is not None
    assert 2 * product + gradient <= live.peak_bytes <= 4 * product + 2 * gradient


class Machine:
    def mill(self):
        time.sleep(0.02)

    def bake(self):
        self.mill()
        time.sleep(0.04)


def test_a_clock_charges_the_innermost_stage_and_leaves_no_trace():
    machine = Machine()
    clock = StageClock(CPU)
    clock.watch(machine, "mill", "milling")
    clock.watch(machine, "bake", lambda: "baking", then="cooling")

    def work():
        time.sleep(0.01)
        machine.bake()
        time.sleep(0.03)

    stages = clock.run(work)
    assert list(stages) == ["baking", "milling", "cooling", "other"]
    assert 0.04 <= stages["baking"] < stages["baking"] + stages["milling"]
    assert stages["milling"] >= 0.02
    assert stages["cooling"] >= 0.03
    assert stages["other"] >= 0.01
    assert vars(machine) == {}


def test_a_clock_cleans_up_after_an_error():
    machine = Machine()
    clock = StageClock(CPU)
    clock.watch(machine, "mill", "milling")
    with pytest.raises(ZeroDivisionError):
        clock.run(lambda: 1 / 0)
    assert vars(machine) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_models_are_whole_finite_and_repeatable(dtype):
    config = load_config("digits")
    transformer, tokenizer = random_transformer(config, dtype=dtype), random_tokenizer(config, dtype=dtype)
    again = random_transformer(config, dtype=dtype)
    for one, other in zip(transformer.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    assert transformer.head.weight.dtype == torch.float32
    assert transformer.input_projection.weight.dtype == dtype
    length = config.pyramid.num_tokens
    with torch.no_grad():
        logits = transformer(torch.tensor([3]), torch.randn(1, length - 1, 8))
        pixels = tokenizer.decode(torch.zeros(1, length, dtype=torch.int64))
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert pixels.isfinite().all()
    assert tokenizer.quantizer.codebook.dtype == torch.float32
