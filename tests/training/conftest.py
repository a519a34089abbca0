"""A model small enough to train in a test, and data for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

sys.path.append(str(Path(__file__).parents[1]))  # the processes that some tests start load this file on its own
import tiny

TINY: dict[str, Any] = {
    "name": "tiny",
    **{key: tiny.TINY[key] for key in ("image_size", "patch_sizes", "tokenizer", "attention")},
    "transformer": {**tiny.TINY["transformer"], "embed_dim": 32, "drop_path": 0.2, "gate_init": 0.1},
    "train": {
        "batch_size": 6,
        "epochs": None,
        "steps": 10,
        "log_every": 4,
        "checkpoint_every": 4,
        "optimizer": {"lr": 5e-3, "lr_batch": None, "warmup": 2},
    },
    "train_tokenizer": {
        "batch_size": 8,
        "steps": 10,
        "log_every": 4,
        "checkpoint_every": 4,
        "kmeans_batches": 2,
        "revive_every": 2,
        "optimizer": {"lr": 3e-3, "lr_batch": None, "warmup": 2, "schedule": "cosine"},
    },
}


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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by sharing work between threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """The tiny configuration, with settings of the form a.b=c."""

    def make(*settings: str) -> RunConfig:
        return load_config(None, (), _with(TINY, settings))

    return make


def _with(values: dict[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    from mvar_core.config.presets import merge, parse_setting

    for setting in settings:
        path, value = parse_setting(setting)
        for key in reversed(path):
            value = {key: value}
        values = merge(values, value)
    return values


@pytest.fixture
def make_tokens() -> type[FakeTokens]:
    """Tokens for a configuration."""
    return FakeTokens


@pytest.fixture
def make_images() -> type[FakeImages]:
    """Images of the tiny size."""
    return FakeImages


@pytest.fixture
def make_models() -> Callable[[RunConfig], tuple[Transformer, VQVAE]]:
    """A transformer and a tokenizer, the same ones for the same configuration."""

    def make(config: RunConfig) -> tuple[Transformer, VQVAE]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer = VQVAE(config.tokenizer, config.pyramid)
            with torch.no_grad():
                tokenizer.quantizer.codebook.normal_()
            return Transformer(config), tokenizer

    return make
