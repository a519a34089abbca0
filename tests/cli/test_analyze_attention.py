"""The attention report: on tokens, images and own samples; its files; and the preset that it recommends."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mvar_cli.attention_sources import spread_classes
from mvar_core import Pipeline
from mvar_core.config.presets import load_config
from mvar_core.models.directory import read_model_config, save_model, state_hash, tokenizer_hash
from mvar_core.models.transformer import Transformer

FIGURES = ["scale_mass", "window_mass", "last_scale", "layers"]
KEYS = {
    "model", "source", "num_images", "scale_mass", "window_mass", "window_mass_by_scale", "last_scale", "layers",
    "recommended", "reading", "savings", "plots", "plots_svg", "report", "preset",
}  # fmt: skip


def analyze(mvar, model, out, *given):
    return mvar("analyze-attention", "--checkpoint", model, "--out", out, "--device", "cpu", *given)


@pytest.mark.parametrize("source", ["tokens", "data"])
def test_a_report_of_tokens_or_images(mvar, model, tokens, images, tmp_path, source):
    given = ["--tokens", tokens] if source == "tokens" else ["--data", images]
    out = tmp_path / "attention"
    report = analyze(mvar, model, out, *given, "--num", 5, "--json").json
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
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", *pictures}


def test_tokens_and_their_images_have_one_report(mvar, model, tokens, images, tmp_path):
    """With every image measured, the batch size decides nothing either."""
    given = ["--num", 12, "--dtype", "float32", "--json"]
    of_tokens = analyze(mvar, model, tmp_path / "a", "--tokens", tokens, *given, "--batch-size", 5).json
    of_images = analyze(mvar, model, tmp_path / "b", "--data", images, *given).json
    for key in ("scale_mass", "layers", "window_mass_by_scale"):
        assert flat(of_tokens[key]) == pytest.approx(flat(of_images[key]), abs=1e-6)


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


def test_the_page_needs_nothing_else_and_shows_everything(mvar, model, tokens, tmp_path):
    out = tmp_path / "attention"
    report = analyze(mvar, model, out, "--tokens", tokens, "--num", 4, "--json").json
    page = (out / "report.html").read_text()
    assert report["report"] == str(out / "report.html")
    assert page.count("<svg") == len(FIGURES)
    assert page.count('role="img"') == len(FIGURES)
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "http" not in without_names
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', without_names)
    assert "prefers-color-scheme: dark" in page
    assert all(f"<li>{html.escape(sentence)}</li>" in page for sentence in report["reading"]["sentences"])
    assert len(report["reading"]["sentences"]) >= 3
    for title in ("In figures", "Which scales", "How near", "Where the last scale looks", "What layers do",
                  "Recommended", "Definitions", "KV cache", "peak memory of sampling", "GMACs"):  # fmt: skip
        assert title in page, title
    assert "by construction" in page
    assert f"{report['scale_mass'][2][2]:.3f}" in page
    check_tables(page, report)
    windows = ",".join(map(str, report["recommended"]["windows"]))
    assert f"--set attention.scale_prefixes=1 --set attention.windows=[{windows}]</pre>" in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    # Every element that is opened is closed, in order.
    body = page[page.index("<body>") : page.index("</body>") + len("</body>")]
    ElementTree.fromstring(body.replace("&nbsp;", " "))


def check_tables(page, report):
    """Scales, recommendation and savings, cell by cell."""
    tables = [
        [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
        for table in re.findall(r"<table>(.*?)</table>", page)
    ]
    scales, recommended, saved = tables
    assert [row[0] for row in scales] == ["scale", "1", "2", "4"]
    last = dict(zip(*(scales[index] for index in (0, -1)), strict=True))
    assert last["own"] == f"{report['scale_mass'][2][2]:.3f}"
    assert last["before"] == f"{report['scale_mass'][2][1]:.3f}"
    assert last["both"] == f"{report['scale_mass'][2][1] + report['scale_mass'][2][2]:.3f}"
    assert last["in 3×3 of own"] == f"{report['window_share']['3'][2]:.3f}"
    best = report["recommended"]
    for row, window, kept, own in zip(
        recommended[1:], best["windows"], best["kept_by_scale"], best["own_windows"], strict=True
    ):
        assert row[1] == str(window or "whole")
        assert row[2] == f"{kept:.3f}"
        assert row[5] == str(own or "whole")
    assert [row[0].split(",")[0] for row in saved[1:]] == ["attention", "KV cache", "peak memory of sampling"]
    assert saved[1][3] == f"{report['savings']['attention_gmacs']['part']:.3f}"


def test_the_terminal_says_it_shortly(mvar, model, tokens, tmp_path):
    said = analyze(mvar, model, tmp_path / "out", "--tokens", tokens, "--num", 4)
    assert said.code == 0
    assert "To keep 0.95 of the attention: scale_prefixes 1" in said.out
    assert "what that saves" in said.out
    assert "falls on the own scale" in said.out
    assert len(said.out.splitlines()) < 45


def test_own_samples_are_those_that_the_model_draws(mvar, model, tmp_path):
    """Without tokens or images: the same tokens as `mvar sample` draws, classes evenly spread."""
    given = ["--num", 7, "--seed", 3, "--dtype", "float32"]
    outcome = analyze(mvar, model, tmp_path / "own", *given, "--json")
    report = outcome.json
    assert report["num_images"] == 7
    assert "own samples" in report["source"]
    assert "own samples" in outcome.err
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="float32")
    labels = spread_classes(7, 3)
    drawn = pipe.sample(labels, seed=3).tokens
    from mvar_core.analysis.locality import measure_locality

    expected = measure_locality(
        pipe.transformer, pipe.quantizer, [(drawn, torch.tensor(labels))], pipe.config
    )  # fmt: skip
    np.testing.assert_allclose(report["scale_mass"], expected.scale_mass, atol=1e-6)
    np.testing.assert_allclose(report["window_mass"]["1"], expected.window_mass[1], atol=1e-6)
    entropy = [layer["entropy"] for layer in report["layers"]]
    np.testing.assert_allclose(entropy, expected.entropy_by_head.mean(axis=1), atol=1e-5)
    other = analyze(mvar, model, tmp_path / "other", "--num", 7, "--seed", 4, "--dtype", "float32", "--json").json
    assert other["window_mass"]["1"] != report["window_mass"]["1"]


def test_classes_are_evenly_spread():
    assert spread_classes(7, 3) == [0, 0, 0, 1, 1, 2, 2]
    assert spread_classes(4, 1000) == [0, 250, 500, 750]
    assert spread_classes(2, 2) == [0, 1]


def test_published_files(mvar, golden_mvar, monkeypatch, tmp_path):
    """A pair of .pth files is measured as the directory that it converts to, on a cache of that directory too."""
    from mvar_core.config.training import DataConfig
    from mvar_core.data.images import open_images
    from mvar_core.data.token_writer import write_token_cache
    from mvar_core.models import official
    from mvar_core.models.directory import load_tokenizer
    from mvar_core.models.official import import_official

    # Published files do not hold their pyramid; the golden ones have another than the published.
    sides = tuple(golden_mvar.spec["patch_nums"])
    monkeypatch.setattr(official, "PUBLISHED_PYRAMIDS", {256: sides})
    config = import_official(golden_mvar.model, golden_mvar.tokenizer, tmp_path / "directory")
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
    files = ["--tokenizer", golden_mvar.tokenizer]
    exact = ["--num", 3, "--dtype", "float32", "--json"]
    found = analyze(mvar, golden_mvar.model, tmp_path / "a", *files, "--tokens", cache, *exact).json
    again = analyze(mvar, tmp_path / "directory", tmp_path / "b", "--tokens", cache, *exact).json
    assert flat(found["scale_mass"]) == pytest.approx(flat(again["scale_mass"]), abs=1e-6)
    assert flat(found["layers"]) == pytest.approx(flat(again["layers"]), abs=1e-5)
    own = analyze(mvar, golden_mvar.model, tmp_path / "c", *files, *exact).json
    assert "own samples" in own["source"]
    assert own["num_images"] == 3
    assert analyze(mvar, golden_mvar.model, tmp_path / "dry", *files, "--dry-run", "--json").json["dry_run"] is True


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
    report = analyze(
        mvar, var, tmp_path / "out", "--tokens", tokens, "--keep", 0.6, "--write-preset", preset, "--json"
    ).json
    best = report["recommended"]
    assert report["preset"] == str(preset)
    assert best["kept"] >= 0.6
    assert best["scale_prefixes"] != "all" or any(best["windows"])  # 0.6 of nearly even attention takes less than all
    source = read_model_config(var)
    config = load_config(str(preset))
    assert config.attention.scale_prefixes == best["scale_prefixes"]
    assert list(config.windows) == best["windows"]
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
        assert list(trained.windows) == best["windows"]
        drawn = mvar(
            "sample", "--checkpoint", out, "--class", "all", "--num", 1, "--out", tmp_path / f"{command[0]}.npz"
        )
        assert drawn.code == 0, drawn.err


def test_a_preset_keeps_the_training_of_the_run_that_it_comes_from(mvar, preset, model, tokens, tmp_path):
    run = tmp_path / "run"
    settings = ["--set", "train.optimizer.lr=0.002", "--set", "seed=5", "--steps", 2]
    assert (
        mvar("train", "--preset", preset, "--checkpoint", model, "--tokens", tokens, "--out", run, *settings).code == 0
    )
    written = tmp_path / "again.yaml"
    assert analyze(mvar, run, tmp_path / "out", "--tokens", tokens, "--write-preset", written).code == 0
    config = load_config(str(written))
    assert config.train.optimizer.lr == 0.002
    assert config.train.batch_size == 4
    assert config.train.steps == 2
    assert config.seed == 5
    assert config.name == "again"


def test_savings_compare_the_model_with_the_recommended_one(mvar, var, tokens, tmp_path):
    given = ["--tokens", tokens, "--keep", 0.6, "--dtype", "float32", "--json"]
    report = analyze(mvar, var, tmp_path / "out", *given).json
    saved = report["savings"]
    planned = mvar("plan", "--checkpoint", var, "--batch-size", saved["batch_size"], "--dtype", "float32", "--json",
                   "--device", "cpu").json  # fmt: skip
    for key in ("attention_gmacs", "kv_cache_bytes", "sample_peak_bytes"):
        assert saved[key]["model"] == planned[key]
        assert saved[key]["part"] == pytest.approx(saved[key]["recommended"] / planned[key])
    assert saved["attention_gmacs"]["part"] < 1


def test_conditions_that_are_not_the_models(mvar, config, model, images, tmp_path):
    """Images of more classes than the model has; and a model that is conditioned on vectors."""
    (more := tmp_path / "images").mkdir()
    for number in range(5):
        (more / f"c{number}").mkdir()
        Image.new("RGB", (16, 16)).save(more / f"c{number}" / "0.png")
    assert "does not exist; the model has classes 0 … 2" in analyze(mvar, model, tmp_path / "a", "--data", more).error
    path = tmp_path / "vectors"
    values = config.model.model_dump() | {"conditioning": {"kind": "vector", "dim": 4}}
    of_vectors = type(config.model).model_validate(values)
    tokenizer = Pipeline.from_pretrained(model, device="cpu", dtype="float32").tokenizer
    state = Transformer(of_vectors).state_dict()
    save_model(path, of_vectors, tokenizer=tokenizer.state_dict(), transformer=state)
    for name, source in (("b", []), ("c", ["--data", images])):  # by an encoder that nobody named
        assert analyze(mvar, path, tmp_path / name, *source, "--num", 2).code == 0
        assert "without a condition" in (tmp_path / name / "report.json").read_text()


def test_a_run_whose_settings_cannot_be_read_is_refused_before_anything_is_measured(mvar, model, tokens, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(model, run)
    (run / "config.yaml").write_text("train: {stpes: 3}\n")
    error = analyze(mvar, run, tmp_path / "out", "--tokens", tokens, "--write-preset", tmp_path / "p.yaml").error
    assert "stpes" in error
    assert not (tmp_path / "p.yaml").exists()
    assert not (tmp_path / "out").exists()
