from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.models.directory import load_tokenizer, read_model_config
from mvar_core.training.checkpoints import latest_checkpoint, load_checkpoint
from mvar_core.training.metrics import read_metrics
from mvar_core.training.parallel import BatchPart
from mvar_core.training.perceptual import PerceptualLoss
from mvar_core.training.tokenizer import (
    TokenizerObjective,
    balanced_sample,
    count_codes,
    kmeans_centres,
    measure_tokenizer,
    perplexity,
    psnr,
    revive_dead_codes,
    start_codebook,
    train_tokenizer,
)


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
    (result, measures), tokenizer = train(
        tmp_path, "train_tokenizer.steps=60", "train_tokenizer.optimizer.lr=0.01", validation=held_out
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    first, last = lines[0], [line for line in lines if "psnr" in line][-1]
    assert last["psnr"] > first["psnr"] + 1  # dB; with one thread or several, 2 to 5
    assert result.loss < first["loss"]
    assert measures.psnr == pytest.approx(lines[-1]["val_psnr"], rel=1e-4)
    assert len(measures.usage_per_scale) == 3
    assert max(measures.usage_per_scale) <= measures.code_usage
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
    (result, measures), _ = train(tmp_path / "parts", on_step=stop)
    assert (result.steps, result.interrupted, measures.usage_per_scale) == (step, True, ())
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


ADVERSARIAL = (
    "train_tokenizer.adversarial.weight=0.5",
    "train_tokenizer.adversarial.start=2",
    "train_tokenizer.adversarial.channels=8",
    "train_tokenizer.adversarial.layers=2",
    "train_tokenizer.adversarial.lecam=0.01",
    "train_tokenizer.scale_dropout=0.5",
)


class Pixels(PerceptualLoss):
    """A stand-in that is small: squared differences of neighbouring pixels."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def forward(self, images_BCHW, targets_BCHW):
        return (images_BCHW - targets_BCHW).diff(dim=-1).square().mean(dim=(1, 2, 3))


def test_a_resumed_run_with_a_discriminator_equals_an_uninterrupted_one_to_the_bit(train, tmp_path):
    def stop(report) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    settings = (*ADVERSARIAL, "train_tokenizer.perceptual.weight=1")
    _, whole = train(tmp_path / "whole", *settings, perceptual=Pixels())
    train(tmp_path / "parts", *settings, perceptual=Pixels(), on_step=stop)
    _, parts = train(tmp_path / "parts", *settings, perceptual=Pixels())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    last = [load_checkpoint(latest_checkpoint(tmp_path / run)).objective for run in ("whole", "parts")]
    assert any(name.startswith("adversary.network.") for name in last[0])
    assert any(name.startswith("adversary.optimizer.") for name in last[0])
    assert last[0].keys() == last[1].keys()
    for name, value in last[0].items():
        assert torch.equal(value, last[1][name]), name
    lines = [
        [{key: line.get(key) for key in line if not key.endswith(("second", "bytes"))} for line in read_metrics(path)]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


def test_the_adversarial_loss_starts_at_its_step_and_every_part_is_logged(train, tmp_path):
    settings = (*ADVERSARIAL[1:], "train_tokenizer.log_every=1")
    _, without = train(tmp_path / "without", *settings, "train_tokenizer.steps=2")
    _, late = train(tmp_path / "late", *settings, ADVERSARIAL[0], "train_tokenizer.steps=2")
    for name, value in without.state_dict().items():
        assert torch.equal(value, late.state_dict()[name]), name
    train(tmp_path / "on", *settings, ADVERSARIAL[0], "train_tokenizer.perceptual.weight=2", perceptual=Pixels())
    lines = [line for line in read_metrics(tmp_path / "on" / "metrics.jsonl") if "loss" in line]
    names = ("adversarial", "adversarial_weight", "discriminator", "logit_real", "logit_fake")
    for line in lines:
        present = [line.get(name) is not None for name in names]
        assert present == [line["step"] > 2] * 5, line
        parts = line["reconstruction"] + 2 * line["perceptual"] + line["quantizer"]
        if line["step"] > 2:
            parts += line["adversarial_weight"] * line["adversarial"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)


def test_gradients_reach_encoder_codebook_decoder_and_phi_and_leave_the_discriminator_alone(
    make_config, make_models, make_images
):
    config = make_config(*ADVERSARIAL, "train_tokenizer.perceptual.weight=1", "tokenizer.residual_convs=3")
    tokenizer = make_models(config)[1]
    objective = TokenizerObjective(
        tokenizer,
        make_images(),
        None,
        config,
        device=torch.device("cpu"),
        seed=0,
        perceptual=Pixels(),
    )
    loss, _ = objective.loss(tokenizer, make_images().batch(np.arange(8)), 5, BatchPart(0, 8, 8))
    loss.backward()
    for part in (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in objective.adversary.network.parameters())


def test_scale_dropout_decodes_the_first_scales_alone_and_leaves_loss_and_tokens_as_they_are(make_config, make_models):
    config = make_config()
    tokenizer = make_models(config)[1]
    quantizer = tokenizer.quantizer
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = tokenizer.encode_features(images)
    whole = quantizer(features)
    shown = torch.tensor([1, 2, 3, 3])
    partial = quantizer(features, shown_scales_B=shown)
    assert torch.equal(partial.loss, whole.loss)
    assert torch.equal(partial.tokens_BL, whole.tokens_BL)
    for row, count in enumerate(shown.tolist()):
        fhat = quantizer.empty_features(1)
        for scale in range(count):
            tokens = whole.tokens_BL[row : row + 1, quantizer.pyramid.spans[scale]]
            fhat = fhat + quantizer.increment(quantizer.embed(tokens), scale)
        torch.testing.assert_close(partial.features_BZhw[row : row + 1], fhat, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(partial.features_BZhw.sum(), features)[0]
    assert torch.equal(gradient, torch.ones_like(gradient))  # straight through, whatever is shown


def test_how_many_scales_are_shown_is_the_rows_own_and_the_steps(make_config, make_models, make_images):
    config = make_config("train_tokenizer.scale_dropout=0.5")
    tokenizer = make_models(config)[1]
    objective = TokenizerObjective(tokenizer, make_images(), None, config, device=torch.device("cpu"), seed=0)
    whole = objective.shown_scales(3, BatchPart(0, 600, 600))
    assert torch.equal(whole[100:200], objective.shown_scales(3, BatchPart(100, 200, 600)))
    assert not torch.equal(whole, objective.shown_scales(4, BatchPart(0, 600, 600)))
    counts = torch.bincount(whole, minlength=4)[1:] / 600
    np.testing.assert_allclose(counts, [1 / 6, 1 / 6, 2 / 3], atol=0.06)


def test_scale_dropout_makes_fewer_scales_decode_better(train, make_images, tmp_path):
    found = {}
    for dropout in (0, 0.7):
        settings = (f"train_tokenizer.scale_dropout={dropout}", "train_tokenizer.steps=80")
        _, tokenizer = train(tmp_path / str(dropout), *settings, "train_tokenizer.optimizer.lr=0.01")
        measures = measure_tokenizer(tokenizer, make_images(seed=1), by_scales=True)
        found[dropout] = measures.psnr_by_scales
        assert measures.psnr_by_scales[-1] == pytest.approx(measures.psnr, abs=1e-3)
    assert found[0.7][0] > found[0][0] + 0.5
    lines = read_metrics(tmp_path / "0.7" / "metrics.jsonl")
    assert not any("val_psnr_by_scales" in line for line in lines)  # there is nothing to validate on


def test_validation_shows_what_fewer_scales_decode_to(train, make_images, tmp_path):
    train(tmp_path, "train_tokenizer.scale_dropout=0.5", validation=make_images(seed=1))
    line = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "val_psnr" in line][-1]
    assert len(line["val_psnr_by_scales"]) == 3
    assert line["val_psnr_by_scales"][-1] == pytest.approx(line["val_psnr"], rel=1e-4)


def test_a_kept_codebook_is_not_started_again(train, make_config, make_models, tmp_path):
    frozen = ("train_tokenizer.optimizer.lr=1e-12", "train_tokenizer.revive_every=0", "train_tokenizer.steps=1")
    before = make_models(make_config())[1].quantizer.codebook
    _, kept = train(tmp_path / "kept", *frozen, keep_codebook=True)
    _, started = train(tmp_path / "started", *frozen)
    torch.testing.assert_close(kept.quantizer.codebook, before)
    assert (started.quantizer.codebook - before).abs().max() > 0.1


def test_a_run_that_started_elsewhere_is_not_resumed(train, tmp_path):
    train(tmp_path, "train_tokenizer.steps=4", started_from={"start": "one"})
    with pytest.raises(CheckpointError, match=r"started_from.start \(checkpoint one, now other\)"):
        train(tmp_path, "train_tokenizer.steps=4", started_from={"start": "other"})


def test_a_perceptual_loss_that_cannot_be_is_refused(train, make_images, tmp_path):
    with pytest.raises(ConfigError, match="was not loaded"):
        train(tmp_path, "train_tokenizer.perceptual.weight=1")
    small = ("image_size=8", "patch_sizes=[1, 1, 2]", "attention.windows=[]", "train_tokenizer.perceptual.weight=1")
    with pytest.raises(ConfigError, match="needs images of 16 pixels or more; these have 8×8"):
        train(tmp_path, *small, images=make_images(side=8), perceptual=Pixels())
