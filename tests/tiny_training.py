"""The model of tiny.py with settings of training, and data for it; also imported by processes that tests start."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor

from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

LOOP = {"log_every": 4, "checkpoint_every": 4, "steps": 10}
TINY: dict[str, Any] = {
    **{name: tiny.TINY[name] for name in ("image_size", "patch_sizes", "tokenizer", "attention")},
    "name": "tiny",
    "transformer": {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "drop_path": 0.2, "gate_init": 0.1},
    "train": {**LOOP, "batch_size": 6, "epochs": None, "optimizer": {"lr": 5e-3, "warmup": 2}},
    "train_tokenizer": {
        **LOOP,
        "batch_size": 8,
        "kmeans_batches": 2,
        "revive_every": 2,
        "optimizer": {"lr": 3e-3, "lr_batch": None, "warmup": 2, "schedule": "cosine"},
    },
}


def make_config(*settings: str) -> RunConfig:
    """The tiny configuration, with settings of the form a.b=c."""
    return load_config(None, settings, base=TINY)


def make_models(config: RunConfig) -> tuple[Transformer, VQVAE]:
    """A transformer and a tokenizer, the same ones for the same configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VQVAE(config.tokenizer, config.pyramid)
        with torch.no_grad():
            tokenizer.quantizer.codebook.normal_()
        return Transformer(config), tokenizer


class FakeTokens:
    """Random token maps in which the class decides much, so that there is something to learn."""

    def __init__(self, config: RunConfig, rows: int = 20, seed: int = 0):
        source = np.random.default_rng(seed)
        codes = config.tokenizer.codebook_size
        self.labels = source.integers(0, 3, rows)
        noise = source.integers(0, codes, (rows, config.pyramid.num_tokens))
        own = np.broadcast_to(self.labels[:, None] * 5, noise.shape)
        self.tokens = np.where(source.random(noise.shape) < 0.8, own, noise)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tokens[rows]).long(), torch.from_numpy(self.labels[rows]).long()


class FakeVectorTokens(FakeTokens):
    """The same token maps, which come with a vector for each class."""

    def __init__(self, config: RunConfig, rows: int = 20, seed: int = 0):
        super().__init__(config, rows, seed)
        dim = config.conditioning.dim
        assert dim is not None
        vectors = torch.randn(3, dim, generator=torch.Generator().manual_seed(0))
        self.vectors = torch.nn.functional.normalize(vectors, dim=1)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens, labels = super().batch(rows)
        return tokens, self.vectors[labels]


class FakeImages:
    """Smooth gray random images in [-1, 1]."""

    def __init__(self, rows: int = 40, side: int = 16, seed: int = 0):
        source = torch.Generator().manual_seed(seed)
        coarse = (torch.rand(rows, 1, 2, 2, generator=source) * 2 - 1).expand(-1, 3, -1, -1)
        self.images = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear", align_corners=False)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, step: int = 0) -> Tensor:
        return self.images[torch.from_numpy(rows)]
