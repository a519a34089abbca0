"""`mvar edit`: what is kept stays, in tokens and with --paste in pixels."""

import numpy as np
import pytest
from PIL import Image

import mvar_core as library
from mvar_core import Machine, Pipeline
from mvar_core.data.transforms import resize_and_crop
from mvar_core.io.pixels import from_uint8
from mvar_core.sampling.shards import SampleShards


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A picture that needs enlarging."""
    path = tmp_path_factory.mktemp("given") / "other.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (12, 12, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A picture that is resized and cropped: 64 high, 96 wide, seen from column 16 to 80."""
    path = tmp_path_factory.mktemp("given") / "large.png"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 96, 3), np.uint8)).save(path)
    return path


def edit(mvar, model, *arguments):
    return mvar("edit", "--checkpoint", model, "--device", "cpu", *arguments)


def loaded(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("keep", ["outside", "inside"])
@pytest.mark.parametrize("region", ["box", "mask"])
def test_tokens_and_pixels_stay(mvar, model, picture, tmp_path, keep, region):
    inside = np.zeros((16, 16), bool)
    inside[4:12, 0:8] = True
    Image.fromarray(inside).save(tmp_path / "mask.png")
    where = ["--box", "0,4,8,12"] if region == "box" else ["--mask", tmp_path / "mask.png"]
    options = ["--image", picture, *where, "--keep", keep, "--num", 3, "--paste", "--save-tokens"]
    result = edit(mvar, model, *options, "--out", tmp_path / "out.npz", "--json").json
    assert result["images"] == 3
    assert result["outputs"] == [str(tmp_path / "out.npz")]
    made = loaded(tmp_path / "out.npz")
    given = read(picture)
    tokens = Pipeline.from_pretrained(model, device="cpu").encode(from_uint8(given[None])).numpy()
    stays = inside if keep == "inside" else ~inside
    # Scales 1, 2, 4 on 16 pixels: halves of a side are 8 pixels, quarters 4.
    cells = stays[::4, ::4]
    quarters = [cells[y : y + 2, x : x + 2].mean() >= 0.5 for y in (0, 2) for x in (0, 2)]
    expected = np.concatenate([[cells.mean() >= 0.5], quarters, cells.flatten()])
    assert np.array_equal(made["kept"], expected[None].repeat(3, 0))
    assert np.array_equal(made["tokens"][made["kept"]], tokens.repeat(3, 0)[made["kept"]])
    assert not np.array_equal(made["tokens"], tokens.repeat(3, 0))
    assert np.array_equal(made["arr_0"][:, stays], given[None].repeat(3, 0)[:, stays])
    assert not np.array_equal(made["arr_0"][0], made["arr_0"][1])
    assert made["labels"].tolist() == [3, 3, 3], "the label behind the last stands for no class"
    counts = [int(expected[:1].sum()), int(expected[1:5].sum()), int(expected[5:].sum())]
    assert result["edits"][0]["kept_by_scale"] == counts


def test_the_library_does_the_same(mvar, model, picture, tmp_path):
    options = ["--image", picture, "--box", "4,4,16,16", "--class", "dog", "--num", 2, "--seed", 5, "--cfg", 2]
    assert edit(mvar, model, *options, "--out", tmp_path / "out.npz", "--save-tokens").code == 0
    made = loaded(tmp_path / "out.npz")
    mask = np.zeros((16, 16), bool)
    mask[4:, 4:] = True
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    same = pipeline.edit(from_uint8(read(picture)[None]), mask, labels=[1], num=2, seed=5, cfg=2.0)
    assert np.array_equal(made["tokens"], same.tokens.numpy())
    assert np.array_equal(made["arr_0"], same.images.numpy())
    assert made["labels"].tolist() == [1, 1]


def test_png_files_and_classes(mvar, model, picture, other, tmp_path):
    out = tmp_path / "out"
    options = ["--image", picture, "--image", other, "--box", "0,0,8,12", "--class", "all", "--num", 2]
    result = edit(mvar, model, *options, "--keep", "outside", "--out", out, "--json").json
    assert result["images"] == 12
    found = sorted(path.name for path in out.iterdir())
    assert found[:3] == ["00000_picture_0.png", "00001_picture_0.png", "00002_picture_1.png"]
    assert found[-1] == "00011_other_2.png"
    again = library.edit(
        [picture, other], tmp_path / "again", checkpoint=model, box=(0, 0, 8, 12), classes="all", num=2, stages=True,
        machine=Machine(device="cpu"),
    )  # fmt: skip
    assert again.images == 12
    strip = read(tmp_path / "again-stages" / found[0])
    assert strip.shape == (16, 48, 3)
    assert np.array_equal(strip[:, 32:], read(out / found[0]))
    grid = tmp_path / "grid.png"
    assert edit(mvar, model, "--image", picture, "--box", "0,0,8,16", "--num", 4, "--out", grid).code == 0
    assert read(grid).shape == (34, 34, 3)


def test_a_box_is_in_pixels_of_the_file(mvar, model, large, tmp_path):
    """Of 96×64 pixels the model sees 64×64 from column 16 on, at a quarter of the size."""
    out = tmp_path / "out.npz"
    options = ["--image", large, "--box", "48,0,96,64", "--paste", "--save-tokens", "--out", out]
    assert edit(mvar, model, *options).code == 0
    made = loaded(out)
    with Image.open(large) as image:
        seen = np.asarray(resize_and_crop(image, (16, 16)))
    assert np.array_equal(made["arr_0"][0, :, :8], seen[:, :8])
    assert made["kept"][0, 5:].reshape(4, 4).tolist() == [[True, True, False, False]] * 4
    inside = np.zeros((64, 96), bool)
    inside[:, 48:] = True
    Image.fromarray(inside).save(tmp_path / "mask.png")
    same = ["--image", large, "--mask", tmp_path / "mask.png", "--paste", "--save-tokens", "--out", tmp_path / "b.npz"]
    assert edit(mvar, model, *same).code == 0
    assert np.array_equal(loaded(tmp_path / "b.npz")["tokens"], made["tokens"])
    Image.fromarray(inside[:16, 40:56]).save(tmp_path / "small.png")
    small = [
        "--image",
        large,
        "--mask",
        tmp_path / "small.png",
        "--paste",
        "--save-tokens",
        "--out",
        tmp_path / "c.npz",
    ]
    assert edit(mvar, model, *small).code == 0
    assert np.array_equal(loaded(tmp_path / "c.npz")["tokens"], made["tokens"])


def test_edits_do_not_depend_on_the_batch_and_resume(mvar, model, picture, other, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, path in (("a", picture), ("b", other)):
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    options = ["--image", folder, "--box", "0,0,12,6", "--num", 3, "--save-tokens", "--paste"]
    assert edit(mvar, model, *options, "--out", tmp_path / "one.npz", "--batch-size", 6).code == 0
    write, written = SampleShards.write, []

    def stopping(self, shard, samples):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, samples)

    with monkeypatch.context() as patch:
        patch.setattr(SampleShards, "write", stopping)
        assert edit(mvar, model, *options, "--out", tmp_path / "two.npz", "--batch-size", 1).code == 130
    other = edit(mvar, model, *options, "--keep", "inside", "--out", tmp_path / "two.npz").error
    assert "keep is outside there, inside asked" in other
    result = edit(mvar, model, *options, "--out", tmp_path / "two.npz", "--batch-size", 2, "--json").json
    assert 0 < result["resumed"] < 6
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_what_cannot_be_edited(mvar, model, picture, large, tmp_path):
    out = ["--out", tmp_path / "out"]
    image = ["--image", picture]

    def error(*options):
        return edit(mvar, model, *options, *out).error

    assert "one region" in error(*image)
    assert "one region" in error(*image, "--box", "0,0,8,8", "--mask", picture)
    assert "x0,y0,x1,y1" in error(*image, "--box", "0,0,8")
    assert "whole numbers" in error(*image, "--box", "0,0,8,x")
    assert "16 pixels width and 16 height" in error(*image, "--box", "0,0,8,17")
    assert "0 ≤ x0 < x1" in error(*image, "--box", "8,0,8,16")
    assert "inside" in error(*image, "--box", "0,0,8,8", "--keep", "around")
    assert "Nothing of" in error(*image, "--box", "0,0,16,16", "--keep", "inside")
    assert "mvar sample" in error(*image, "--box", "0,0,16,16")
    assert "keeps no whole token" in error(*image, "--box", "0,0,3,3", "--keep", "inside")
    assert "would change" in error("--image", large, "--box", "0,0,16,64")
    assert "coverage is 0" in error(*image, "--box", "0,0,8,8", "--coverage", 0)
    assert "nowhere.png does not exist" in error("--image", tmp_path / "nowhere.png", "--box", "0,0,8,8")
    assert "nowhere.png does not exist" in error(*image, "--mask", tmp_path / "nowhere.png")
    Image.new("L", (8, 16)).save(tmp_path / "mask.png")
    assert "is 8×16 pixels, but" in error(*image, "--mask", tmp_path / "mask.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    assert "would change" in error(*image, "--mask", tmp_path / "black.png")
    assert "golden retriever" in error(*image, "--box", "0,0,8,8", "--class", "golden retreiver")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    planned = edit(mvar, model, *image, "--box", "0,0,8,8", *out, "--dry-run", "--json").json
    assert planned["edits"][0]["kept_by_scale"] == [1, 3, 12]
    assert "Nothing was done" in edit(mvar, model, *image, "--box", "0,0,8,8", *out, "--dry-run").out
    assert not (tmp_path / "out").exists()
    guided = edit(mvar, model, *image, "--box", "0,0,8,8", *out, "--cfg", 3)
    assert "has no effect" in guided.err
    assert guided.code == 0
    assert "is finished" in edit(mvar, model, *image, "--box", "0,0,8,8", *out).err
    assert "--overwrite" in error(*image, "--box", "0,0,8,12")
