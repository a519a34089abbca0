"""The attention report: on tokens, images and own samples; its files; and the preset that it recommends."""

import html
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mvar_core
from mvar_core import Machine, Pipeline
from mvar_core.analysis.attention import measure_attention
from mvar_core.config.presets import load_config
from mvar_core.config.training import DataConfig
from mvar_core.data.images import ImageRows, open_images
from mvar_core.data.token_writer import write_token_cache
from mvar_core.errors import DataError, MvarError
from mvar_core.models import official
from mvar_core.models.directory import load_tokenizer, read_model_config, save_model, state_hash, tokenizer_hash
from mvar_core.models.transformer import Transformer
from mvar_core.workflows.attention import spread_classes

FIGURES = ["scale_mass", "window_mass", "last_scale", "layers"]
KEYS = {
    "model", "source", "num_images", "scale_mass", "window_mass", "window_mass_by_scale", "last_scale", "layers",
    "recommended", "reading", "savings", "plots", "plots_svg", "report", "preset",
}  # fmt: skip
analyze = partial(mvar_core.analyze_attention, machine=Machine(device="cpu", dtype="float32"))


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in flat(part)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("source", ["tokens", "data"])
def test_the_command_writes_a_report_of_tokens_or_images(mvar, model, tokens, images, tmp_path, source):
    given = ["--tokens", tokens] if source == "tokens" else ["--data", images]
    out = tmp_path / "attention"
    options = ["--checkpoint", model, "--out", out, "--device", "cpu", *given, "--num", 5]
    report = mvar("analyze-attention", *options, "--json").json
    assert report.keys() >= KEYS
    assert np.allclose(np.sum(report["scale_mass"], axis=1), 1)
    assert list(report["window_mass"]) == ["1", "3", "5", "7", "9", "11", "13", "15"]
    assert len(report["window_mass"]["3"]) == 3
    assert report["recommended"]["scale_prefixes"] == 1
    assert len(report["recommended"]["windows"]) == 3
    assert report["num_images"] == 5
    assert str(given[1]) in report["source"]
    assert list(report["plots"]) == list(report["plots_svg"]) == FIGURES
    for name in FIGURES:
        with Image.open(report["plots"][name]) as picture:
            assert picture.format == "PNG"
        assert ElementTree.parse(report["plots_svg"][name]).getroot().tag.endswith("svg")
    written = json.loads((out / "report.json").read_text())
    assert written == {key: value for key, value in report.items() if key not in ("seconds", "peak_memory_bytes")}
    pictures = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "report.json", "report.html", *pictures}
    check_page((out / "report.html").read_text(), report)
    shown = mvar("analyze-attention", *options, "--overwrite")
    assert shown.code == 0
    assert "scale_prefixes 1" in shown.out
    assert len(shown.out.splitlines()) < 50


def test_a_finished_report_is_read_and_an_unfinished_one_made_again(model, tokens, tmp_path):
    out = tmp_path / "out"
    first = analyze(model, out, tokens=tokens, num=3)
    report = out / "report.json"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = analyze(model, out, tokens=tokens, num=3)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert (again.scale_mass, again.sentences, again.tables) == (first.scale_mass, first.sentences, first.tables)
    with pytest.raises(DataError, match="num is 3 there, 4 asked"):
        analyze(model, out, tokens=tokens, num=4)
    content = report.read_bytes()
    report.write_text("{}")
    with pytest.raises(DataError, match=r"report\.json is damaged"):
        analyze(model, out, tokens=tokens, num=3)
    report.unlink()  # as if it had been killed before its last file
    (out / ".report.json.x.tmp").write_text("half")
    analyze(model, out, tokens=tokens, num=3)
    assert report.read_bytes() == content
    assert before.keys() == set(out.iterdir())


