from pathlib import Path

import numpy as np
import pytest
import torch

from mvar_core import Pipeline
from mvar_core.config import Machine, ModelConfig, SamplingConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import BackendError, CheckpointError, ConfigError, DataError
from mvar_core.models import official
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE


@pytest.fixture(scope="module")
def pipeline(mvar_directory: Path) -> Pipeline:
    return Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="float32")


def test_shapes_and_types(pipeline: Pipeline) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    tokens = pipeline.encode(images)
    assert (tokens.shape, tokens.dtype) == ((2, 30), torch.int64)
    decoded = pipeline.decode(tokens.to(torch.int32))
    assert (decoded.shape, decoded.dtype) == ((2, 3, 64, 64), torch.float32)
    for labels in ([1, 2], torch.tensor([1, 2]), np.array([1, 2])):
        logits = pipeline.logits(tokens, labels)
        assert (logits.shape, logits.dtype) == ((2, 30, 64), torch.float32)
    out = pipeline.sample(labels=[3, 3, 7], cfg=1.5, top_k=9, top_p=0.96, seed=0)
    assert (out.images.shape, out.images.dtype) == ((3, 64, 64, 3), torch.uint8)
    assert (out.tokens.shape, out.labels) == ((3, 30), (3, 3, 7))
    assert not torch.equal(out.images[0], out.images[1])


def test_images_are_those_of_the_tokens(pipeline: Pipeline) -> None:
    out = pipeline.sample([3, 5], top_k=9)
    bytes_of_tokens = ((pipeline.decode(out.tokens) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (bytes_of_tokens.int() - out.images.int()).abs().max() <= 1


def test_results_can_be_trained_on(pipeline: Pipeline) -> None:
    """What comes out is ordinary tensors, not ones that autograd refuses."""
    tokens = pipeline.sample([0], top_k=5).tokens
    weight = torch.ones(64, 1, requires_grad=True)
    torch.nn.functional.embedding(tokens, weight).sum().backward()
    assert weight.grad is not None


def test_inputs_that_are_not_the_models(pipeline: Pipeline) -> None:
    with pytest.raises(DataError, match=r"images .*64, 64.* found float32 of shape .1, 3, 32, 32"):
        pipeline.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match=r"\(B, 30\)"):
        pipeline.decode(torch.zeros(1, 29, dtype=torch.int64))
    with pytest.raises(DataError, match="the codebook has 64"):
        pipeline.decode(torch.full((1, 30), 64))


def published_files(folder: Path, name: str, wrapper: str | None) -> tuple[Path, ModelConfig]:
    """A small model on the published pyramid, written as published."""
    small = [
        "transformer.depth=1",
        "transformer.embed_dim=64",
        "transformer.num_heads=1",
        "transformer.num_classes=4",
        "tokenizer.base_channels=32",
        "tokenizer.codebook_size=16",
        "tokenizer.latent_channels=4",
        "sampling.top_k=16",
    ]
    config = load_config(f"{wrapper or 'var'}-d16-256".replace("_wo_ddp", ""), small).model
    torch.manual_seed(0)
    model = official.transformer_to_official(Transformer(config).state_dict(), config)
    tokenizer = official.tokenizer_to_official(VQVAE(config.tokenizer, config.pyramid).state_dict(), config)
    official.save_official(model, folder / name, wrapper=wrapper)
    official.save_official(tokenizer, folder / "vae_small.pth")
    return folder / name, config


@pytest.mark.parametrize("wrapper", [None, "mvar_wo_ddp"])
def test_a_published_file_loads_as_it_is(tmp_path: Path, wrapper: str | None) -> None:
    path, config = published_files(tmp_path, "model.pth", wrapper)
    pipeline = Pipeline.from_pretrained(path, device="cpu", dtype="float32")
    assert pipeline.config.patterns == config.patterns
    assert pipeline.config.attention.scale_prefixes == (1 if wrapper else "all")
    pipeline.save_pretrained(tmp_path / "directory")
    again = Pipeline.from_pretrained(tmp_path / "directory", device="cpu", dtype="float32")
    first, second = pipeline.sample([1], cfg=1.0), again.sample([1], cfg=1.0)
    assert first.images.shape == (1, 256, 256, 3)
    assert torch.equal(first.images, second.images)


def test_what_cannot_be_loaded(tmp_path: Path, mvar_directory: Path) -> None:
    path, _ = published_files(tmp_path, "model.pth", None)
    (tmp_path / "vae_small.pth").unlink()
    with pytest.raises(CheckpointError, match="needs its tokenizer"):
        Pipeline.from_pretrained(path)
    with pytest.raises(ConfigError, match="not a device"):
        Pipeline.from_pretrained(mvar_directory, device="gpu")
    with pytest.raises(BackendError, match="'dens' is not a backend. Did you mean dense"):
        Pipeline.from_pretrained(mvar_directory, device="cpu", attention="dens")
    with pytest.raises(CheckpointError, match="does not exist"):
        Pipeline.from_pretrained(tmp_path / "nothing")


def test_the_encoder_is_loaded_when_it_is_asked_for(mvar_directory: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="float32")
    pipe.sample([1], top_k=5)
    assert not pipe._tokenizer.has_encoder
    assert pipe.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 30)
    again = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="float32")
    again.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy", device="cpu", dtype="float32")
    assert torch.equal(copy.encode(torch.zeros(1, 3, 64, 64)), pipe.encode(torch.zeros(1, 3, 64, 64)))


