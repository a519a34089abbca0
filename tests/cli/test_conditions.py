"""Models of vectors on the command line: tokens with vectors, training, and sampling by words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mvar_core.config.presets import load_config
from mvar_core.data.tokens import TokenCache
from mvar_core.data.vectors import embed_words
from mvar_core.models.directory import read_model_config
from mvar_core.pipeline import Pipeline
from mvar_core.sampling.images import Samples
from mvar_core.sampling.shards import SampleShards

DIM = 12


@pytest.fixture(scope="session")
def words_preset(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "words.yaml"
    conditioning = {"kind": "vector", "dim": DIM, "encoder": "hashed-words"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(preset.read_text()), "conditioning": conditioning}))
    return path


@pytest.fixture(scope="module")
def trained(words_preset: Path, model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on words, made from images by one command."""
    from typer.testing import CliRunner

    from mvar_cli.app import app

    out = tmp_path_factory.mktemp("run") / "run"
    arguments = ["train", "--preset", words_preset, "--checkpoint", model, "--data", images, "--out", out]
    result = CliRunner().invoke(app, [*map(str, arguments), "--set", "train.sample_every=2", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    return out


def test_training_on_images_makes_the_words(trained: Path) -> None:
    cache = TokenCache.open(trained / "tokens")
    assert cache.manifest.vectors is not None
    assert cache.manifest.vectors.encoder == "hashed-words"
    assert read_model_config(trained).conditioning.encoder == "hashed-words"
    assert (trained / "samples" / "step-00000002.png").is_file()


def test_words_give_the_images_of_their_vectors(mvar, trained: Path, tmp_path: Path) -> None:
    arguments = ["--words", "a dog", "--words", "Dogs!", "--num", 2, "--seed", 3, "--device", "cpu"]
    sampled = mvar("sample", "--checkpoint", trained, *arguments, "--out", tmp_path / "png", "--json").json
    assert [Path(path).name for path in sampled["outputs"]] == [
        "00000_a-dog.png", "00001_a-dog.png", "00002_Dogs.png", "00003_Dogs.png"
    ]  # fmt: skip
    mvar("sample", "--checkpoint", trained, *arguments, "--batch-size", 1, "--out", tmp_path / "a.npz")
    vectors = embed_words(["a dog", "Dogs!"], DIM)
    np.save(tmp_path / "v.npy", vectors)
    mvar(
        "sample", "--checkpoint", trained, "--vectors", tmp_path / "v.npy", *arguments[4:], "--out", tmp_path / "b.npz"
    )
    pipeline = Pipeline.from_pretrained(trained, device="cpu", dtype="float32")
    expected = pipeline.sample(conditions=vectors.repeat(2, axis=0), seed=3).images.numpy()
    with np.load(tmp_path / "a.npz") as words, np.load(tmp_path / "b.npz") as other:
        assert np.array_equal(words["arr_0"], expected)
        assert np.array_equal(other["arr_0"], expected)
        assert words["labels"].tolist() == [1, 1, -1, -1]  # "a dog" is how class 1 is said
        assert other["labels"].tolist() == [-1] * 4


def test_classes_are_sampled_by_their_names(mvar, trained: Path, tmp_path: Path) -> None:
    command = ["sample", "--checkpoint", trained, "--device", "cpu"]
    assert mvar(*command, "--class", "golden retriever", "--out", tmp_path / "a.npz").code == 0
    assert mvar(*command, "--words", "golden retriever", "--out", tmp_path / "b.npz").code == 0
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert np.array_equal(first["arr_0"], second["arr_0"])
        assert first["labels"].tolist() == second["labels"].tolist() == [2]
    plan = mvar(*command, "--words", "a dog", "--out", tmp_path / "c.npz", "--dry-run", "--json").json
    assert plan["images"] == 1


def test_other_words_are_another_run(mvar, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped resumes with the same words alone."""
    sample = ["sample", "--checkpoint", trained, "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "a.npz"]
    sample += ["--num", 2, "--batch-size", 1]
    write, written = SampleShards.write, []

    def stopping(self: SampleShards, shard: int, samples: Samples) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, samples)

    with monkeypatch.context() as patch:
        patch.setattr(SampleShards, "write", stopping)
        assert mvar(*sample, "--words", "a dog").code == 130
    assert "vectors is" in mvar(*sample, "--words", "a cat").error
    assert mvar(*sample, "--words", "a dog", "--json").json["resumed"] == 1


def test_what_a_model_is_not_conditioned_on_is_refused(mvar, trained: Path, model: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.npz", "--device", "cpu"]
    assert mvar("sample", "--checkpoint", trained, *out).code == 2
    assert "Give one of them" in mvar("sample", "--checkpoint", trained, "--words", "a", "--class", "1", *out).error
    assert "conditioned on class labels" in mvar("sample", "--checkpoint", model, "--words", "a", *out).error
    assert "holds no word" in mvar("sample", "--checkpoint", trained, "--words", "?", *out).error
    np.save(tmp_path / "v.npy", np.ones((2, 5), np.float32))
    assert "vectors of 5 values" in mvar(
        "sample", "--checkpoint", trained, "--vectors", tmp_path / "v.npy", *out
    ).error  # fmt: skip
    save_file({"vectors": torch.ones(2, DIM)}, tmp_path / "v.safetensors", metadata={"encoder": "clip"})
    assert "vectors by clip" in mvar(
        "sample", "--checkpoint", trained, "--vectors", tmp_path / "v.safetensors", *out
    ).error  # fmt: skip


def test_vectors_of_another_encoder(mvar, preset: Path, model: Path, images: Path, tmp_path: Path) -> None:
    """From a file through the cache to a model, which then says whose vectors it takes."""
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((12, 7)).astype(np.float16))
    tokenize = ["tokenize", "--checkpoint", model, "--data", images, "--out", tmp_path / "tokens"]
    assert mvar(*tokenize, "--vectors", tmp_path / "v.npy", "--encoder", "clip", "--json").json["images"] == 12
    vectors = ["--set", "conditioning.kind=vector", "--set", "conditioning.dim=7"]
    train = ["train", "--preset", preset, "--checkpoint", model, "--tokens", tmp_path / "tokens", "--device", "cpu"]
    assert mvar(*train, "--out", tmp_path / "run", *vectors).code == 0
    assert read_model_config(tmp_path / "run").conditioning.encoder == "clip"
    sample = ["sample", "--checkpoint", tmp_path / "run", "--out", tmp_path / "x.npz", "--device", "cpu"]
    assert "vectors by clip" in mvar(*sample, "--words", "a dog").error
    assert "has none for its classes" in mvar(*sample, "--class", "1").error
    assert mvar(*sample, "--vectors", tmp_path / "v.npy").code == 0
    wrong = mvar(*train, "--out", tmp_path / "other", *vectors[:2], "--set", "conditioning.dim=8")
    assert "conditioning.dim=7" in wrong.error
    assert mvar(*train, "--out", tmp_path / "classes").code == 0  # a class model ignores them
    analyse = ["analyze-attention", "--checkpoint", tmp_path / "run", "--data", images, "--num", 2]
    assert mvar(*analyse, "--out", tmp_path / "attention", "--device", "cpu").code == 0


def test_tokens_without_vectors_are_refused(
    mvar, words_preset: Path, model: Path, tokens: Path, tmp_path: Path
) -> None:
    train = ["train", "--preset", words_preset, "--checkpoint", model, "--tokens", tokens, "--out", tmp_path / "run"]
    assert "holds no vectors" in mvar(*train, "--device", "cpu").error


def test_tokenize_refuses_what_contradicts(mvar, model: Path, images: Path, tmp_path: Path) -> None:
    command = ["tokenize", "--checkpoint", model, "--data", images, "--out", tmp_path / "tokens"]
    assert "conditioning.dim=64" in mvar(*command, "--words").error
    assert "--vectors FILE" in mvar(*command, "--encoder", "clip").error
    np.save(tmp_path / "v.npy", np.ones((5, 7), np.float32))
    assert "5 vectors; expected 12" in mvar(*command, "--vectors", tmp_path / "v.npy").error


def test_every_command_takes_a_model_of_words(
    mvar, trained: Path, words_preset: Path, images: Path, classifier: Path, tmp_path: Path
) -> None:
    device = ["--device", "cpu"]
    image = next((images / "cat").iterdir())
    edit = ["edit", "--checkpoint", trained, "--image", image, "--box", "0,0,8,16", "--out", tmp_path / "edit"]
    assert mvar(*edit, "--words", "a dog", *device).code == 0
    assert (tmp_path / "edit" / f"00000_{image.stem}_a-dog.png").is_file()
    analyse = ["analyze-attention", "--checkpoint", trained, "--out", tmp_path / "attention", *device]
    assert mvar(*analyse, "--tokens", trained / "tokens", "--num", 2).code == 0
    assert mvar(*analyse, "--num", 2, "--overwrite").code == 0  # its own samples
    assert mvar("plan", "--checkpoint", trained, "--json").json["parameters"] > 0
    evaluate = ["evaluate", "--checkpoint", trained, "--num-samples", 6, "--reference", images]
    evaluate += ["--features", classifier]
    found = mvar(*evaluate, "--metrics", "fid", "--json", *device).json
    assert found["num_samples"] == 6
    assert (
        "conditioned on vectors"
        in mvar("convert", "--model", trained, "--to", "official", "--out", tmp_path / "o").error
    )


@pytest.mark.parametrize("what", ["sample", "train"])
def test_bench_measures_models_of_words(words_preset: Path, what: str) -> None:
    from mvar_core.config import Machine
    from mvar_core.workflows.bench_row import MEASUREMENTS, Request

    config = load_config(str(words_preset))
    row = MEASUREMENTS[what](Request(what=what, config=config, batch_size=3, repeats=1, machine=Machine(device="cpu")))
    assert row["seconds"] > 0


def test_a_run_from_class_weights_says_what_starts_from_scratch(
    mvar, trained: Path, model: Path, words_preset: Path, tmp_path: Path
) -> None:
    command = ["finetune-from-var", "--var-checkpoint", model, "--preset", words_preset, "--device", "cpu"]
    outcome = mvar(*command, "--tokens", trained / "tokens", "--out", tmp_path / "run", "--steps", 1)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "started-from.json").read_text())
    assert report["counts"]["initialised"] == 3
    assert "vector_embedding.projection.weight: initialised" in outcome.err
