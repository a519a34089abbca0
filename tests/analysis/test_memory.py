from __future__ import annotations

import pytest
import torch

from mvar_core.analysis.cost import cost_of
from mvar_core.analysis.measure import allocation_peak
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config import Machine, SamplingConfig
from mvar_core.config.presets import load_config
from mvar_core.models import footprint
from mvar_core.models.footprint import Setting
from mvar_core.models.micro_batches import choose
from mvar_core.runtime import has_bfloat16_unit
from mvar_core.sampling.images import sample_images

MIDDLING = ("transformer.embed_dim=256", "transformer.num_heads=4", "transformer.depth=2", "transformer.num_classes=40")
PROMISED = 0.1
"""How far a prediction may be from what is allocated."""


def sample(config, settings, images, dtype, *, memory_budget=None, stages=False):
    """Measured and predicted peak beside the weights."""
    transformer, tokenizer = random_transformer(config, dtype=dtype), random_tokenizer(config, dtype=dtype)
    setting = Setting(dtype.itemsize, settings, "cpu", stages, has_bfloat16_unit())
    sizes = choose(config, images, setting, budget=memory_budget, batch_size=images)
    labels = torch.arange(images) % config.transformer.num_classes
    list(
        sample_images(transformer, tokenizer, labels[:1], range(1), 0, settings, sizes)
    )  # what is made once is made now
    with allocation_peak() as live:
        list(sample_images(transformer, tokenizer, labels, range(images), 0, settings, sizes, stages=stages))
    return live.peak_bytes, sizes.peak_bytes


@pytest.mark.parametrize(("prefixes", "dtype"), [("all", torch.float32), (1, torch.bfloat16), (2, torch.float32)])
@pytest.mark.parametrize(
    ("codes", "cfg", "top_k", "top_p", "min_p"),
    [
        (64, 0, 0, 0, 0), (64, 1.5, 20, 0.9, 0), (2048, 1.5, 600, 0.96, 0), (2048, 1, 0, 0.96, 0),
        (2048, 1.5, 600, 0.96, 0.1), (2048, 1, 0, 0, 0.1),
    ],
)  # fmt: skip
def test_sampling_peak_is_what_is_allocated(prefixes, codes, cfg, top_k, top_p, min_p, dtype):
    config = load_config(
        "digits", [*MIDDLING, f"attention.scale_prefixes={prefixes}", f"tokenizer.codebook_size={codes}"]
    )
    settings = SamplingConfig(cfg=cfg, top_k=top_k, top_p=top_p, min_p=min_p)
    for images in (4, 24):  # the second in micro-batches
        measured, predicted = sample(config, settings, images, dtype)
        assert predicted == pytest.approx(measured, rel=PROMISED), images


@pytest.mark.parametrize(("prefixes", "windows"), [("all", "[]"), (1, "auto:3")])
@pytest.mark.parametrize("size", ["48x72", "88x40"])
def test_sampling_peak_of_pyramids_that_are_not_square(size, prefixes, windows):
    """A pyramid that follows from the size, as VAR and with windows on every scale where they pay."""
    settings = [f"image_size={size}", f"attention.windows={windows}", f"attention.scale_prefixes={prefixes}"]
    config = load_config("digits", [*MIDDLING, *settings])
    assert sum(map(bool, config.windows)) >= 4 * (prefixes == 1)
    for images in (2, 9):
        measured, predicted = sample(config, SamplingConfig(cfg=1.5, top_k=20, top_p=0.9), images, torch.float32)
        assert predicted == pytest.approx(measured, rel=PROMISED), images


def test_a_budget_for_sampling_holds():
    # Whole scales: the scratch space of tiles, of a few MB at most, is predicted less closely.
    config = load_config("digits", [*MIDDLING, "attention.windows=[0,0,0,0]"])
    settings = SamplingConfig(cfg=1.5, top_k=0, top_p=0)
    free, _ = sample(config, settings, 40, torch.float32)
    measured, predicted = sample(config, settings, 40, torch.float32, memory_budget=free // 2)
    assert measured <= 1.02 * (free // 2)
    assert predicted == pytest.approx(measured, rel=PROMISED)


def test_stages_are_counted():
    config = load_config("digits", MIDDLING)
    measured, predicted = sample(config, SamplingConfig(cfg=0, top_k=0, top_p=0), 8, torch.float32, stages=True)
    assert predicted == pytest.approx(measured, rel=PROMISED)


@pytest.mark.parametrize(
    ("dtype", "bfloat16_unit"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the flags, which set what they do not change
def test_decoder_peak_is_what_is_allocated(attention, dtype, bfloat16_unit):
    """On both kinds of CPU: one that computes in bfloat16 can also be told not to."""
    if bfloat16_unit and dtype is torch.bfloat16 and not has_bfloat16_unit():
        pytest.skip("this CPU does not compute in bfloat16")
    config = load_config(
        "digits",
        ["tokenizer.base_channels=48", "tokenizer.decoder_blocks=2", "tokenizer.middle_blocks=2",
         f"tokenizer.attention={attention}"],
    )  # fmt: skip
    tokenizer = random_tokenizer(config, dtype=dtype, encoder=False)
    fhat = torch.randn(1, 8, 8, 8)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=bfloat16_unit), allocation_peak() as live:
        tokenizer.decode_features(fhat)
    setting = Setting(dtype.itemsize, bfloat16_unit=bfloat16_unit)
    assert footprint.decoder_bytes(config, setting) == pytest.approx(live.peak_bytes, rel=PROMISED)


def test_weights_are_as_many_bytes_as_the_modules_hold():
    config = load_config("digits")
    transformer = random_transformer(config, dtype=torch.bfloat16)
    tokenizer = random_tokenizer(config, dtype=torch.bfloat16, encoder=False)
    parameters = [*transformer.parameters(), *tokenizer.parameters()]
    assert cost_of(config, Machine(dtype="bfloat16")).weight_bytes == sum(
        p.numel() * p.element_size() for p in parameters
    )
