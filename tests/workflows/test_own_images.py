"""From a folder of pictures to samples: the quickstart on images of your own, and every hint on the way."""

import json
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mvar_core as mvar
from mvar_cli.app import app
from mvar_core.data.images import open_images
from mvar_core.data.sources import hold_out
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.demo import nearest_neighbours

MACHINE = mvar.Machine(device="cpu")
TINY = ["tokenizer.base_channels=8", "tokenizer.codebook_size=16", "train_tokenizer.kmeans_batches=1"]
"""Settings of every command that trains a tokenizer here; the rest is as it comes."""


def paint(folder, shape, count=4):
    """Pictures of two classes, one of which has a space in its name."""
    random = np.random.default_rng(0)
    for channel, name in ((0, "red fox"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (3, 3, 3), np.uint8)
            pixels[..., channel] = 220
            picture = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC)
            picture.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("own pictures") / "in here", (16, 16), 6)


def test_from_own_images_to_a_report(pictures, tmp_path):
    out, given = tmp_path / "run", {"data": pictures, "minutes": 0.01, "depth": 1, "num": 2, "settings": TINY}

    def interrupt(stage, done, *_, **__):
        if stage == "tokenizer" and (out / "plan.json").is_file():
            raise KeyboardInterrupt

    stopped = mvar.quickstart(out, machine=MACHINE, progress=interrupt, **given)
    assert stopped.interrupted
    planned = json.loads((out / "plan.json").read_text())
    result = mvar.quickstart(out, machine=MACHINE, **given)
    values = result.to_dict()
    assert {"classifier_accuracy", "demo_fid", "demo_fid_floor", "reconstruction_psnr", "seconds"} <= values.keys()
    assert values["classifier_accuracy"] is values["demo_fid"] is values["demo_fid_floor"] is None
    for name in ("reconstruction_psnr", "nearest_distance", "nearest_distance_real", "validation_loss", "loss"):
        assert np.isfinite(values[name]), name
    assert 0 <= values["memorised"] <= 1
    assert json.loads((out / "plan.json").read_text())["steps"]["tokenizer"] == planned["steps"]["tokenizer"]
    page = (out / "index.html").read_text()
    assert str(pictures) in page
    assert len(re.findall(r'<img class="pixels"', page)) == 5
    manifests = [json.loads((out / f"tokens-{split}" / "manifest.json").read_text()) for split in ("train", "test")]
    assert [manifest["images"] for manifest in manifests] == [11, 1]
    assert manifests[0]["image_size"] == 16
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 16, 16, 3)
        assert samples["labels"].tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"minutes is 0\.01 there, 0\.02 asked.*--overwrite"):
        mvar.quickstart(out, machine=MACHINE, **{**given, "minutes": 0.02})


def test_a_dry_run_on_own_images_measures_and_leaves_nothing(pictures, tmp_path):
    out = tmp_path / "run"
    planned = mvar.quickstart(
        out, data=pictures, image_size="32x16", depth=1, minutes=1, settings=TINY, machine=MACHINE, dry_run=True
    ).to_dict()
    assert not out.exists()
    configuration = planned["configuration"]
    assert configuration["image_size"] == [32, 16]
    assert configuration["patch_sizes"][-1] == [8, 4]
    assert configuration["tokenizer"]["base_channels"] == 8
    assert configuration["class_names"] == ["blue", "red fox"]
    assert configuration["train"]["steps"] > 0
    assert planned["cost"]["parameters"] > 0
    with pytest.raises(ConfigError, match="--minutes"):
        mvar.quickstart(out, data=pictures, minutes=0)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    paint(tmp_path / "many", (16, 16), 20)
    (tmp_path / "many" / "alone").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "many" / "alone" / "one.png")
    source = open_images(str(tmp_path / "many"))
    train = hold_out(source, 0.1, 500, seed=3)
    held = train.held_out
    assert (len(train), len(held)) == (37, 4)
    assert set(train.item_names).isdisjoint(held.item_names)
    assert set(train.item_names) | set(held.item_names) == set(source.item_names)
    assert "alone/one.png" in train.item_names
    for subset in (train, held):
        for index in range(len(subset)):
            place = source.item_names.index(subset.item_names[index])
            assert subset.labels[index] == source.labels[place]
            assert np.array_equal(subset.read(index, (16, 16)), source.read(place, (16, 16)))
    assert hold_out(source, 0.1, 500, seed=3).held_out.item_names == held.item_names
    assert hold_out(source, 0.1, 500, seed=4).held_out.item_names != held.item_names
    with pytest.raises(DataError, match="held out"):
        hold_out(open_images(str(tmp_path / "many" / "alone")), 0.1, 500, seed=0)


