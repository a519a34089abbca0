"""Samples on their way to an output: shards, what is refused, writers in threads, one file out of many."""

import itertools
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core.errors import DataError
from mvar_core.io.npz import npz_member
from mvar_core.sampling.images import Samples
from mvar_core.sampling.shards import SampleOutput, SampleShards, SampleSpec, grid_columns
from mvar_core.untrusted import read_json


def spec(**changes):
    values = {
        "model": "tiny",
        "weights": "abc",
        "classes": (2, 0),
        "num": 3,
        "settings": {"cfg": 1.0, "seed": 0},
        "output": "npz",
        "save_tokens": True,
        "stages": False,
        "image_shape": (8, 6),
        "scales": 2,
        "tokens": 5,
        "device": "cpu",
        "dtype": "float32",
        "attention": "auto",
        "version": "0",
    }
    return SampleSpec(**{**values, **changes})


def samples(asked):
    """Images, tokens and stages of all samples."""
    random = np.random.default_rng(0)
    shape = (asked.total, *asked.image_shape, 3)
    stages = random.integers(0, 256, (asked.total, asked.scales, *asked.image_shape, 3), np.uint8)
    return random.integers(0, 256, shape, np.uint8), random.integers(0, 99, (asked.total, 5)), stages


def batch(asked, images, tokens, stages=None):
    strips = torch.from_numpy(stages) if stages is not None else None
    return Samples(torch.from_numpy(images), torch.from_numpy(tokens), (0,) * len(images), strips)


def made(asked, sizes):
    """A model that has its samples ready and hands them out in chunks of some sizes."""
    images, tokens, stages = samples(asked)

    def generate(indices, progress):
        start, number = 0, 0
        while start < len(indices):
            rows = list(indices)[start : start + sizes[number % len(sizes)]]
            start, number = start + len(rows), number + 1
            progress(start, len(indices))
            yield batch(asked, images[rows], tokens[rows], stages[rows] if asked.stages else None)

    return generate


def make_all(target, asked, sizes=(4,), shards=None, overwrite=False):
    parts = SampleShards(SampleOutput(target, asked.output), asked, overwrite)
    parts.begin()
    own = list(asked.shards if shards is None else shards)
    parts.make(own, set(), made(asked, sizes), lambda done, total: None, threads=2)
    return parts


def read(file):
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("total", "size"), [(1, 1), (127, 1), (128, 2), (4096, 64), (50_000, 64)])
def test_shards_cover_every_sample_once_and_are_small_for_small_runs(total, size):
    asked = spec(classes=(0,), num=total)
    assert asked.shard_size == size
    assert [index for shard in asked.shards for index in asked.span(shard)] == list(range(total))


def test_names_and_labels_follow_from_the_number():
    asked = spec(classes=(7, 3), num=60_000)
    assert asked.file_name(0) == "000000_7.png"
    assert asked.file_name(60_000) == "060000_3.png"
    assert spec().labels.tolist() == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("sizes", [(1,), (4,), (5, 2), (150,)])
def test_an_npz_is_assembled_in_order_whatever_the_chunks(tmp_path, sizes):
    asked = spec(num=70, stages=True)
    assert asked.shard_size == 2
    parts = make_all(tmp_path / "x.npz", asked, sizes)
    assert parts.done() == set(asked.shards)
    parts.assemble()
    images, tokens, stages = samples(asked)
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0", "labels", "tokens", "stages"]
        assert np.array_equal(file["arr_0"], images)
        assert np.array_equal(file["labels"], asked.labels)
        assert np.array_equal(file["tokens"], tokens)
        assert np.array_equal(file["stages"], stages)
        assert (file["arr_0"].dtype, file["labels"].dtype, file["tokens"].dtype) == (np.uint8, np.int64, np.int32)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_png_names_strips_and_tokens(tmp_path):
    asked = spec(output="png", stages=True)
    parts = make_all(tmp_path / "out", asked)
    parts.assemble()
    images, tokens, stages = samples(asked)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"0000{index}_{2 if index < 3 else 0}.png" for index in range(6)), "tokens.npz"]
    assert np.array_equal(read(tmp_path / "out" / "00001_2.png"), images[1])
    assert np.array_equal(read(tmp_path / "out-stages" / "00001_2.png"), np.concatenate(list(stages[1]), axis=1))
    with np.load(tmp_path / "out" / "tokens.npz") as file:
        assert np.array_equal(file["tokens"], tokens)
        assert file["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-stages"]
    assert set(map(str, parts.outputs())) == {str(path) for path in tmp_path.glob("*/*")}


