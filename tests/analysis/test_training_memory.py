from __future__ import annotations

import pytest
import torch

from mvar_core.analysis.counts import transformer_parameters
from mvar_core.analysis.measure import allocation_peak
from mvar_core.analysis.random_models import random_transformer
from mvar_core.analysis.training_memory import train_peak_bytes
from mvar_core.config.presets import load_config
from mvar_core.training.measured_step import TrainingStep

CPU = torch.device("cpu")
WIDE = ("patch_sizes=[1,2,4,8,16]", "image_size=64", "transformer.embed_dim=256", "transformer.num_heads=4")


def measured(config, dtype):
    """Peak of two steps: the second has the optimizer's moments from the start."""
    transformer = random_transformer(config).requires_grad_(True).train()
    step = TrainingStep(config, transformer, CPU, dtype)
    with allocation_peak() as live:
        step()
        step()
    return live.peak_bytes + 4 * transformer_parameters(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefixes", ["all", 1])
@pytest.mark.parametrize(
    "settings",
    [
        ("transformer.embed_dim=128",),
        ("transformer.l2_attention=false",),
        (*WIDE, "attention.windows=[0,0,0,0,7]", "tokenizer.codebook_size=256"),
        (*WIDE, "attention.windows=[0,0,0,0,0]", "transformer.l2_attention=false"),
        ("image_size=48x72", "attention.windows=auto:3", "transformer.embed_dim=128"),
    ],
)
@pytest.mark.parametrize("batch", [2, 8])
def test_training_peak_is_what_is_allocated(settings, prefixes, dtype, batch):
    config = load_config("digits", [*settings, f"attention.scale_prefixes={prefixes}", f"train.batch_size={batch}"])
    predicted = train_peak_bytes(config, config.train, dtype.itemsize)
    assert predicted == pytest.approx(measured(config, dtype), rel=0.1)


@pytest.mark.parametrize(
    "settings", [("train.micro_batch=4",), ("train.accumulate=3",), ("train.activation_checkpointing=true",)]
)
def test_what_saves_memory_is_predicted_to(settings):
    plain = load_config("digits", [*WIDE, "attention.windows=[0,0,0,0,7]", "transformer.depth=6", "train.batch_size=8"])
    thrifty = load_config(
        "digits",
        [*WIDE, "attention.windows=[0,0,0,0,7]", "transformer.depth=6", "train.batch_size=8", *settings],
    )
    predicted = train_peak_bytes(thrifty, thrifty.train, 4)
    assert predicted < 0.8 * train_peak_bytes(plain, plain.train, 4)
    assert predicted == pytest.approx(measured(thrifty, torch.float32), rel=0.1)


def test_averaged_weights_take_their_bytes():
    config = load_config("digits")
    averaged = config.train.model_copy(update={"ema": 0.999})
    more = train_peak_bytes(config, averaged, 4) - train_peak_bytes(config, config.train, 4)
    assert more == 4 * transformer_parameters(config)
    assert train_peak_bytes(config.model_copy(update={"transformer": None}), config.train, 4) == 0
