"""Training from Python: what a cache alone is enough for, resuming, interruption, dry runs."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from PIL import Image

import mvar_core as mvar
from mvar_core.config.presets import load_config
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.models.directory import read_model_config
from mvar_core.workflows import recipes

SMALL = {"depth": 1, "steps": 3, "batch_size": 4}
QUICK = ["tokenizer.base_channels=8", "tokenizer.codebook_size=16", "train_tokenizer.kmeans_batches=1"]


@pytest.fixture(scope="module")
def cache(model, images, tmp_path_factory):
    """A token cache that records a tokenizer of its own, which a test may move."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(model, folder / "tokenizer")
    return mvar.tokenize(tokenizer=folder / "tokenizer", data=str(images), out=folder / "tokens").path


def test_a_cache_is_enough(cache, tmp_path):
    steps = []
    result = mvar.train(
        tokens=str(cache), out=str(tmp_path / "run"), progress=lambda stage, done, *_, **__: steps.append(done), **SMALL
    )
    assert (result.steps, result.model, result.interrupted, steps) == (3, tmp_path / "run", False, [1, 2, 3])
    config = read_model_config(result.model)
    assert config.patch_sizes == (1, 2, 4)
    assert config.image_size == 16
    assert config.tokenizer.codebook_size == 16
    assert config.class_names == ("cat", "dog", "golden retriever")
    assert (config.transformer.depth, config.transformer.embed_dim, config.transformer.num_heads) == (1, 64, 1)
    assert config.attention.scale_prefixes == 1
    again = mvar.train(tokens=cache, out=tmp_path / "run", **SMALL)
    assert (again.loss, again.steps) == (result.loss, 3)
    assert json.loads(json.dumps(result.to_dict()))["model"] == str(tmp_path / "run")


def test_depth_is_laid_over_a_preset(cache, preset, tmp_path):
    result = mvar.train(tokens=cache, preset=str(preset), out=tmp_path / "run", depth=2, steps=1, dry_run=True)
    transformer = result.to_dict()["configuration"]["transformer"]
    assert (transformer["depth"], transformer["embed_dim"], transformer["num_heads"]) == (2, 128, 2)
    assert {"cost", "plan", "steps", "rows"} <= result.to_dict().keys()
    assert not (tmp_path / "run").exists()


def test_a_preset_for_another_size_is_laid_over_the_cache(cache, tmp_path):
    planned = mvar.train(tokens=cache, preset="mvar-64", out=tmp_path / "run", dry_run=True).to_dict()["configuration"]
    preset = load_config("mvar-64")
    assert (planned["image_size"], planned["patch_sizes"]) == (16, [1, 2, 4])
    assert planned["tokenizer"] == read_model_config(cache.parent / "tokenizer").tokenizer.model_dump(mode="json")
    assert planned["class_names"] == ["cat", "dog", "golden retriever"]
    assert planned["transformer"]["depth"] == preset.transformer.depth
    assert planned["train"]["optimizer"] == preset.train.optimizer.model_dump(mode="json", exclude_none=True) | {
        "betas": [0.9, 0.95]
    }
    result = mvar.train(tokens=cache, preset="mvar-64", out=tmp_path / "run", **SMALL)
    assert read_model_config(result.model).patch_sizes == (1, 2, 4)
    with pytest.raises(DataError, match="another pyramid"):
        mvar.train(tokens=cache, preset="mvar-64", image_size=24, out=tmp_path / "other", **SMALL)