def test_a_grid_of_strips_has_a_row_per_sample(tmp_path):
    asked = spec(output="grid", stages=True, save_tokens=False)
    make_all(tmp_path / "grid.png", asked).assemble()
    assert read(tmp_path / "grid.png").shape == (6 * 8 + 5 * 2, 12, 3)
    assert grid_columns(2, 3, stages=False) == 3
    assert grid_columns(1, 9, stages=False) == 3


def test_shards_that_are_not_whole_are_made_again(tmp_path):
    parts = make_all(tmp_path / "x.npz", spec())
    path = parts.piece(2)
    path.write_bytes(path.read_bytes()[:-1])
    parts.piece(4).unlink()
    assert parts.done() == {0, 1, 3, 5}
    parts.release()
    parts = make_all(tmp_path / "out", spec(output="png", stages=True))
    (parts.images / "00001_2.png").unlink()
    (parts.strips / "00003_0.png").write_bytes(b"")
    assert parts.done() == {0, 2, 4, 5}
    parts.release()


def shards_of(target, asked, overwrite=False):
    return SampleShards(SampleOutput(target, asked.output), asked, overwrite)


def test_a_run_with_other_settings_is_refused_by_name(tmp_path):
    parts = make_all(tmp_path / "x.npz", spec(), shards=range(3))
    parts.release()
    other = shards_of(tmp_path / "x.npz", spec(settings={"cfg": 1.5, "seed": 0}, num=4))
    with pytest.raises(DataError, match=r"num is 3 there, 4 asked; settings.cfg is 1.0 there, 1.5 asked.*--overwrite"):
        other.check()
    other.overwrite = True
    assert other.check() == set()
    assert shards_of(tmp_path / "x.npz", spec()).difference() == ""
    other.begin()
    assert other.present() == set()
    assert other.difference() == ""
    other.release()


def test_a_run_that_was_begun_without_min_p_resumes(tmp_path):
    parts = make_all(tmp_path / "x.npz", spec(), shards=range(3))
    parts.release()
    assert "min_p" not in read_json(parts.record_path)["settings"]
    off = shards_of(tmp_path / "x.npz", spec(settings={"cfg": 1.0, "seed": 0, "min_p": 0.0}))
    assert off.spec.settings["min_p"] == 0, "what is reported is whole"
    assert off.check() == {0, 1, 2}
    on = shards_of(tmp_path / "x.npz", spec(settings={"cfg": 1.0, "seed": 0, "min_p": 0.1}))
    with pytest.raises(DataError, match=r"settings.min_p is absent there, 0.1 asked"):
        on.check()


def test_two_runs_do_not_work_in_one_place(tmp_path):
    first, second = (shards_of(tmp_path / "x.npz", spec()) for _ in range(2))
    first.begin()
    with pytest.raises(DataError, match="is at work in"):
        second.begin()
    second.leave()
    assert first.begun, "the directory belongs to the first"
    first.release()
    second.begin()
    second.leave()
    assert not second.directory.exists()


