"""A model small enough to run everything on: 16×16 pixels, three scales, three classes; fixtures of every room."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mvar_core.config import ModelConfig, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.data.token_writer import write_token_cache
from mvar_core.models.directory import save_model, tokenizer_hash
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

CLASSES = ("cat", "dog", "golden retriever")
TINY: dict[str, Any] = {
    "description": "for tests",
    "image_size": 16,
    "patch_sizes": [1, 2, 4],
    "tokenizer": {
        "codebook_size": 16,
        "latent_channels": 4,
        "base_channels": 8,
        "channel_multipliers": [1, 1, 2],
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "middle_blocks": 1,
        "attention": False,
        "norm_groups": 4,
    },
    "transformer": {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
    "attention": {"scale_prefixes": 1, "windows": [0, 0, 3]},
    "sampling": {"cfg": 1.0, "top_k": 8, "top_p": 0.9},
    "train": {"batch_size": 4, "steps": 4, "epochs": None, "checkpoint_every": 2, "log_every": 2},
    "train_tokenizer": {"batch_size": 4, "steps": 4, "checkpoint_every": 2, "log_every": 2, "kmeans_batches": 1},
}


def small_config(
    patch_sizes: Any = (1, 2, 4), prefixes: Any = "all", windows: Any = (), **transformer: Any
) -> ModelConfig:
    """A model of any pyramid, two pixels to a token."""
    height, width = (patch_sizes[-1],) * 2 if isinstance(patch_sizes[-1], int) else patch_sizes[-1]
    tokenizer = {"codebook_size": 16, "latent_channels": 4, "base_channels": 8, "channel_multipliers": [1, 2]}
    return ModelConfig(
        image_size=[2 * height, 2 * width],
        patch_sizes=patch_sizes,
        tokenizer={**tokenizer, "norm_groups": 4},
        transformer={"depth": 2, "embed_dim": 8, "num_heads": 2, "num_classes": 3} | transformer,
        attention={"scale_prefixes": prefixes, "windows": windows},
    )


@pytest.fixture(scope="session")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def config(preset: Path) -> RunConfig:
    return load_config(str(preset), [], {"class_names": CLASSES})


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each class, in class folders."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(4):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def model(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae, transformer = VQVAE(config.tokenizer, config.pyramid), Transformer(config.model)
        transformer.head.weight.data.mul_(50)
    save_model(path, config.model, tokenizer=vqvae.state_dict(), transformer=transformer.state_dict())
    return path


@pytest.fixture(scope="session")
def other_tokenizer(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the same sizes and other weights."""
    path = tmp_path_factory.mktemp("tokenizer") / "other"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vqvae = VQVAE(config.tokenizer, config.pyramid)
    save_model(path, config.model, tokenizer=vqvae.state_dict())
    return path


@pytest.fixture(scope="session")
def tokens(images: Path, model: Path, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache of the images, made by the model's tokenizer."""
    from mvar_core.data.images import open_images
    from mvar_core.models.directory import load_tokenizer

    path = tmp_path_factory.mktemp("cache") / "tokens"
    vqvae = load_tokenizer(model, config.model)
    write_token_cache(
        path,
        open_images(str(images)),
        vqvae.encode,
        config=config.model,
        tokenizer_hash=tokenizer_hash(model),
        data=config.data,
    )
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo classifier with random weights."""
    from mvar_core.evaluation.demo import DemoClassifier

    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    network = DemoClassifier(3, (16, 16))
    network.initialise(torch.Generator().manual_seed(0))
    network.save(path)
    return path
