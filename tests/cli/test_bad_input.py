"""Bad input: one clear line, exit 1, nothing written."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model directory, to be damaged."""
    return shutil.copytree(model, tmp_path / "broken")


def sample(mvar, checkpoint, out, *options):
    return mvar("sample", "--checkpoint", checkpoint, "--class", 0, "--out", out, *options)


def test_images_that_are_not_there(mvar, model, tmp_path):
    options = ["--checkpoint", model, "--out", tmp_path / "out"]
    assert "nowhere" in mvar("tokenize", "--data", tmp_path / "nowhere", *options).error
    (tmp_path / "empty").mkdir()
    assert "empty" in mvar("tokenize", "--data", tmp_path / "empty", *options).error
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("not an image")
    assert "text" in mvar("tokenize", "--data", tmp_path / "text", *options).error
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_images(mvar, model, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "cat" / "0.png").write_bytes(b"not an image")
    assert "0.png" in mvar("tokenize", "--checkpoint", model, "--data", folder, "--out", tmp_path / "out").error


def test_classes_that_do_not_exist(mvar, model, tmp_path):
    options = ["--checkpoint", model, "--out", tmp_path / "out"]
    assert "golden retriever" in mvar("sample", *options, "--class", "golden retreiver").error
    assert "#2" in mvar("sample", *options, "--class", "3").error


def test_a_cache_of_another_tokenizer(mvar, preset, tokens, model, other_tokenizer, tmp_path):
    from mvar_core.models.directory import tokenizer_hash

    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", other_tokenizer, "--out", tmp_path / "out"]
    error = mvar("train", *options).error
    assert tokenizer_hash(model) in error
    assert tokenizer_hash(other_tokenizer) in error


def test_checkpoints_with_missing_extra_and_misshaped_keys(mvar, broken, tmp_path):
    path = broken / "transformer.safetensors"
    weights = load_file(path)
    cases = {
        "missing": {name: value for name, value in weights.items() if name != "head.weight"},
        "unexpected": {**weights, "tail.weight": torch.zeros(1)},
        "shape": {**weights, "head.weight": torch.zeros(2, 2)},
    }
    names = {"missing": "head.weight", "unexpected": "tail.weight", "shape": "head.weight"}
    for case, state in cases.items():
        save_file(state, path)
        assert "--no-verify" in sample(mvar, broken, tmp_path / "out").error
        error = sample(mvar, broken, tmp_path / "out", "--no-verify").error
        assert case in error
        assert names[case] in error


def test_checkpoints_that_are_damaged(mvar, broken, tmp_path):
    path = broken / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "transformer.safetensors" in sample(mvar, broken, tmp_path / "out").error
    path.unlink()
    assert "transformer" in sample(mvar, broken, tmp_path / "out").error
    (broken / "config.json").write_text("{")
    assert "config.json" in sample(mvar, broken, tmp_path / "out").error
    assert "mvar train" in sample(mvar, tmp_path / "nowhere", tmp_path / "out").error


def test_a_configuration_with_unknown_keys(mvar, broken, tmp_path):
    values = json.loads((broken / "config.json").read_text())
    values["attention"]["window"] = 3
    (broken / "config.json").write_text(json.dumps(values))
    assert "windows" in sample(mvar, broken, tmp_path / "out").error


class Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_would_run_code(mvar, golden_mvar, tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"mvar_wo_ddp": Code()}, path)
    outcome = mvar("convert", "--model", path, "--tokenizer", golden_mvar.tokenizer, "--out", tmp_path / "out")
    assert "code" in outcome.error
    assert "never be printed" not in outcome.out + outcome.err
    path.write_bytes(pickle.dumps(Code()))
    outcome = mvar("convert", "--model", path, "--tokenizer", golden_mvar.tokenizer, "--out", tmp_path / "out")
    assert outcome.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("windows", "message"), [("[0,0,2]", "odd"), ("[3,3]", "3 scales"), ("[0,0,-1]", "odd")])
def test_windows_that_do_not_fit(mvar, preset, windows, message):
    assert message in mvar("plan", "--preset", preset, "--set", f"attention.windows={windows}").error


@pytest.mark.parametrize(("windows", "message"), [("4", "odd"), ("3,3", "scales"), ("x", "'x'")])
def test_windows_that_do_not_fit_a_published_file(mvar, golden_mvar, tmp_path, windows, message):
    sides = ",".join(map(str, golden_mvar.spec["patch_nums"]))
    given = ["--model", golden_mvar.model, "--tokenizer", golden_mvar.tokenizer, "--pyramid", sides]
    assert message in mvar("convert", *given, "--windows", windows, "--out", tmp_path / "out").error


def test_top_k_above_the_codebook(mvar, model, tmp_path):
    error = sample(mvar, model, tmp_path / "out", "--top-k", 17).error
    assert "17" in error
    assert "16" in error


