"""Every command on a tiny model: what it writes, and the keys of its JSON object."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mvar_core import SamplingConfig


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_plan(mvar, preset, model):
    keys = {"parameters", "attention_gmacs", "total_gmacs", "kv_cache_bytes", "sample_peak_bytes", "train_peak_bytes"}
    plan = mvar("plan", "--preset", preset, "--device-memory", "1GB", "--json").json
    assert keys <= plan.keys()
    assert all({"side", "tokens", "attention_gmacs"} <= scale.keys() for scale in plan["scales"])
    assert [scale["side"] for scale in plan["scales"]] == [1, 2, 4]
    assert plan["largest_batch"] > 1
    assert mvar("plan", "--checkpoint", model, "--json").json["parameters"] == plan["parameters"]
    wider = mvar("plan", "--preset", preset, "--set", "attention.scale_prefixes=all", "--json").json
    assert wider["kv_cache_bytes"] > plan["kv_cache_bytes"] == 0
    listed = mvar("plan").out
    assert "mvar-d16-256" in listed
    assert mvar("plan", "--preset").out == listed
    assert mvar("plan", "--preset", "--json").json == mvar("plan", "--json").json
    assert "attention GMACs" in mvar("plan", "--preset", preset).out


def test_plan_lists_the_presets(mvar):
    listed = mvar("plan", "--json").json["presets"]
    names = {entry["name"] for entry in listed}
    assert {"digits", "var-d16-256", "mvar-d16-256"} <= names


def test_train_tokenizer_tokenize_train_sample(mvar, preset, images, tmp_path):
    tokenizer, tokens, model = tmp_path / "tokenizer", tmp_path / "tokens", tmp_path / "mvar"
    trained = mvar("train-tokenizer", "--preset", preset, "--data", images, "--out", tokenizer, "--json").json
    assert {"steps", "loss", "model", "seconds"} <= trained.keys()
    assert trained["steps"] == 4
    cached = mvar("tokenize", "--checkpoint", tokenizer, "--data", images, "--out", tokens, "--flip", "--json").json
    assert {"images": 12, "views": 2, "bytes": cached["bytes"], "seconds": cached["seconds"]}.items() <= cached.items()
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", tokenizer, "--out", model]
    result = mvar("train", *options, "--json").json
    assert {"steps", "loss", "model", "seconds"} <= result.keys()
    config = json.loads((model / "config.json").read_text())
    assert config["class_names"] == ["cat", "dog", "golden retriever"]
    assert config["transformer"]["num_classes"] == 3
    assert config["attention"]["windows"] == [0, 0, 3]
    again = mvar("train", *options, "--json").json
    assert again["loss"] == result["loss"]
    grid = tmp_path / "grid.png"
    sampled = mvar("sample", "--checkpoint", model, "--class", "dog", "--out", grid, "--json").json
    assert sampled["outputs"] == [str(grid)]
    assert read(grid).shape == (16, 16, 3)


def test_training_resumes_where_it_stopped(mvar, preset, tokens, model, tmp_path):
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--validation", tokens, "--json"]
    straight = mvar("train", *options, "--out", tmp_path / "a").json
    assert straight["validation_loss"] > 0
    mvar("train", *options, "--out", tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "step-00000004.pt").unlink()
    resumed = mvar("train", *options, "--out", tmp_path / "b").json
    assert resumed["loss"] == straight["loss"]
    first, second = (tmp_path / name / "transformer.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_loop_has_flags_of_its_own(mvar, preset, tokens, model, tmp_path):
    options = ["--preset", preset, "--tokens", tokens, "--checkpoint", model, "--validation", tokens, "--json"]
    flags = [
        "--micro-batch",
        2,
        "--activation-checkpointing",
        "--ema",
        0.9,
        "--checkpoint-every",
        1,
        "--set",
        "train.keep=3",
    ]
    plain = mvar("train", *options, *flags, "--out", tmp_path / "plain").json
    assert plain["best_step"] is not None
    assert len(list((tmp_path / "plain" / "checkpoints").iterdir())) in (3, 4)
    written = yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())["train"]
    assert (written["micro_batch"], written["ema"], written["keep"]) == (2, 0.9, 3)
    assert written["activation_checkpointing"] is True

    # Pictures on the way are made with the model as it is, and leave it as it was.
    assert (
        mvar("train", *options, *flags, "--set", "train.sample_every=3", "--out", tmp_path / "pictured").json["steps"]
        == 4
    )
    assert [path.name for path in sorted((tmp_path / "pictured" / "samples").iterdir())] == [
        "step-00000003.png", "step-00000004.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "pictured" / "samples" / "step-00000004.png") as picture:
        assert picture.size == (3 * 18 - 2, 2 * 18 - 2)
    first, second = (tmp_path / name / "transformer.safetensors" for name in ("plain", "pictured"))
    assert first.read_bytes() == second.read_bytes()
    assert mvar("sample", "--checkpoint", tmp_path / "plain" / "best", "--class", 0, "--out", tmp_path / "x").code == 0


def test_contradicting_or_impossible_loop_flags_are_refused(mvar, preset, tokens, model, tmp_path, monkeypatch):
    options = ["train", "--preset", preset, "--tokens", tokens, "--checkpoint", model, "--out", tmp_path / "out"]
    assert "both divide a batch" in mvar(*options, "--micro-batch", 2, "--set", "train.accumulate=2").error
    assert "train.ema" in mvar(*options, "--ema", 1).error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tensorboard" in mvar(*options, "--set", "train.tensorboard=true").error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["photographs", "folder"])
def test_a_tokenizer_trains_on_random_crops_of_any_size(mvar, preset, tmp_path, data):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, shape in enumerate([(20, 31, 3), (17, 90, 3), (64, 16, 3)]):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8)).save(folder / f"{number}.png")
    given = ["--preset", preset, "--data", folder if data == "folder" else data, "--out", tmp_path / "out"]
    given += ["--set", "data.crop=random", "--set", "data.crop_scale=0.5", "--set", "data.flip=true"]
    first = mvar("train-tokenizer", *given, "--json").json
    assert first["steps"] == 4
    assert np.isfinite(first["psnr"])
    refused = mvar("train-tokenizer", *given, "--set", "data.crop_scale=0.9", "--json").error
    assert "data.crop_scale (checkpoint 0.5, now 0.9)" in refused


@pytest.mark.parametrize("command", ["train", "train-tokenizer"])
def test_an_interrupted_run_is_saved_and_resumed(mvar, preset, images, tokens, model, tmp_path, monkeypatch, command):
    source = ["--tokens", tokens, "--checkpoint", model] if command == "train" else ["--data", images]
    options = [command, "--preset", preset, *source, "--out", tmp_path / "run"]

    def interrupt(stage, done, total, *, unit, note):
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mvar_cli.console.progress", interrupt)
        outcome = mvar(*options, "--json")
    assert outcome.code == 130
    assert json.loads(outcome.out)["interrupted"] is True
    assert json.loads(outcome.out)["steps"] == 3
    assert "resumes" in outcome.err
    assert mvar(*options, "--json").json["steps"] == 4


def test_train_on_images_tokenizes_them_first(mvar, preset, images, model, tmp_path):
    out = tmp_path / "run"
    options = ["--preset", preset, "--data", images, "--checkpoint", model, "--out", out, "--json"]
    assert mvar("train", *options, "--epochs", "0.5").json["steps"] == 2
    assert (out / "tokens" / "manifest.json").is_file()
    assert mvar("train", *options, "--epochs", "0.5", "--overwrite").json["steps"] == 2


def test_finetune_from_var_takes_the_weights_and_not_the_mask(mvar, preset, tokens, model, tmp_path):
    settings = ["--set", "train.optimizer.lr=1e-12", "--set", "attention.scale_prefixes=2"]
    options = ["--preset", preset, "--var-checkpoint", model, "--tokens", tokens, "--out", tmp_path / "ft", *settings]
    result = mvar("finetune-from-var", *options, "--steps", 1, "--json")
    assert result.json["steps"] == 1
    from safetensors.torch import load_file

    before, after = (load_file(path / "transformer.safetensors") for path in (model, tmp_path / "ft"))
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-6), name
    config = json.loads((tmp_path / "ft" / "config.json").read_text())
    assert config["attention"]["scale_prefixes"] == 2
    assert str(model) in config["provenance"].values()


def test_sample_png(mvar, model, tmp_path):
    out = tmp_path / "png"
    options = ["--checkpoint", model, "--class", "2,cat", "--num", 2, "--out", out, "--save-tokens", "--stages"]
    sampled = mvar("sample", *options, "--json").json
    assert {"images", "seconds", "peak_memory_bytes", "outputs"} <= sampled.keys()
    assert sorted(path.name for path in out.glob("*.png")) == [
        "00000_2.png", "00001_2.png", "00002_0.png", "00003_0.png",
    ]  # fmt: skip
    assert read(out / "00000_2.png").shape == (16, 16, 3)
    strip = read(tmp_path / "png-stages" / "00000_2.png")
    assert strip.shape == (16, 48, 3)
    assert np.array_equal(strip[:, 32:], read(out / "00000_2.png"))
    assert all((out.parent / name).is_file() for name in sampled["outputs"])
    with np.load(out / "tokens.npz") as file:
        assert file["tokens"].shape == (4, 21)
        assert file["labels"].tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_samples_do_not_depend_on_the_batch(mvar, model, tmp_path, batch_size):
    options = ["--checkpoint", model, "--class", "all", "--num", 2, "--format", "npz", "--save-tokens"]
    for name, size in (("one.npz", 6), ("two.npz", batch_size)):
        mvar("sample", *options, "--out", tmp_path / name, "--batch-size", size, "--json").json  # noqa: B018
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    other = tmp_path / "three.npz"
    mvar("sample", *options, "--out", other, "--seed", 1)
    with np.load(other) as file, np.load(tmp_path / "one.npz") as first:
        assert not np.array_equal(file["tokens"], first["tokens"])
        assert file["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_sample_settings_are_used(mvar, model, tmp_path):
    options = ["--checkpoint", model, "--class", "all", "--num", 4, "--format", "npz", "--save-tokens", "--top-k", 1]
    sampled = mvar("sample", *options, "--cfg", 0, "--out", tmp_path / "greedy.npz", "--json").json
    assert sampled["settings"] == {**SamplingConfig(cfg=0, top_k=1, top_p=0.9).model_dump(mode="json"), "seed": 0}
    last = mvar("sample", *options, "--cfg", 2, "--cfg-scales", "2", "--memory", "2GB", "--out", tmp_path / "a.npz")
    assert last.code == 0
    constant = ("--cfg", 2, "--cfg-schedule", "0,0,2", "--out", tmp_path / "b.npz")
    assert mvar("sample", *options, *constant).code == 0
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert np.array_equal(first["tokens"], second["tokens"]), "linear guidance is cfg at the last scale"
    assert mvar("sample", *options, "--cfg-scales", "9", "--out", tmp_path / "c.npz").code == 1
    assert mvar("sample", *options, "--memory", "1MB", "--out", tmp_path / "c.npz").code == 1
    with np.load(tmp_path / "greedy.npz") as file:
        assert len(np.unique(file["tokens"][:4], axis=0)) == 1


def test_evaluate_images(mvar, images, classifier):
    options = ["--samples", images, "--reference", images, "--features", classifier]
    scores = mvar("evaluate", *options, "--json").json
    keys = {
        "fid", "sfid", "inception_score", "precision", "recall", "kid", "num_samples", "num_reference", "features",
        "comparable_to_papers", "why_not",
    }  # fmt: skip
    assert keys <= scores.keys()
    assert abs(scores["fid"]) < 1e-6
    assert scores["sfid"] is None
    assert scores["reasons"]["sfid"]
    assert scores["precision"] == scores["recall"] == 1
    assert scores["num_samples"] == scores["num_reference"] == 12
    assert scores["comparable_to_papers"] is False
    assert scores["why_not"]
    only = mvar("evaluate", *options, "--metrics", "kid", "--json").json
    assert only["fid"] is None
    assert only["kid"] is not None
    assert "Not comparable" in mvar("evaluate", *options).out


def test_evaluate_of_a_checkpoint_generates_the_same_samples(mvar, model, images, classifier, tmp_path):
    options = ["--reference", images, "--features", classifier, "--json"]
    sampled = mvar("evaluate", "--checkpoint", model, "--num-samples", 12, "--batch-size", 5, *options).json
    assert sampled["num_samples"] == 12
    assert sampled["classifier_accuracy"] is None  # cats and dogs are no digits
    again = mvar("evaluate", "--checkpoint", model, "--num-samples", 12, *options).json
    assert again["fid"] == pytest.approx(sampled["fid"], rel=1e-6)


def test_evaluate_with_inception_shows_published_rows(mvar, monkeypatch, tmp_path):
    """With an Inception network's place taken by a small one: the real weights are not at hand in tests."""
    from mvar_core.evaluation import extractors, features
    from mvar_core.io.weights import WeightsFile

    class Small:
        name, dim, comparable_to_papers, weights_hash = "inception", 4, True, "hash"

        def __call__(self, batch):
            return features.Features(batch.float().mean(dim=3)[:, 0, :4] / 255)

    monkeypatch.setattr(WeightsFile, "find", lambda self, path: path)
    monkeypatch.setattr(extractors, "load_inception", lambda path, device: Small())
    random = np.random.default_rng(0)
    path = tmp_path / "imagenet.npz"
    np.savez(path, arr_0=random.integers(0, 256, (8, 256, 256, 3), np.uint8))
    outcome = mvar("evaluate", "--samples", path, "--reference", path, "--metrics", "fid")
    assert outcome.code == 0, outcome.err
    assert "MVAR-d16, published" in outcome.out
    assert "3.09" in outcome.out


