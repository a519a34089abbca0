"""`mvar train-tokenizer` beyond a plain run: first weights, other pyramids, the perceptual loss's files."""

import json

import pytest
import torch
import yaml

from mvar_core.models.directory import load_tokenizer, read_model_config

STILL = ("--set", "train_tokenizer.optimizer.lr=1e-12", "--set", "train_tokenizer.revive_every=0")


def weights(directory):
    return load_tokenizer(directory, read_model_config(directory)).state_dict()


def assert_same(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-6)


@pytest.fixture
def train(mvar, preset, images, tmp_path):
    def run(*options):
        return mvar("train-tokenizer", "--preset", preset, "--data", images, "--out", tmp_path / "out", *options)

    return run


def test_a_run_starts_from_another_tokenizer_at_another_size(train, other_tokenizer, tmp_path):
    settings = ["--set", "image_size=[24, 16]", "--set", "patch_sizes=[1, 2, [6, 4]]", *STILL]
    outcome = train("--start", other_tokenizer, *settings, "--json")
    assert outcome.json["steps"] == 4
    assert "Starting from the tokenizer" in outcome.err
    assert "scales were 1 2 4" in outcome.err
    assert_same(weights(tmp_path / "out"), weights(other_tokenizer))
    assert read_model_config(tmp_path / "out").image_shape == (24, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["provenance"]["start"] == str(other_tokenizer)


def test_a_run_starts_from_a_published_file(mvar, images, golden_mvar, mvar_directory, tmp_path):
    values = {
        "image_size": 16,
        "patch_sizes": [1],
        "tokenizer": read_model_config(mvar_directory).tokenizer.model_dump(mode="json"),
        "train_tokenizer": {"steps": 1, "batch_size": 2, "revive_every": 0, "optimizer": {"lr": 1e-12}},
    }
    preset = tmp_path / "golden.yaml"
    preset.write_text(yaml.safe_dump(values))
    given = ["--preset", preset, "--data", images, "--out", tmp_path / "out", "--start", golden_mvar.tokenizer]
    assert mvar("train-tokenizer", *given, "--json").json["steps"] == 1
    assert_same(weights(tmp_path / "out"), weights(mvar_directory))


def test_another_codebook_is_refused_or_trained_from_scratch(train, other_tokenizer, tmp_path):
    larger = ["--start", other_tokenizer, "--set", "tokenizer.codebook_size=24", *STILL]
    error = train(*larger).error
    assert "has 16 entries; this one has 24" in error
    assert "--new-codebook" in error
    assert train(*larger, "--new-codebook", "--json").json["steps"] == 4
    found, before = weights(tmp_path / "out"), weights(other_tokenizer)
    assert found["quantizer.codebook"].shape == (24, 4)
    del found["quantizer.codebook"], before["quantizer.codebook"]
    assert_same(found, before)


def test_another_network_is_refused_with_the_settings_that_would_fit(train, other_tokenizer, tmp_path):
    error = train("--start", other_tokenizer, "--set", "tokenizer.base_channels=16").error
    assert "another network: base_channels is 8 there and 16 here" in error
    assert "--set tokenizer.base_channels=8" in error
    assert "does not exist" in train("--start", tmp_path / "nowhere").error
    assert "goes with --start" in train("--new-codebook").error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_missing_perceptual_file_is_reported_before_anything_slow(train, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("MVAR_VGG_WEIGHTS", raising=False)
    error = train("--set", "train_tokenizer.perceptual.weight=1").error
    for part in ("vgg16-397923af.pth", "https://", "SHA-256", "--vgg-weights", "perceptual.weight=0"):
        assert part in error
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_adversarial_run_with_all_options_ends_in_a_model_directory(train, tmp_path):
    settings = ["adversarial.weight=0.5", "adversarial.channels=4", "adversarial.layers=2", "adversarial.start=1"]
    settings += ["scale_dropout=0.5", "ema=0.9", "micro_batch=2"]
    options = [option for setting in settings for option in ("--set", f"train_tokenizer.{setting}")]
    assert train(*options, "--json").json["steps"] == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"adversarial", "adversarial_weight", "discriminator", "perplexity_per_scale"} <= lines[-1].keys()
    assert weights(tmp_path / "out")


def test_the_flags_of_the_loop_are_keys_of_the_tokenizer_section(train, tmp_path):
    flags = {"micro-batch": 2, "ema": 0.5, "checkpoint-every": 1}
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    given += ["--set", "train_tokenizer.keep=3"]
    assert train(*given, "--json").json["steps"] == 4
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["train_tokenizer"]
    assert {name: written[name.replace("-", "_")] for name in flags} == flags
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) >= 3