def test_outputs_that_are_not_empty(mvar, preset, model, images, tokens, golden_mvar, tmp_path):
    out = tmp_path / "full"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    commands = [
        ["sample", "--checkpoint", model, "--class", 0],
        ["tokenize", "--checkpoint", model, "--data", images],
        ["train-tokenizer", "--preset", preset, "--data", images],
        ["train", "--preset", preset, "--tokens", tokens, "--checkpoint", model],
        ["finetune-from-var", "--preset", preset, "--tokens", tokens, "--var-checkpoint", model],
        ["analyze-attention", "--checkpoint", model, "--tokens", tokens],
        ["convert", "--model", golden_mvar.model, "--tokenizer", golden_mvar.tokenizer],
        ["quickstart"],
    ]
    for command in commands:
        error = mvar(*command, "--out", out).error
        assert "not empty" in error
        assert "--overwrite" in error
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_a_run_is_not_restarted_by_accident(mvar, preset, tokens, model, tmp_path):
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--out", tmp_path / "run"]
    assert mvar("train", *options).code == 0
    assert "--overwrite" in mvar("train", *options, "--no-resume").error
    error = mvar("train", *options, "--set", "train.optimizer.lr=1").error
    assert "train.optimizer.lr" in error or "optimizer.lr" in error
    assert mvar("train", *options, "--set", "train.optimizer.lr=1", "--overwrite").code == 0


def test_settings_that_cannot_be_used(mvar, preset):
    assert "transformer" in mvar("plan", "--preset", preset, "--set", "transfromer.depth=1").error
    assert "--set" in mvar("plan", "--preset", preset, "--set", "transformer.depth").error
    assert "digits" in mvar("plan", "--preset", "digit").error
    assert "nowhere.yaml" in mvar("plan", "--preset", "nowhere.yaml").error
    assert "24GB" in mvar("plan", "--preset", preset, "--device-memory", "lots").error


def test_flags_that_contradict_each_other(mvar, preset, tokens, images, model, tmp_path):
    options = ["--preset", preset, "--checkpoint", model, "--out", tmp_path / "out"]
    assert "--tokens" in mvar("train", *options).error
    assert "--tokens" in mvar("train", *options, "--tokens", tokens, "--data", images).error
    assert "--steps" in mvar("train", *options, "--tokens", tokens, "--steps", 1, "--epochs", 1).error
    assert "tokenizer's directory" in mvar("train", *options[:-1], model, "--tokens", tokens).error
    assert "--samples" in mvar("evaluate", "--reference", "digits").error
    analyze = ["analyze-attention", "--checkpoint", model, "--out", tmp_path / "out"]
    assert "--data" in mvar(*analyze, "--tokens", tokens, "--data", images).error
    assert "1.5" in mvar(*analyze, "--keep", 1.5).error
    assert ".yaml" in mvar(*analyze, "--write-preset", tmp_path / "preset.json").error
    (tmp_path / "there.yaml").write_text("mine")
    assert "there.yaml" in mvar(*analyze, "--write-preset", tmp_path / "there.yaml").error
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert "nothing to convert" in mvar("convert", "--out", tmp_path / "out").error


def test_machines_that_are_not_there(mvar, model, tmp_path):
    assert "cuda:99" in sample(mvar, model, tmp_path / "out", "--device", "cuda:99").error
    assert "float32" in sample(mvar, model, tmp_path / "out", "--dtype", "float23").error
    error = sample(mvar, model, tmp_path / "out", "--attention", "dens").error
    assert "dense" in error
    assert not (tmp_path / "out").exists()


def test_a_backend_is_checked_before_images_are_tokenized(mvar, preset, images, model, tmp_path):
    options = ["--preset", preset, "--data", images, "--checkpoint", model, "--out", tmp_path / "out"]
    assert "dense" in mvar("train", *options, "--attention", "dens").error
    assert not (tmp_path / "out").exists()


def test_evaluation_without_weights_says_so_before_sampling(mvar, model, images, monkeypatch, tmp_path):
    monkeypatch.setenv("MVAR_INCEPTION_WEIGHTS", str(tmp_path / "absent.pth"))
    outcome = mvar("evaluate", "--checkpoint", model, "--reference", images, "--num-samples", 4)
    assert "absent.pth" in outcome.error


def test_evaluation_of_things_that_are_not_images(mvar, images, classifier, tmp_path):
    options = ["--reference", images, "--features", classifier]
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 16, 16, 3)))
    assert "uint8" in mvar("evaluate", "--samples", tmp_path / "floats.npz", *options).error
    assert "nowhere" in mvar("evaluate", "--samples", tmp_path / "nowhere", *options).error
    assert "metric" in mvar("evaluate", "--samples", images, *options, "--metrics", "fdi").error
    assert "demo" in mvar("evaluate", "--samples", images, "--reference", images, "--features", "dmeo").error


def test_a_preset_of_another_size_is_laid_over_the_cache(mvar, tokens, model, tmp_path):
    """Not refused, and not trained at its own 256 px: the cache decides what the images are."""
    options = ["--preset", "mvar-d16-256", "--tokens", tokens, "--checkpoint", model, "--out", tmp_path / "out"]
    asked = mvar("train", *options, "--dry-run", "--json").json["configuration"]
    cache = json.loads((tokens / "manifest.json").read_text())
    assert asked["image_size"] == cache["image_size"] < 256
    assert asked["patch_sizes"] == cache["patch_sizes"]
    assert asked["transformer"]["depth"] == 16
    assert "fid" not in (asked.get("result") or {})
    assert not (tmp_path / "out").exists()


def test_empty_and_endless_values(mvar, model, tmp_path):
    for option in ("--format", "--device", "--class"):
        assert sample(mvar, model, tmp_path / "out", option, "").code == 2
    assert mvar("plan", "--preset", "").code == 2
    assert len(mvar("plan", "--preset", "x" * 10_000).error) < 2000
    assert len(sample(mvar, "x" * 10_000, tmp_path / "out").error) < 2000