@pytest.mark.parametrize(("output", "factor"), [("npz", 2), ("png", 0.5)])
def test_too_little_space_is_told_beforehand(tmp_path, monkeypatch, output, factor):
    asked = spec(num=500, output=output)
    parts = shards_of(tmp_path / "far" / ("out.npz" if output == "npz" else "out"), asked)
    amount = int(factor * asked.raw_bytes * asked.total)
    for free in (amount, amount - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        if free == amount:
            assert parts.check() == set()
        else:
            with pytest.raises(DataError, match=r"free; 1000 samples"):
                parts.check()


def test_progress_counts_what_others_have_written(tmp_path):
    asked = spec()
    parts = make_all(tmp_path / "x.npz", asked, shards=[0, 1])
    seen = []
    images, tokens, _ = samples(asked)

    def others():
        for shard in (4, 5):
            time.sleep(0.05)
            parts.write(shard, batch(asked, images[:1], tokens[:1]))

    thread = threading.Thread(target=others)
    thread.start()
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    parts.make([2, 3], {0, 1}, made(asked, (1,)), report, wait=True)
    thread.join()
    assert seen[:3] == [(2, 6), (3, 6), (4, 6)]
    assert seen[-1] == (6, 6)
    assert parts.done() == set(asked.shards)
    parts.release()


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    parts = make_all(tmp_path / "x.npz", spec())
    (tmp_path / "x.npz").write_text("mine")
    with pytest.raises(DataError, match="appeared"):
        parts.assemble()
    assert (tmp_path / "x.npz").read_text() == "mine"
    assert parts.done() == set(parts.spec.shards)
    parts.overwrite = True
    parts.assemble()
    with np.load(tmp_path / "x.npz") as file:
        assert len(file["arr_0"]) == 6


def test_a_directory_that_is_replaced_moves_away_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").touch()
    parts = make_all(tmp_path / "out", spec(output="png", save_tokens=False), overwrite=True)
    parts.assemble()
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert not (tmp_path / "out" / "old.png").exists()


@pytest.mark.parametrize(
    ("out", "form", "message"),
    [
        ("x", "gif", "gif"),
        ("x.png", "png", "directory"),
        ("x.jpg", None, "directory"),
        ("x.png", "npz", "npz"),
        ("x.npz", "grid", "png"),
    ],
)
def test_outputs_that_contradict_their_format(tmp_path, out, form, message):
    with pytest.raises(DataError, match=message):
        SampleOutput.of(tmp_path / out, form)


def test_outputs_that_exist_are_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "x.npz").touch()
    (tmp_path / "with-stages-stages").mkdir()
    (tmp_path / "with-stages-stages" / "file").touch()
    for name, form in (("full", "png"), ("full", "grid"), ("x.npz", "npz"), ("with-stages", "png")):
        output = SampleOutput.of(tmp_path / name, form)
        with pytest.raises(DataError, match="--overwrite"):
            output.require_free(overwrite=False)
        output.require_free(overwrite=True)
    output = SampleOutput.of(tmp_path / "new", "npz")
    assert output.target == tmp_path / "new" / "samples.npz"
    output.shards.mkdir(parents=True)
    output.require_free(overwrite=False)
    assert SampleOutput.of(tmp_path / "a.b").strips == tmp_path / "a.b-stages"


def test_generating_waits_for_the_writers(tmp_path, monkeypatch):
    parts = shards_of(tmp_path / "x.npz", spec())
    parts.begin()
    gate, generated, write = threading.Event(), [], parts.write
    monkeypatch.setattr(parts, "write", lambda *arguments: (gate.wait(), write(*arguments)))

    def make():
        parts.make(parts.pieces, set(), made(parts.spec, (1,)), lambda done, total: generated.append(done))

    thread = threading.Thread(target=make)
    thread.start()
    deadline = time.monotonic() + 30
    while max(generated, default=0) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert max(generated) == 3, "one is being written, one waits, one could not be handed over"
    gate.set()
    thread.join()
    assert parts.done() == set(parts.pieces)
    parts.release()


def test_an_interruption_finishes_what_was_generated(tmp_path, monkeypatch):
    parts = shards_of(tmp_path / "x.npz", spec())
    parts.begin()
    write = parts.write
    monkeypatch.setattr(parts, "write", lambda *arguments: (time.sleep(0.01), write(*arguments)))

    def generate(indices, progress):
        yield from itertools.islice(made(parts.spec, (1,))(indices, progress), 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.make(parts.pieces, set(), generate, lambda done, total: None, threads=3)
    assert parts.done() == {0, 1, 2, 3}
    parts.release()


def test_npz_is_what_numpy_would_have_written(tmp_path):
    random = np.random.default_rng(0)
    arrays = {"arr_0": random.integers(0, 256, (5, 8, 6, 3), np.uint8), "labels": np.arange(5)}
    for name in ("a.npz", "b.npz"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for key, array in arrays.items():
                with npz_member(archive, key, array.shape, array.dtype) as member:
                    member.write(array[:2].tobytes())
                    member.write(array[2:].tobytes())
    with np.load(tmp_path / "a.npz") as file:
        assert all(np.array_equal(file[key], array) for key, array in arrays.items())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
