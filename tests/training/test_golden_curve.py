"""A frozen loss curve: what training computes must not drift unnoticed.

Weights and tokens come from numpy's frozen streams, so that the curve does not hang on torch's initialisation.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mvar_core.training.metrics import read_metrics
from mvar_core.training.transformer import train_transformer

CURVES = {
    "attention.scale_prefixes=1": [3.03218, 2.86849, 2.95234, 2.88461, 2.56098, 2.92727],
    "attention.scale_prefixes=all": [3.02294, 2.86269, 2.95896, 2.90875, 2.55764, 2.93684],
}


def fill(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(tuple(parameter.shape))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.asarray(random * 0.2)))


@pytest.mark.parametrize("attention", CURVES)
def test_loss_curve(make_config, make_models, make_tokens, tmp_path: Path, attention: str) -> None:
    config = make_config(attention, "train.steps=6", "train.log_every=1")
    transformer, tokenizer = make_models(config)
    fill(transformer)
    fill(tokenizer)
    train_transformer(
        transformer,
        tokenizer,
        make_tokens(config),
        config,
        tmp_path,
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == pytest.approx(CURVES[attention], rel=1e-4)