def test_a_dry_run_is_what_the_run_does(cache, images, model, tmp_path):
    for name, given in (("cache", {"tokens": cache}), ("images", {"data": str(images), "tokenizer": model})):
        out = tmp_path / name
        planned = mvar.train(out=out, dry_run=True, **given, **SMALL).to_dict()
        assert not out.exists()
        assert any("1 2 4 for 16×16" in step for step in planned["plan"])
        mvar.train(out=out, **given, **SMALL)
        done = yaml.safe_load((out / "config.yaml").read_text())
        assert planned["configuration"] == json.loads(json.dumps(without_none(done)))
        assert planned["steps"] == 3
    given = {"data": str(images), "out": tmp_path / "tok", "steps": 1, "settings": QUICK}
    planned = mvar.train_tokenizer(**given, dry_run=True).to_dict()
    assert planned["configuration"]["image_size"] == 16
    mvar.train_tokenizer(**given)
    assert planned["configuration"] == without_none(yaml.safe_load((tmp_path / "tok" / "config.yaml").read_text()))


def without_none(values):
    if not isinstance(values, dict):
        return values
    return {key: without_none(value) for key, value in values.items() if value is not None}


def test_training_suits_the_number_of_images(cache, tmp_path):
    planned = mvar.train(tokens=cache, out=tmp_path / "run", dry_run=True).to_dict()
    assert planned["configuration"]["train"]["batch_size"] <= 16
    assert planned["steps"] * planned["configuration"]["train"]["batch_size"] >= 100 * 12
    deeper = mvar.train(tokens=cache, out=tmp_path / "run", depth=6, dry_run=True).to_dict()["configuration"]
    assert deeper["transformer"]["embed_dim"] == 64 * deeper["transformer"]["num_heads"] == 64 * 6
    assert deeper["train"]["optimizer"]["lr"] < planned["configuration"]["train"]["optimizer"]["lr"]
    small, large = recipes.recipe_for(140), recipes.recipe_for(1_281_167)
    assert small.base_channels < large.base_channels
    assert small.codebook_size < large.codebook_size
    assert small.depth < large.depth


def test_a_run_begun_with_other_defaults_continues_as_it_began(cache, images, tmp_path):
    """As a run of an earlier version does, whose defaults were others."""
    run = {"tokens": cache, "out": tmp_path / "run"}
    mvar.train(**run, depth=2, steps=2, batch_size=3, settings=["train.optimizer.lr=0.002"])
    assert mvar.train(**run, steps=3).steps == 3
    done = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (done["train"]["batch_size"], done["transformer"]["depth"]) == (3, 2)
    with pytest.raises(CheckpointError, match="depth"):
        mvar.train(**run, steps=3, depth=1)
    tokenizer = {"data": str(images), "out": tmp_path / "tokenizer"}
    mvar.train_tokenizer(**tokenizer, steps=1, settings=QUICK)
    assert mvar.train_tokenizer(**tokenizer, steps=2).steps == 2


def test_the_tokenizer_is_found_from_another_folder(cache, tmp_path, monkeypatch):
    project = tmp_path / "project" / "runs"
    project.mkdir(parents=True)
    shutil.copytree(cache.parent / "tokenizer", project / "tokenizer")
    shutil.copytree(cache, project / "tokens")
    path = project / "tokens" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "runs/tokenizer"}))
    monkeypatch.chdir(tmp_path)
    assert mvar.train(tokens="project/runs/tokens", out="run", **SMALL).steps == 3
    (tmp_path / "project").rename(tmp_path / "moved")
    assert mvar.train(tokens=tmp_path / "moved" / "runs" / "tokens", out="moved-run", **SMALL).steps == 3


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(64, 64)] * 3, 64), ([(96, 64)] * 3, (96, 64)), ([(30, 30)] * 3, 28), ([(100, 130)] * 3, (96, 128)),
        ([(400, 300), (200, 500), (90, 80)], 64), ([(40, 60), (33, 50), (200, 300)], 32), ([(500, 500)] * 2, 64),
        ([(1, 1)] * 2, 16),
    ],
)  # fmt: skip
def test_the_size_follows_the_images(shapes, size, tmp_path):
    for number, (height, width) in enumerate(shapes):
        Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / f"{number}.png")
    planned = mvar.train_tokenizer(data=tmp_path, out=tmp_path / "out", dry_run=True).to_dict()
    assert planned["configuration"]["image_size"] == (list(size) if isinstance(size, tuple) else size)
    assert planned["cost"]["tokens"] < 1200
    asked = mvar.train_tokenizer(data=tmp_path, out=tmp_path / "out", image_size="160x128", dry_run=True).to_dict()
    assert asked["configuration"]["image_size"] == [160, 128]
    assert asked["configuration"]["patch_sizes"][-1] == [20, 16]


