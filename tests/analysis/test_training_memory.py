from __future__ import annotations

import pytest
import torch

from mvar_core.analysis.cost import count_parameters, train_peak_bytes
from mvar_core.analysis.measure import allocation_peak
from mvar_core.analysis.random_models import random_transformer
from mvar_core.config.presets import load_config
from mvar_core.workflows.bench_row import TrainingStep

WIDE = ("patch_sizes=[1,2,4,8,16]", "image_size=64", "transformer.embed_dim=256", "transformer.num_heads=4")


def measured(config, dtype):
    """Peak of two steps: the second has the optimizer's moments from the start."""
    transformer = random_transformer(config).requires_grad_(True).train()
    step = TrainingStep(config, transformer, dtype)
    with allocation_peak() as live:
        step()
        step()
    return live.peak_bytes + 4 * count_parameters(transformer)


def predicted(config, dtype=torch.float32):
    return train_peak_bytes(random_transformer(config), config.train, dtype.itemsize)


@pytest.mark.parametrize(
    ("prefixes", "dtype", "batch"),
    [("all", torch.float32, 6), ("all", torch.bfloat16, 2), (1, torch.float32, 2), (1, torch.bfloat16, 6)],
)
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
def test_training_peak_is_what_is_allocated(settings, prefixes, dtype, batch):
    config = load_config("digits", [*settings, f"attention.scale_prefixes={prefixes}", f"train.batch_size={batch}"])
    assert predicted(config, dtype) == pytest.approx(measured(config, dtype), rel=0.1)


@pytest.mark.parametrize(
    "settings", [("train.micro_batch=4",), ("train.accumulate=3",), ("train.activation_checkpointing=true",)]
)
def test_what_saves_memory_is_predicted_to(settings):
    plain = load_config("digits", [*WIDE, "attention.windows=[0,0,0,0,7]", "transformer.depth=4", "train.batch_size=8"])
    thrifty = load_config(
        "digits",
        [*WIDE, "attention.windows=[0,0,0,0,7]", "transformer.depth=4", "train.batch_size=8", *settings],
    )
    assert predicted(thrifty) < 0.8 * predicted(plain)
    assert predicted(thrifty) == pytest.approx(measured(thrifty, torch.float32), rel=0.1)


def test_ema_takes_the_bytes_of_the_weights():
    config, averaged = load_config("digits"), load_config("digits", ["train.ema=0.999"])
    assert predicted(averaged) - predicted(config) == 4 * count_parameters(random_transformer(config))
