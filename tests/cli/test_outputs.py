"""Samples on their way to an output: shards, what is refused, writers in threads, one file out of many."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from mvar_cli.drawing import Chunk, Progressing, draw_shards
from mvar_cli.outputs import (
    NpzWriter,
    grid_columns,
    is_published,
    output_target,
    outputs_of,
    put_together,
    require_free,
    strips_directory,
)
from mvar_cli.parts import PUBLISHING, Parts, Request, parts_directory
from mvar_core.errors import DataError
from mvar_core.sampling.writers import WriterPool


def request(**changes):
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
    return Request(**{**values, **changes})


def samples(asked):
    """Images, tokens and stages of all samples."""
    random = np.random.default_rng(0)
    shape = (asked.total, *asked.image_shape, 3)
    stages = random.integers(0, 256, (asked.total, asked.scales, *asked.image_shape, 3), np.uint8)
    return random.integers(0, 256, shape, np.uint8), random.integers(0, 99, (asked.total, 5)), stages


def draws(asked, sizes):
    """A model that has its samples ready and hands them out in chunks of some sizes."""
    images, tokens, stages = samples(asked)

    def draw(labels, indices, progress):
        assert labels == asked.labels[indices].tolist()
        start, number = 0, 0
        while start < len(indices):
            rows = list(indices)[start : start + sizes[number % len(sizes)]]
            start, number = start + len(rows), number + 1
            progress(start, len(indices))
            yield Chunk(images[rows], tokens[rows], stages[rows] if asked.stages else None)

    return draw


def draw_all(target, asked, sizes=(4,), shards=None):
    parts = Parts(target, asked)
    parts.start()
    own = list(asked.shards if shards is None else shards)
    progressing = Progressing(parts, set(), own, lambda done, total: None)
    draw_shards(parts, own, draws(asked, sizes), progressing, WriterPool(2))
    return parts


def read(file):
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("total", "size"), [(1, 1), (127, 1), (128, 2), (4096, 64), (50_000, 64)])
def test_shards_cover_every_sample_once_and_are_small_for_small_runs(total, size):
    asked = request(classes=(0,), num=total)
    assert asked.shard_size == size
    assert [index for shard in asked.shards for index in asked.span(shard)] == list(range(total))


def test_names_and_labels_follow_from_the_number():
    asked = request(classes=(7, 3), num=60_000)
    assert asked.file_name(0) == "000000_7.png"
    assert asked.file_name(60_000) == "060000_3.png"
    assert request().labels.tolist() == [2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("sizes", [(1,), (4,), (5, 2), (150,)])
def test_an_npz_is_put_together_in_order_whatever_the_chunks(tmp_path, sizes):
    asked = request(num=70, stages=True)
    assert asked.shard_size == 2
    parts = draw_all(tmp_path / "x.npz", asked, sizes)
    assert parts.intact() == set(asked.shards)
    put_together(parts, replace=False)
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
    asked = request(output="png", stages=True)
    parts = draw_all(tmp_path / "out", asked)
    put_together(parts, replace=False)
    images, tokens, stages = samples(asked)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"0000{index}_{2 if index < 3 else 0}.png" for index in range(6)), "tokens.npz"]
    assert np.array_equal(read(tmp_path / "out" / "00001_2.png"), images[1])
    assert np.array_equal(read(tmp_path / "out-stages" / "00001_2.png"), np.concatenate(list(stages[1]), axis=1))
    with np.load(tmp_path / "out" / "tokens.npz") as file:
        assert np.array_equal(file["tokens"], tokens)
        assert file["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-stages"]
    assert set(outputs_of(parts)) == {str(path) for path in tmp_path.glob("*/*")}


def test_a_grid_of_strips_has_a_row_per_sample(tmp_path):
    asked = request(output="grid", stages=True, save_tokens=False)
    put_together(draw_all(tmp_path / "grid.png", asked), replace=False)
    assert read(tmp_path / "grid.png").shape == (6 * 8 + 5 * 2, 12, 3)
    assert grid_columns(2, 3, stages=False) == 3
    assert grid_columns(1, 9, stages=False) == 3


def test_shards_that_are_not_whole_are_drawn_again(tmp_path):
    parts = draw_all(tmp_path / "x.npz", request())
    path = parts.shard_path(2)
    path.write_bytes(path.read_bytes()[:-1])
    parts.shard_path(4).unlink()
    assert parts.intact() == {0, 1, 3, 5}
    parts.release()
    parts = draw_all(tmp_path / "out", request(output="png", stages=True))
    (parts.images / "00001_2.png").unlink()
    (parts.strips / "00003_0.png").write_bytes(b"")
    assert parts.intact() == {0, 2, 4, 5}
    parts.release()


def test_a_run_with_other_settings_is_refused_by_name(tmp_path):
    parts = draw_all(tmp_path / "x.npz", request(), shards=range(3))
    parts.release()
    other = Parts(tmp_path / "x.npz", request(settings={"cfg": 1.5, "seed": 0}, num=4))
    with pytest.raises(DataError, match=r"num is 3 there, 4 asked; cfg is 1.0 there, 1.5 asked.* --overwrite"):
        other.require_same(overwrite=False)
    other.require_same(overwrite=True)
    assert Parts(tmp_path / "x.npz", request()).difference() == ""
    other.start()
    assert other.present() == set()
    assert other.difference() == ""
    other.release()


def test_two_runs_do_not_work_in_one_place(tmp_path):
    first = Parts(tmp_path / "x.npz", request())
    first.start()
    with pytest.raises(DataError, match="Another process"):
        Parts(tmp_path / "x.npz", request()).start()
    first.release()
    second = Parts(tmp_path / "x.npz", request())
    second.start()
    second.remove_if_empty()
    assert not second.directory.exists()


def test_too_little_space_is_told_beforehand(tmp_path, monkeypatch):
    asked = request(num=500)
    needed = {"npz": 2 * asked.raw_bytes() * asked.total, "png": asked.raw_bytes() * asked.total // 2}
    for output, amount in needed.items():
        parts = Parts(tmp_path / "far" / "out", request(num=500, output=output))
        for free, fits in ((amount, True), (amount - 1, False)):
            usage = type("Usage", (), {"free": free})
            monkeypatch.setattr("mvar_cli.parts.shutil.disk_usage", lambda path, usage=usage: usage)
            if fits:
                parts.require_space(0)
            else:
                with pytest.raises(DataError, match=r"free; 1000 samples"):
                    parts.require_space(0)
                parts.require_space(100)


def test_a_full_disk_while_drawing_says_what_is_kept(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "x.npz", request())
    parts.start()
    write = parts.write

    def full(shard, *arrays):
        if shard == 3:
            raise OSError(28, "No space left on device")
        write(shard, *arrays)

    monkeypatch.setattr(parts, "write", full)
    progressing = Progressing(parts, set(), list(parts.request.shards), lambda done, total: None)
    with pytest.raises(DataError, match=r"full; 3 of 6 parts are kept\. .*same command"):
        draw_shards(parts, list(parts.request.shards), draws(parts.request, (1,)), progressing, WriterPool(1))
    parts.release()


def test_progress_counts_what_others_have_written(tmp_path, monkeypatch):
    asked = request()
    parts = draw_all(tmp_path / "x.npz", asked, shards=[0, 1])
    seen = []
    progressing = Progressing(parts, {0}, [2, 3], lambda done, total: seen.append((done, total)))
    monkeypatch.setattr("mvar_cli.drawing.SECONDS_BETWEEN_LOOKS", 0.0)
    progressing.own(1, 2)
    progressing.own(2, 2)
    assert seen == [(1, 6), (3, 6), (4, 6)]
    for shard in (4, 5):
        images, tokens, _ = samples(asked)
        parts.write(shard, images[:1], tokens[:1], None)
    progressing.wait_for_others()
    assert seen[-1] == (6, 6)
    parts.release()


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    parts = draw_all(tmp_path / "x.npz", request())
    (tmp_path / "x.npz").write_text("mine")
    with pytest.raises(DataError, match="appeared"):
        put_together(parts, replace=False)
    assert (tmp_path / "x.npz").read_text() == "mine"
    assert parts.intact() == set(parts.request.shards)
    put_together(parts, replace=True)
    with np.load(tmp_path / "x.npz") as file:
        assert len(file["arr_0"]) == 6


def test_a_directory_that_is_replaced_moves_away_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").touch()
    parts = draw_all(tmp_path / "out", request(output="png", save_tokens=False))
    put_together(parts, replace=True)
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert not (tmp_path / "out" / "old.png").exists()


def test_a_mark_without_its_files_is_no_output(tmp_path):
    parts = draw_all(tmp_path / "x.npz", request())
    (parts.directory / PUBLISHING).write_text('{"final.npz": "' + str(tmp_path / "x.npz") + '"}')
    assert not is_published(parts)
    parts.release()


@pytest.mark.parametrize(
    ("out", "output_format", "message"),
    [("x", "gif", "gif"), ("x.png", "png", "directory"), ("x.png", "npz", "npz"), ("x.npz", "grid", "png")],
)
def test_outputs_that_contradict_their_format(tmp_path, out, output_format, message):
    with pytest.raises(DataError, match=message):
        output_target(tmp_path / out, output_format)


def test_outputs_that_are_there_are_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "x.npz").touch()
    (tmp_path / "with-stages-stages").mkdir()
    (tmp_path / "with-stages-stages" / "file").touch()
    for name, output_format in (("full", "png"), ("full", "grid"), ("x.npz", "npz"), ("with-stages", "png")):
        out = tmp_path / name
        target = output_target(out, output_format)
        with pytest.raises(DataError, match="--overwrite"):
            require_free(target, out, output_format, overwrite=False)
        require_free(target, out, output_format, overwrite=True)
    out = tmp_path / "new"
    target = output_target(out, "npz")
    assert target == out / "samples.npz"
    parts_directory(target).mkdir(parents=True)
    require_free(target, out, "npz", overwrite=False)
    assert strips_directory(tmp_path / "a.b") == tmp_path / "a.b-stages"


def test_writers_hold_back_whoever_brings_too_much():
    open_gate = threading.Event()
    brought = []

    def bring(pool):
        for number in range(5):
            pool.submit(open_gate.wait)
            brought.append(number)

    with WriterPool(threads=1, waiting=1) as pool:
        thread = threading.Thread(target=bring, args=(pool,))
        thread.start()
        deadline = time.monotonic() + 30
        while len(brought) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert brought == [0, 1]
        open_gate.set()
        thread.join()
    assert brought == [0, 1, 2, 3, 4]


def fail():
    raise ValueError("no ink")


def test_an_error_of_a_writer_is_the_commands():
    done = []
    with pytest.raises(ValueError, match="no ink"), WriterPool(threads=1) as pool:
        pool.submit(fail)
        for _ in range(100):
            pool.submit(done.append, 1)
    assert len(done) < 100
    with pytest.raises(ValueError, match="no ink"), WriterPool(threads=1) as pool:
        pool.submit(fail)


def test_an_interruption_finishes_what_was_brought():
    done = []
    with pytest.raises(KeyboardInterrupt), WriterPool(threads=1, waiting=3) as pool:
        for number in range(4):
            pool.submit(lambda number=number: (time.sleep(0.01), done.append(number)))
        raise KeyboardInterrupt
    assert done == [0, 1, 2, 3]


def test_npz_is_what_numpy_would_have_written(tmp_path):
    random = np.random.default_rng(0)
    parts = [
        (random.integers(0, 256, (size, 8, 6, 3), np.uint8), np.arange(size), random.integers(0, 99, (size, 5)))
        for size in (2, 3)
    ]
    for name in ("a.npz", "b.npz"):
        with NpzWriter(tmp_path / name, 5, save_tokens=True) as writer:
            for part in parts:
                writer.write(*part)
            writer.close()
    with np.load(tmp_path / "a.npz") as file:
        for name, arrays in zip(("arr_0", "labels", "tokens"), zip(*parts, strict=True), strict=True):
            assert np.array_equal(file[name], np.concatenate(arrays))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
