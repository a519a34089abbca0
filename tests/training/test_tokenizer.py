from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mvar_core.errors import DataError
from mvar_core.models.directory import load_tokenizer, read_model_config
from mvar_core.training.codebook import (
    balanced_sample,
    count_codes,
    kmeans_centres,
    perplexity,
    revive_dead_codes,
    start_codebook,
)
from mvar_core.training.record import read_metrics
from mvar_core.training.tokenizer import measure_tokenizer, psnr, train_tokenizer


@pytest.fixture
def train(make_config, make_models, make_images):
    """Train the tiny tokenizer; returns result and tokenizer."""

    def run(out: Path, *settings: str, images=None, **options):
        config = make_config(*settings)
        _, tokenizer = make_models(config)
        return train_tokenizer(
            tokenizer, make_images() if images is None else images, config, out, **options
        ), tokenizer

    return run


def test_reconstruction_improves_and_the_run_directory_is_a_tokenizer_directory(train, make_images, tmp_path):
    held_out = make_images(seed=1)
    result, tokenizer = train(
        tmp_path, "train_tokenizer.steps=60", "train_tokenizer.optimizer.lr=0.01", validation=held_out
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    first, last = lines[0], [line for line in lines if "psnr" in line][-1]
    assert last["psnr"] > first["psnr"] + 2
    assert result.loss < first["loss"]
    assert result.psnr == pytest.approx(lines[-1]["val_psnr"], rel=1e-4)
    assert len(result.usage_per_scale) == 3
    assert max(result.usage_per_scale) <= result.code_usage
    config = read_model_config(tmp_path)
    assert config.transformer is None
    assert config.provenance["tokenizer_steps"] == 60
    loaded = load_tokenizer(tmp_path, config, "cpu", torch.float32)
    images = held_out.batch(np.arange(4))
    assert loaded.encode(images).equal(tokenizer.encode(images))


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train, tmp_path, step):
    def stop(report) -> None:
        if report.step == step:
            raise KeyboardInterrupt

    _, whole = train(tmp_path / "whole")
    result, _ = train(tmp_path / "parts", on_step=stop)
    assert (result.steps, result.interrupted, result.usage_per_scale) == (step, True, ())
    assert not (tmp_path / "parts" / "tokenizer.safetensors").exists()
    _, parts = train(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    keys = ("step", "loss", "psnr", "usage_per_scale", "code_usage", "revived")
    lines = [
        [[line.get(key) for key in keys] for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_every_step_asks_for_its_own_crops(train, make_images, tmp_path):
    images = make_images()
    asked = []

    class Crops:
        def __len__(self) -> int:
            return len(images)

        def batch(self, rows: np.ndarray, step: int = 0) -> torch.Tensor:
            asked.append(step)
            return images.batch(rows)

    train(tmp_path, images=Crops(), validation=images)
    assert asked == [0, 0, 1, *range(10)]  # the check of the size, two batches of k-means, ten steps


def usage(quantizer, features) -> float:
    counts = count_codes(quantizer.encode(features), quantizer.pyramid, quantizer.codebook.shape[0])
    return float((counts.sum(0) > 0).double().mean())


@pytest.fixture
def poor_quantizer(make_config, make_models):
    """A quantizer of whose codes only one is near the features, and features."""
    quantizer = make_models(make_config())[1].quantizer
    with torch.no_grad():
        quantizer.codebook.fill_(50.0)
        quantizer.codebook[3] = 0.0
    features = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return quantizer, features


def test_kmeans_start_raises_usage_and_lowers_the_error(poor_quantizer):
    quantizer, features = poor_quantizer
    before = (quantizer.decode(quantizer.encode(features)) - features).square().mean()
    assert usage(quantizer, features) == 1 / 16
    start_codebook(quantizer, features, seed=0)
    after = (quantizer.decode(quantizer.encode(features)) - features).square().mean()
    assert usage(quantizer, features) >= 15 / 16
    assert after < 0.7 * before


def test_kmeans_start_is_reproducible(make_config, make_models):
    features = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    codebooks = []
    for seed in (0, 0, 1):
        quantizer = make_models(make_config())[1].quantizer
        start_codebook(quantizer, features, seed)
        codebooks.append(quantizer.codebook.detach())
    assert codebooks[0].equal(codebooks[1])
    assert not codebooks[0].equal(codebooks[2])


def test_kmeans_depends_on_the_seed_alone_and_fills_up():
    vectors = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert kmeans_centres(vectors, 8, seed=1).equal(kmeans_centres(vectors, 8, seed=1))
    few = torch.eye(3).repeat(4, 1)
    centres = kmeans_centres(few, 8, seed=0)
    assert centres.shape == (8, 3)
    assert len(centres.unique(dim=0)) == 8
    assert torch.cdist(centres, torch.eye(3)).min(dim=1).values.max() < 0.1


def test_revival_raises_usage_and_forgets_the_moments(poor_quantizer):
    quantizer, features = poor_quantizer
    optimizer = torch.optim.AdamW([quantizer.codebook], lr=1e-3)
    quantizer.codebook.grad = torch.ones_like(quantizer.codebook)
    optimizer.step()
    kept = quantizer.codebook[3].detach().clone()
    counts = count_codes(quantizer.encode(features), quantizer.pyramid, 16).sum(0)
    moved = revive_dead_codes(quantizer, features, counts, optimizer, torch.Generator().manual_seed(0))
    assert moved == 15
    assert usage(quantizer, features) >= 0.6
    moments = optimizer.state[quantizer.codebook]
    dead = torch.arange(16) != 3
    assert (moments["exp_avg"][dead] == 0).all()
    assert (moments["exp_avg_sq"][dead] == 0).all()
    assert moments["exp_avg"][3].abs().min() > 0
    assert quantizer.codebook[3].equal(kept)
    full = torch.ones(16)
    assert revive_dead_codes(quantizer, features, full, optimizer, torch.Generator()) == 0


def test_training_revives_only_until_its_end(train, tmp_path):
    settings = ("train_tokenizer.kmeans_batches=0", "train_tokenizer.log_every=1", "tokenizer.codebook_size=200")
    train(tmp_path / "on", *settings, "train_tokenizer.revive_until=0.5")
    revived = [line["revived"] for line in read_metrics(tmp_path / "on" / "metrics.jsonl") if "revived" in line]
    assert revived[0] == 0
    assert 0 < revived[1] < revived[3]
    assert set(revived[4:]) == {revived[3]}
    train(tmp_path / "off", *settings, "train_tokenizer.revive_every=0")
    lines = [line for line in read_metrics(tmp_path / "off" / "metrics.jsonl") if "revived" in line]
    assert {line["revived"] for line in lines} == {0}


def test_balanced_sample_takes_the_same_number_from_each_scale():
    vectors = [torch.full((count, 2), float(count)) for count in (3, 50, 400)]
    sample = balanced_sample(vectors, 60, torch.Generator().manual_seed(0))
    assert [(sample[:, 0] == count).sum().item() for count in (3, 50, 400)] == [3, 20, 20]


def test_perplexity_of_known_counts():
    counts = torch.tensor([[5, 5, 5, 5], [9, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(perplexity(counts), torch.tensor([4.0, 1.0, 2.0, 1.0]).double())


def test_psnr_of_known_errors():
    images = torch.zeros(2, 3, 4, 4)
    others = images + torch.tensor([0.2, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(images, others), torch.tensor([20.0, 0.0]))


def test_measures_do_not_depend_on_batches(make_config, make_models, make_images):
    _, tokenizer = make_models(make_config())
    first = measure_tokenizer(tokenizer, make_images(), batch_size=40)
    second = measure_tokenizer(tokenizer, make_images(), batch_size=7)
    assert first.psnr == pytest.approx(second.psnr, abs=1e-3)
    assert first.code_usage == second.code_usage
    assert measure_tokenizer(tokenizer, make_images(), limit=5).images == 5


def test_images_that_do_not_fit_are_refused(train, make_images, tmp_path):
    with pytest.raises(DataError, match="3×12×12.*3×16×16"):
        train(tmp_path, images=make_images(side=12))
    with pytest.raises(DataError, match="no images"):
        train(tmp_path, images=make_images(rows=0))
    assert not list(tmp_path.iterdir())
