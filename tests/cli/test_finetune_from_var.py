"""Fine-tuning from published files: sizes from the file, attention from the options, and a word on every parameter."""

import json
from pathlib import Path
from typing import Any

import golden_models
import numpy as np
import pytest
import torch

from mvar_core import Pipeline
from mvar_core.config import RunConfig
from mvar_core.data.token_writer import write_token_cache
from mvar_core.models.directory import load_tokenizer, read_model_config, tokenizer_hash
from mvar_core.models.official import import_official, open_official
from mvar_core.pyramid import ScalePyramid


@pytest.fixture(scope="module", params=["var_small", "var_shared_adaln"])
def var(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> golden_models.GoldenCase:
    """A golden VAR whose file carries VAR's mask, as published files do."""
    case = golden_models.write_case(request.param, tmp_path_factory.mktemp(request.param))
    state = torch.load(case.model, weights_only=True)
    pyramid = ScalePyramid.from_patch_sizes(case.spec["patch_nums"])
    scales = torch.tensor(pyramid.scale_of_token)
    mask = torch.zeros(pyramid.num_tokens, pyramid.num_tokens).masked_fill(scales[:, None] < scales, -torch.inf)
    torch.save({"trainer": {"var_wo_ddp": {**state, "attn_bias_for_masking": mask[None, None], "lvl_1L": scales[None]}},
                "epoch": 3}, case.model)  # fmt: skip
    return case


@pytest.fixture(scope="module")
def cache(var: golden_models.GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of twelve images, encoded by the VAR's tokenizer."""
    from PIL import Image

    from mvar_core.data.images import open_images

    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("directory") / "var"
    published = open_official(var.model, var.tokenizer, kind="var", **var.options)
    import_official(published, directory)
    config = published.config
    assert config.transformer is not None
    for number in range(config.transformer.num_classes):
        (folder / f"c{number:02}").mkdir()
        pixels = random.integers(0, 256, (*config.image_shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"c{number:02}" / "0.png")
    vqvae = load_tokenizer(directory, config)
    out = tmp_path_factory.mktemp("tokens") / "cache"
    write_token_cache(
        out, open_images(str(folder)), vqvae.encode, config=config, tokenizer_hash=tokenizer_hash(directory),
        data=RunConfig().data,
    )  # fmt: skip
    return out


def options(var: golden_models.GoldenCase, cache: Path, out: Path, *more: Any) -> list[Any]:
    sides = ",".join(map(str, var.spec["patch_nums"]))
    return ["finetune-from-var", "--var-checkpoint", var.model, "--tokenizer", var.tokenizer,
            "--set", f"patch_sizes={sides}",
            "--tokens", cache, "--out", out, "--steps", 1, "--batch-size", 4, "--device", "cpu", "--dtype", "float32",
            *more]  # fmt: skip


def test_a_model_trained_from_var_has_the_attention_of_mvar(mvar, var, cache, tmp_path):
    """No preset: sizes come from the file. Earlier scales are perturbed, and nothing may change."""
    out = tmp_path / "run"
    assert mvar(*options(var, cache, out, "--windows", 3, "--json")).json["steps"] == 1
    config = read_model_config(out)
    assert config.attention.scale_prefixes == 1
    assert config.windows == (*(0,) * (config.pyramid.num_scales - 2), 3, 3)
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="float32")
    labels = torch.zeros(1, dtype=torch.long)
    inputs = torch.randn(1, config.pyramid.num_tokens - 1, config.tokenizer.latent_channels)
    with torch.no_grad():
        before = pipe.transformer(labels, inputs)
        changed = inputs.clone()
        third = config.pyramid.spans[2]
        changed[:, third.start - 1 : third.stop - 1] += 1.0
        after = pipe.transformer(labels, changed)
        own = (before - after).abs().amax(dim=(0, 2))
    assert own[third].min() > 1e-4
    own[third] = 0
    assert own.max() == 0  # neither later scales nor earlier ones see the third
    listed = json.loads((out / "started-from.json").read_text())
    ignored = [row["name"] for row in listed["parameters"] if row["action"] == "ignored"]
    assert {"attn_bias_for_masking", "lvl_1L"} <= set(ignored)
    assert listed["counts"]["loaded"] == len(pipe.transformer.state_dict())


def test_with_all_prefixes_and_no_windows_it_starts_as_var(mvar, var, cache, tmp_path):
    """Before training has changed anything, logits are those that the published VAR computes."""
    out = tmp_path / "run"
    settings = ["--scale-prefixes", "all", "--windows", 0, "--set", "train.optimizer.lr=1e-30"]
    said = mvar(*options(var, cache, out, *settings))
    assert said.code == 0, said.err
    pipe = Pipeline.from_pretrained(out, device="cpu", dtype="float32")
    tokens, labels = torch.from_numpy(var.tensors["token_indices"]), var.tensors["labels"]
    assert golden_models.relative_error(pipe.logits(tokens, labels), var.tensors["logits"]) < 1e-4


def test_what_does_not_add_up_is_refused_before_anything_is_written(mvar, var, cache, tmp_path, preset):
    out = tmp_path / "run"
    other = ("--preset", "mvar-d16-256-ft", "--set", f"image_size={var.spec['patch_nums'][-1] * 16}")
    assert "depth is" in mvar(*options(var, cache, out, *other)).error
    assert not out.exists()
    assert "by-number" in mvar(*options(var, cache, out, "--classes", "by-numbr")).error
    assert "must be odd" in mvar(*options(var, cache, out, "--windows", 4)).error


def test_classes_start_from_the_row_of_their_name(mvar, var, cache, tmp_path):
    """Weights that name the same classes in another order; then some others, none, and none in common."""
    start = tmp_path / "start"
    published = open_official(var.model, var.tokenizer, kind="var", **var.options)
    import_official(published, start)
    config = published.config
    count = config.transformer.num_classes
    names = [f"c{number:02}" for number in range(count)]
    values = json.loads((start / "config.json").read_text())

    def run(listed, *more):
        (start / "config.json").write_text(json.dumps({**values, "class_names": listed}))
        given = ["finetune-from-var", "--var-checkpoint", start, "--tokens", cache, "--steps", 1, "--batch-size", 2,
                 "--set", "train.optimizer.lr=1e-30", "--device", "cpu", "--overwrite", "--json"]  # fmt: skip
        return mvar(*given, "--out", tmp_path / "run", *more)

    def table(path):
        return Pipeline.from_pretrained(path, device="cpu", dtype="float32").transformer.class_embedding.weight.detach()

    assert run(names[::-1]).json["classes"] == {"matched": count, "new": 0, "dropped": 0}
    source = table(start)
    assert torch.equal(table(tmp_path / "run"), source[[*reversed(range(count)), count]])
    assert run([*names[1:], "lion"]).json["classes"] == {"matched": count - 1, "new": 1, "dropped": 1}
    assert torch.equal(table(tmp_path / "run"), source[[count, *range(count - 1), count]])
    numbered = run(None)
    assert numbered.json["classes"] == {"matched": count, "new": 0, "dropped": 0}
    assert "by number" in numbered.err
    assert torch.equal(table(tmp_path / "run"), source)
    others = [f"other {number}" for number in range(count)]
    assert "--classes new" in run(others).error
    assert run(others, "--classes", "by-number").json["classes"]["matched"] == count
    assert torch.equal(table(tmp_path / "run"), source)
    assert run(others, "--classes", "new").json["classes"] == {"matched": 0, "new": count, "dropped": count}
    assert torch.equal(table(tmp_path / "run")[-1], source[-1])


def test_a_start_made_of_another_file_is_not_mistaken(mvar, var, cache, tmp_path):
    out = tmp_path / "run"
    assert mvar(*options(var, cache, out)).code == 0
    assert mvar(*options(var, cache, out, "--dry-run")).code == 0
    other = tmp_path / "other.pth"
    other.write_bytes(var.model.read_bytes())
    given = options(var, cache, out)
    given[given.index(var.model)] = other
    assert "was made from model.pth, not from other.pth" in mvar(*given).error