def test_convert_prints_what_it_wrote(mvar, golden_mvar, tmp_path):
    sides = ",".join(map(str, golden_mvar.spec["patch_nums"]))
    given = ["--model", golden_mvar.model, "--tokenizer", golden_mvar.tokenizer, "--kind", "mvar", "--pyramid", sides]
    out = tmp_path / "model"
    assert "mvar sample" in mvar("convert", *given, "--windows", golden_mvar.spec["k"], "--out", out).out
    found = mvar("convert", "--model", out, "--to", "official", "--out", tmp_path / "official", "--json").json
    assert found["kind"] == "mvar"
    written = {path.name for path in (tmp_path / "official").iterdir() if not path.name.startswith(".")}
    assert {path.rpartition("/")[2] for path in found["outputs"]} == written


def test_sampling_from_a_published_file(mvar, golden_mvar, tmp_path):
    """A file whose pyramid is not a published one must be converted first; its sides are no part of it."""
    assert "--pyramid" in mvar("sample", "--checkpoint", golden_mvar.model, "--class", 0, "--out", tmp_path / "x").error


def test_dry_runs_do_nothing(mvar, preset, images, tokens, model, tmp_path):
    out = tmp_path / "out"
    commands = [
        ["train-tokenizer", "--preset", preset, "--data", images],
        ["tokenize", "--checkpoint", model, "--data", images],
        ["train", "--preset", preset, "--tokens", tokens, "--checkpoint", model],
        ["train", "--preset", preset, "--data", images, "--checkpoint", model],
        ["finetune-from-var", "--preset", preset, "--tokens", tokens, "--var-checkpoint", model],
        ["sample", "--checkpoint", model, "--class", "all"],
        ["analyze-attention", "--checkpoint", model, "--data", images],
        ["quickstart"],
    ]
    for command in commands:
        planned = mvar(*command, "--out", out, "--dry-run", "--json").json
        assert planned["dry_run"] is True
        assert {"configuration", "cost", "plan"} <= planned.keys()
        assert "Nothing was done" in mvar(*command, "--out", out, "--dry-run").out
    assert list(tmp_path.iterdir()) == []