def test_the_nearest_image_is_found_in_any_block(monkeypatch):
    import torch

    random = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (50, 3, 4, 4), generator=random, dtype=torch.uint8)
    for values in (2**23, 7 * 48):
        monkeypatch.setattr("mvar_core.evaluation.demo.BLOCK_VALUES", values)
        distances, indices = nearest_neighbours(reference[[49, 0, 23]], reference)
        assert indices.tolist() == [49, 0, 23]
        assert distances.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def follow(line, *options):
    """Run a command as it was printed, with further options, and return what it printed."""
    words = shlex.split(line)
    assert words[0] == "mvar"
    outcome = CliRunner().invoke(app, [*words[1:], *options])
    return outcome.exit_code, outcome.stdout, outcome.stderr


def suggested(text):
    """The command that a text suggests: behind "Next:", or in backticks."""
    found = re.findall(r"Next: (mvar .*)|`(mvar [^`]*)`", text)
    assert found, text
    return "".join(found[-1])


@pytest.mark.parametrize(
    "shape", [(32, 32), *(pytest.param(size, marks=pytest.mark.slow) for size in ((64, 64), (96, 64), (128, 128)))]
)
def test_every_hint_leads_further_from_an_empty_folder_to_samples(shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [option for setting in TINY for option in ("--set", setting)] + ["--steps", "2", "--batch-size", "2"]
    (tmp_path / "my pictures").mkdir()
    code, _, error = follow("mvar train --data 'my pictures' --out runs/mvar")
    assert code == 1
    tokenizer = suggested(error)  # training on images needs a tokenizer, and the hint trains one
    code, _, error = follow(tokenizer, *quick)
    assert code == 1
    assert "holds no images" in error
    (tmp_path / "my pictures").rmdir()
    paint(tmp_path / "my pictures", shape)
    code, printed, error = follow(tokenizer, *quick)
    assert code == 0, error
    assert f"{shape[0]}×{shape[1]}" in error  # says what it inferred
    code, printed, error = follow(suggested(printed))
    assert code == 0, error
    assert json.loads(next(tmp_path.rglob("manifest.json")).read_text())["images"] == 8
    code, printed, error = follow(suggested(printed), "--depth", "1", "--steps", "2", "--batch-size", "2")
    assert code == 0, error
    code, printed, error = follow(suggested(printed))
    assert code == 0, error
    with Image.open(next((tmp_path / "runs").rglob("grid.png"))) as grid:
        assert grid.size[0] > 3 * shape[1]
        assert grid.size[1] > shape[0]
    # Moved tokenizers and changed caches: what the refusals say works too.
    cache = next(tmp_path.rglob("manifest.json")).parent
    shard = next(path for path in cache.iterdir() if path.name.startswith("tokens"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, error = follow(f"mvar train --tokens {shlex.quote(str(cache))} --out again --steps 1 --depth 1")
    assert code == 1
    made_again = re.search(r"(mvar tokenize .*)", error)
    assert follow(made_again.group(1))[0] == 0
    code, _, error = follow(f"mvar train --tokens {shlex.quote(str(cache))} --out again --steps 1 --depth 1")
    assert code == 0, error
