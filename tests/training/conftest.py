"""Fixtures over the tiny model of training; each is a function or class of tests/tiny_training.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tiny_training
import torch

from mvar_core.config import RunConfig
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose more by sharing work between threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    return tiny_training.make_config


@pytest.fixture
def make_tokens() -> type[tiny_training.FakeTokens]:
    return tiny_training.FakeTokens


@pytest.fixture
def make_images() -> type[tiny_training.FakeImages]:
    return tiny_training.FakeImages


@pytest.fixture
def make_models() -> Callable[[RunConfig], tuple[Transformer, VQVAE]]:
    return tiny_training.make_models