def check_page(page, report):
    """It needs nothing else, is well-formed, and shows the report's numbers."""
    assert page.count('src="data:image/svg+xml;base64,') == page.count('alt="') == len(FIGURES)
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "prefers-color-scheme: dark" in page
    assert all(f"<li>{html.escape(sentence).replace('&#x27;', '&#39;')}</li>" in page
               for sentence in report["reading"]["sentences"])  # fmt: skip
    windows = ",".join(map(str, report["recommended"]["windows"]))
    assert f"--set attention.scale_prefixes=1 --set attention.windows=[{windows}]</pre>" in page
    ElementTree.fromstring(page[page.index("<body>") : page.index("</body>") + len("</body>")])
    scales, recommended, saved = (
        [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    )
    assert [row[0] for row in scales] == ["scale", "1", "2", "4"]
    last = dict(zip(scales[0], scales[-1], strict=True))
    assert last["own"] == f"{report['scale_mass'][2][2]:.3f}"
    assert last["before"] == f"{report['scale_mass'][2][1]:.3f}"
    assert last["both"] == f"{report['scale_mass'][2][1] + report['scale_mass'][2][2]:.3f}"
    assert last["in 3×3 of own"] == f"{report['window_share']['3'][2]:.3f}"
    best = report["recommended"]
    for row, window, kept, own in zip(
        recommended[1:], best["windows"], best["kept_by_scale"], best["own_windows"], strict=True
    ):
        assert (row[1], row[2], row[5]) == (str(window or "whole"), f"{kept:.3f}", str(own or "whole"))
    assert [row[0].split(",")[0] for row in saved[1:]] == ["attention", "KV cache", "peak memory of sampling"]
    assert saved[1][3] == f"{report['savings']['attention_gmacs']['part']:.3f}"


def test_tokens_and_their_images_have_one_report(model, tokens, images, tmp_path):
    """With every image measured, the batch size does not matter either."""
    of_tokens = analyze(model, tmp_path / "a", tokens=tokens, num=12, batch_size=5)
    of_images = analyze(model, tmp_path / "b", data=images, num=12)
    for key in ("scale_mass", "layers", "window_mass_by_scale"):
        assert flat(getattr(of_tokens, key)) == pytest.approx(flat(getattr(of_images, key)), abs=1e-6)


def test_own_samples_are_those_that_the_model_generates(model, tmp_path):
    """Without tokens or images: the same tokens as `Pipeline.sample` generates, classes evenly spread."""
    report = analyze(model, tmp_path / "own", num=7, seed=3)
    assert report.num_images == 7
    assert "own samples" in report.source
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    labels = spread_classes(7, 3)
    tokens = pipe.sample(labels, seed=3).tokens
    expected = measure_attention(pipe.transformer, pipe.quantizer, [(tokens, torch.tensor(labels))], pipe.config)
    np.testing.assert_allclose(report.scale_mass, expected.scale_mass, atol=1e-6)
    np.testing.assert_allclose(report.window_mass["1"], expected.window_mass[1], atol=1e-6)
    entropy = [layer["entropy"] for layer in report.layers]
    np.testing.assert_allclose(entropy, expected.entropy_by_head.mean(axis=1), atol=1e-5)
    assert analyze(model, tmp_path / "other", num=7, seed=4).window_mass["1"] != report.window_mass["1"]


def test_classes_are_evenly_spread():
    assert spread_classes(7, 3) == [0, 0, 0, 1, 1, 2, 2]
    assert spread_classes(4, 1000) == [0, 250, 500, 750]
    assert spread_classes(2, 2) == [0, 1]


def test_published_files(golden_mvar, monkeypatch, tmp_path):
    """A pair of .pth files is measured as the directory that it converts to, on a cache of that directory too."""
    # Published files do not hold their pyramid; the golden ones have another than the published.
    sides = tuple(golden_mvar.spec["patch_nums"])
    monkeypatch.setattr(official, "PUBLISHED_PYRAMIDS", {256: sides})
    published = official.open_official(golden_mvar.model, golden_mvar.tokenizer)
    official.import_official(published, tmp_path / "directory")
    config = published.config
    folder = tmp_path / "images"
    for number in range(config.transformer.num_classes):
        (folder / f"c{number:02}").mkdir(parents=True)
        pixels = np.full((*config.image_shape, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"c{number:02}" / "0.png")
    digest = tokenizer_hash(tmp_path / "directory")
    assert state_hash(official.convert(golden_mvar.model, golden_mvar.tokenizer).tokenizer) == digest
    vqvae = load_tokenizer(tmp_path / "directory", config)
    cache = tmp_path / "cache"
    write_token_cache(
        cache, open_images(str(folder)), vqvae.encode, config=config, tokenizer_hash=digest, data=DataConfig()
    )
    files = {"tokenizer": golden_mvar.tokenizer, "num": 3}
    found = analyze(golden_mvar.model, tmp_path / "a", **files, tokens=cache)
    again = analyze(tmp_path / "directory", tmp_path / "b", tokens=cache, num=3)
    assert flat(found.scale_mass) == pytest.approx(flat(again.scale_mass), abs=1e-6)
    assert flat(found.layers) == pytest.approx(flat(again.layers), abs=1e-5)
    own = analyze(golden_mvar.model, tmp_path / "c", **files)
    assert "own samples" in own.source
    assert own.num_images == 3
    planned = analyze(golden_mvar.model, tmp_path / "dry", **files, dry_run=True).dry_run
    assert planned.cost.parameters > 0
    assert not (tmp_path / "dry").exists()


@pytest.fixture(scope="module")
def var(model, config, tmp_path_factory):
    """The model with VAR's attention, and weights that make it see near and far."""
    path = tmp_path_factory.mktemp("var") / "var"
    var_config = config.model.model_copy(update={"attention": type(config.attention)()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Transformer(var_config)
    tokenizer = Pipeline.from_pretrained(model, device="cpu", dtype="float32").tokenizer
    save_model(path, var_config, tokenizer=tokenizer.state_dict(), transformer=transformer.state_dict())
    return path


def test_the_recommended_preset_trains_and_samples(mvar, var, tokens, tmp_path):
    preset = tmp_path / "recommended.yaml"
    report = analyze(var, tmp_path / "out", tokens=tokens, keep=0.6, write_preset=preset)
    best = report.recommended
    assert report.preset == str(preset)
    assert best["kept"] >= 0.6
    assert best["scale_prefixes"] != "all" or any(best["windows"])  # 0.6 of nearly even attention needs less than all
    source = read_model_config(var)
    config = load_config(str(preset))
    assert config.attention.scale_prefixes == best["scale_prefixes"]
    assert tuple(config.windows) == tuple(best["windows"])
    for name in ("image_size", "patch_sizes", "tokenizer", "transformer", "sampling", "class_names", "conditioning"):
        assert getattr(config, name) == getattr(source, name), name
    written = yaml.safe_load(preset.read_text())
    needed = {"image_size", "patch_sizes", "tokenizer", "transformer", "attention", "sampling", "class_names"}
    assert written.keys() >= needed
    for command in (["train"], ["finetune-from-var", "--var-checkpoint", var]):
        out = tmp_path / command[0]
        given = ["--preset", preset, "--checkpoint", var, "--tokens", tokens, "--steps", 2, "--batch-size", 4]
        result = mvar(*command, *given, "--out", out, "--device", "cpu", "--json").json
        assert result["steps"] == 2
        assert np.isfinite(result["loss"])
        trained = read_model_config(out)
        assert trained.attention.scale_prefixes == best["scale_prefixes"]
        assert tuple(trained.windows) == tuple(best["windows"])
        assert Pipeline.from_pretrained(out, device="cpu").sample([0, 1], seed=0).images.shape[0] == 2
    planned = mvar("plan", "--checkpoint", var, "--batch-size", report.savings["batch_size"], "--dtype", "float32",
                   "--device", "cpu", "--json").json  # fmt: skip
    for key in ("attention_gmacs", "kv_cache_bytes", "sample_peak_bytes"):
        saved = report.savings[key]
        assert saved["model"] == planned[key]
        assert saved["part"] == pytest.approx(saved["recommended"] / planned[key])
    assert report.savings["attention_gmacs"]["part"] < 1


def test_a_preset_keeps_the_training_of_the_run_that_it_comes_from(mvar, preset, model, tokens, tmp_path):
    run = tmp_path / "run"
    settings = ["--set", "train.optimizer.lr=0.002", "--set", "seed=5", "--steps", 2]
    assert (
        mvar("train", "--preset", preset, "--checkpoint", model, "--tokens", tokens, "--out", run, *settings).code == 0
    )
    analyze(run, tmp_path / "out", tokens=tokens, write_preset=tmp_path / "again.yaml")
    config = load_config(str(tmp_path / "again.yaml"))
    assert config.train.optimizer.lr == 0.002
    assert config.train.batch_size == 4
    assert config.train.steps == 2
    assert config.seed == 5
    assert config.name == "again"


def test_conditions_that_are_not_the_models(config, model, images, tmp_path):
    """Images of classes that the model does not have; and a model that is conditioned on vectors."""
    more = tmp_path / "images"
    for number in range(5):
        (more / f"c{number}").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(more / f"c{number}" / "0.png")
    (more / "c4").rename(more / "dog")
    foreign = analyze(model, tmp_path / "a", data=more)
    own = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    pixels, _ = ImageRows(open_images(str(more)), own.config.image_shape).batch(range(5))
    expected = measure_attention(
        own.transformer, own.quantizer, [(own.encode(pixels), torch.tensor([3, 3, 3, 3, 1]))], config.model
    )
    assert np.allclose(foreign.scale_mass, expected.scale_mass, atol=1e-5)
    path = tmp_path / "vectors"
    values = config.model.model_dump() | {"conditioning": {"kind": "vector", "dim": 4}}
    of_vectors = type(config.model).model_validate(values)
    tokenizer = Pipeline.from_pretrained(model, device="cpu", dtype="float32").tokenizer
    state = Transformer(of_vectors).state_dict()
    save_model(path, of_vectors, tokenizer=tokenizer.state_dict(), transformer=state)
    for name, source in (("b", {}), ("c", {"data": images})):  # by an encoder that nobody named
        assert "without a condition" in analyze(path, tmp_path / name, **source, num=2).source


def test_what_cannot_be_done_is_refused_before_anything_is_measured(model, tokens, images, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model, run)
    (run / "config.yaml").write_text("train: {stpes: 3}\n")
    (tmp_path / "there.yaml").write_text("")
    for given, found in (
        ({"write_preset": tmp_path / "p.yaml"}, "stpes"),
        ({"write_preset": tmp_path / "p.txt"}, "p.txt"),
        ({"write_preset": tmp_path / "there.yaml"}, "there.yaml"),
        ({"data": images}, "--data"),
        ({"keep": 1.5}, "1.5"),
        ({"keep": float("nan")}, "keep"),
        ({"num": -1}, "num -1"),
        ({"batch_size": 0}, "batch-size 0"),
    ):
        with pytest.raises(MvarError, match=found):
            analyze(run, tmp_path / "out", tokens=tokens, **given)
    assert not (tmp_path / "p.yaml").exists()
    assert not (tmp_path / "out").exists()
