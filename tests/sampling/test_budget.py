from itertools import pairwise

import pytest
import torch

from mvar_core.config import SamplingConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError
from mvar_core.models import footprint, micro_batches
from mvar_core.models.footprint import Setting
from mvar_core.models.micro_batches import TOKENS_AT_ONCE, MicroBatches
from mvar_core.sampling.images import free_memory

CPU = torch.device("cpu")
D16 = load_config("mvar-d16-256").model
VAR = load_config("var-d16-256").model


def choose(config=D16, images=64, budget=None, **options) -> MicroBatches:
    setting = Setting(dtype_bytes=2, sampling=SamplingConfig(top_k=900, top_p=0), device="cpu")
    return micro_batches.choose(config, images, setting, budget=budget, **options)


def test_every_scale_has_about_as_many_rows():
    sizes = choose()
    assert sizes.images == 64
    for count, grid in zip(sizes.scales, D16.pyramid.grids, strict=True):
        rows = 2 * count * grid.tokens
        assert count == 64 or TOKENS_AT_ONCE["cpu"] / 2 < rows <= TOKENS_AT_ONCE["cpu"]
    assert sizes.decoder == 1, "convolutions on a CPU round by their batch"


def test_the_predicted_peak_is_flat_for_markov_models_alone():
    few, many = choose(images=8), choose(images=64)
    # 64 images of different classes and no class, against 8 images, whose few classes are padded to 16 rows.
    setting = Setting(dtype_bytes=2, sampling=SamplingConfig(cfg=1, top_k=900, top_p=0))
    classes = [footprint.classes_bytes(D16, images, setting) for images in (8, 64)]
    between = 56 * footprint.image_bytes(D16) + classes[1] - classes[0]
    assert many.peak_bytes - few.peak_bytes == pytest.approx(between, rel=0.1)
    assert choose(VAR, images=64).peak_bytes > 5 * choose(VAR, images=8).peak_bytes


@pytest.mark.parametrize("config", [D16, VAR])
@pytest.mark.parametrize("megabytes", [150, 300, 800])
def test_a_budget_is_kept(config, megabytes):
    sizes = choose(config, images=512, budget=megabytes * 10**6, batch_size=512)
    assert sizes.peak_bytes <= megabytes * 10**6
    assert 1 <= sizes.images <= 512
    assert min(sizes.scales) >= 1


def test_more_memory_never_gives_smaller_batches():
    sizes = [choose(budget=megabytes * 10**6) for megabytes in (120, 200, 400, 800)]
    for less, more in pairwise(sizes):
        assert less.images <= more.images
    assert sizes[-1] == choose()


def test_too_little_memory_says_how_much_an_image_takes():
    with pytest.raises(ConfigError, match=r"5 MB are left .* one image of mvar-d16-256 needs \d+ MB"):
        choose(budget=5 * 10**6)


def test_a_batch_is_never_larger_than_asked_for():
    assert choose(batch_size=3).images == 3
    assert max(choose(batch_size=3).scales) == 3
    assert choose(images=2).images == 2
    assert choose(images=0).images == 1


def test_the_machine_says_what_it_has():
    free = free_memory(CPU)
    assert free is None or free > 10**8