def test_a_tokenizer_without_its_encoder_says_what_is_missing(mvar_directory: Path, tmp_path: Path) -> None:
    loaded = Pipeline.from_pretrained(mvar_directory, device="cpu", dtype="float32")
    pipe = Pipeline(loaded.config, loaded._tokenizer, loaded.transformer)
    assert pipe.sample([1], top_k=5).images.shape == (1, 64, 64, 3)
    for use in (lambda: pipe.encode(torch.zeros(1, 3, 64, 64)), lambda: pipe.save_pretrained(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match="encoder.* Pipeline.from_pretrained"):
            use()


def test_settings_come_whole_or_by_name(pipeline: Pipeline) -> None:
    """Shorthands over the given settings over the model's, field by field."""
    recommended = pipeline.config.sampling
    assert pipeline.sampling_settings() == recommended
    asked = pipeline.sampling_settings(SamplingConfig(cfg=2.5, top_k=9), top_k=5, top_p=None)
    assert asked == recommended.model_copy(update={"cfg": 2.5, "top_k": 5})
    whole = pipeline.sample([3, 5], settings=SamplingConfig(cfg=2.5, top_k=9), seed=1)
    assert torch.equal(whole.images, pipeline.sample([3, 5], cfg=2.5, top_k=9, seed=1).images)
    with pytest.raises(ConfigError, match="topk.* top_k"):
        pipeline.sample([3], topk=9)


def test_a_machine_in_place_of_four_keywords(mvar_directory: Path) -> None:
    machine = Machine(device="cpu", dtype="float32", attention="dense", memory="375MB")
    pipe = Pipeline.from_pretrained(mvar_directory, machine=machine)
    assert (pipe.device.type, pipe.attention, pipe.memory) == ("cpu", "dense", 375_000_000)
    bounded = pipe.sample([3] * 12, top_k=9)
    assert torch.equal(bounded.tokens, pipe.sample([3] * 12, top_k=9, memory=2_000_000_000).tokens)


def test_a_stream_gives_the_same_samples_a_batch_at_a_time(pipeline: Pipeline) -> None:
    whole = pipeline.sample([3, 3, 7, 1, 2], top_k=9, seed=4)
    parts = list(pipeline.stream([3, 3, 7, 1, 2], top_k=9, seed=4, batch_size=2))
    assert [len(part.labels) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    with pytest.raises(ConfigError, match="class 12 does not exist"):
        pipeline.stream([12])


def test_a_memory_budget_bounds_the_batch_and_changes_nothing(pipeline: Pipeline) -> None:
    whole = pipeline.sample([3] * 12, top_k=9)
    bounded = pipeline.sample([3] * 12, top_k=9, memory=375_000_000)
    assert torch.equal(bounded.tokens, whole.tokens)
    with pytest.raises(ConfigError, match="--memory"):
        pipeline.sample([3], memory=10_000_000)


def test_a_tokenizer_that_would_not_be_used_is_refused(mvar_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"vae\.pth is not used"):
        Pipeline.from_pretrained(mvar_directory, tokenizer="vae.pth")