def test_a_tokenizer_that_is_gone_is_named(cache, model, tmp_path):
    moved = tmp_path / "tokens"
    shutil.copytree(cache, moved)
    path = moved / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "tokenizer": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match=r"gone.*--tokenizer"):
        mvar.train(tokens=moved, out=tmp_path / "run", **SMALL)
    assert mvar.train(tokens=moved, tokenizer=model, out=tmp_path / "run", **SMALL).steps == 3


def test_an_interruption_is_saved_and_resumed(cache, tmp_path):
    def interrupt(stage, done, *_, **__):
        if done == 2:
            raise KeyboardInterrupt

    result = mvar.train(tokens=cache, out=tmp_path / "run", progress=interrupt, **SMALL)
    assert (result.steps, result.interrupted) == (2, True)
    resumed = mvar.train(tokens=cache, out=tmp_path / "run", **SMALL)
    assert (resumed.steps, resumed.interrupted) == (3, False)
    assert resumed.loss == mvar.train(tokens=cache, out=tmp_path / "whole", **SMALL).loss


def test_a_tokenizer_from_python(images, preset, tmp_path):
    settings = {"data": str(images), "out": tmp_path / "tok", "preset": str(preset)}
    result = mvar.train_tokenizer(**settings, steps=2)
    assert (result.steps, result.model) == (2, tmp_path / "tok")
    assert read_model_config(result.model).transformer is None
    longer = mvar.train_tokenizer(**settings, steps=3)
    assert longer.steps == 3


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"step": 1}, "Did you mean steps"),
        ({"steps": 1.5}, "steps.*1.5"),
        ({"steps": 0}, "steps.*0"),
        ({"epochs": float("nan")}, "epochs.*nan"),
        ({"epochs": 1e308}, r"epochs.*1e\+308"),
        ({"out": "a\0b"}, "out.*no path"),
        ({"out": "1" * 5000}, "out.*no path"),
        ({"validation": "1" * 5000}, "validation.*no path"),
    ],
)
def test_arguments_that_cannot_be_are_named(cache, tmp_path, argument, found):
    given = {"tokens": cache, "out": tmp_path / "run", **(SMALL if "epochs" not in argument else {}), **argument}
    with pytest.raises(ConfigError, match=found):
        mvar.train(**given)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_classes_of_validation_are_matched_by_name(cache, images, tmp_path):
    for name in ("cat", "dog", "golden retriever"):
        shutil.copytree(images / name, tmp_path / "other" / name.title().replace(" ", "_").replace("Cat", "cat"))
    losses = [
        mvar.train(tokens=cache, validation=data, out=tmp_path / f"run-{number}", checkpoint_every=3, **SMALL)
        for number, data in enumerate((images, tmp_path / "other"))
    ]
    assert losses[0].validation_loss == pytest.approx(losses[1].validation_loss, rel=1e-6)
    (tmp_path / "other" / "Dog").rename(tmp_path / "other" / "Fox")
    with pytest.raises(DataError, match=r"Fox.*--validation"):
        mvar.train(tokens=cache, validation=tmp_path / "other", out=tmp_path / "run", **SMALL)


def test_a_changed_token_shard_ends_the_training(cache, tmp_path):
    changed = tmp_path / "tokens"
    shutil.copytree(cache, changed)
    shard = next(path for path in changed.iterdir() if path.name.startswith("tokens"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name}.*mvar tokenize"):
        mvar.train(tokens=changed, out=tmp_path / "run", **SMALL)
    assert mvar.train(tokens=changed, machine=mvar.Machine(verify=False), out=tmp_path / "other", **SMALL).steps == 3
