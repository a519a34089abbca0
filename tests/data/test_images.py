from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core.config.training import DataConfig
from mvar_core.data import images as images_module
from mvar_core.data.decoding import check_image, read_rgb
from mvar_core.data.images import (
    ImageRows,
    Views,
    open_images,
    pixel_batches,
    split_name,
)
from mvar_core.errors import DataError
from mvar_core.io.pixels import from_uint8, make_grid, save_png, to_uint8


def test_pixels_are_truncated_as_published():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.9999, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    pixels = to_uint8(values)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 1, 6, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert to_uint8(values.bfloat16()).shape == (1, 1, 6, 3)


def test_every_level_survives_the_way_into_the_model_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = from_uint8(levels)
    assert images.shape == (1, 3, 16, 16)
    assert images.min() == -1
    assert images.max() == 1
    exact = torch.from_numpy(levels).permute(0, 3, 1, 2).double() / 127.5 - 1
    assert (images - exact).abs().max() < 2e-7
    assert torch.equal(to_uint8(images), torch.from_numpy(levels))
    assert torch.equal(from_uint8(torch.from_numpy(levels)), images)


def test_pixels_that_cannot_be_written_to_are_read_without_a_warning(photographs):
    pixels = np.asarray(Image.fromarray(photographs[0][:8, :8]))[None]
    pixels.flags.writeable = False
    assert from_uint8(pixels).shape == (1, 3, 8, 8)


def test_batches_come_in_order_with_their_labels(class_folders):
    source = open_images(str(class_folders))
    batches = list(pixel_batches(source, (24, 16), batch_size=3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert np.concatenate([labels for _, labels in batches]).tolist() == source.labels.tolist()
    images = np.concatenate([pixels for pixels, _ in batches])
    assert np.array_equal(images, np.stack([source.read(index, (24, 16)) for index in range(7)]))


def test_batches_of_chosen_rows_hold_their_views(class_folders):
    source = open_images(str(class_folders))
    views = Views(DataConfig(flip=True, augmented_views=1), seed=3)
    rows = [20, 0, 4]  # view 2 of image 6, view 0 of image 0, view 1 of image 1
    [(pixels, labels)] = pixel_batches(source, (16, 16), rows, 8, views)
    expected = [views.apply(source.read(row // 3, (16, 16)), row // 3, row % 3) for row in rows]
    assert np.array_equal(pixels, np.stack(expected))
    assert labels.tolist() == [2, 0, 0]


def test_an_image_is_read_once_for_all_of_its_views(class_folders, monkeypatch):
    source = open_images(str(class_folders))
    opened, calls = source.open, []
    monkeypatch.setattr(source, "open", lambda index: calls.append(index) or opened(index))
    views = Views(DataConfig(flip=True, crops=3))
    assert sum(len(labels) for _, labels in pixel_batches(source, (8, 8), None, 6, views)) == 42
    assert sorted(calls) == list(range(7))


def test_a_damaged_file_stops_the_batches_and_leaves_no_thread(write):
    for number in range(6):
        path = write(f"flat/{number}.png", number)
    path.write_bytes(b"damaged")
    threads = threading.active_count()
    batches = pixel_batches(open_images(str(path.parent)), (8, 8), batch_size=2)
    next(batches)
    next(batches)
    with pytest.raises(DataError, match=r"5\.png"):
        next(batches)
    assert threading.active_count() == threads


@pytest.mark.parametrize("room", [0, 10**8])
def test_rows_are_the_same_kept_in_memory_or_not(class_folders, monkeypatch, room):
    monkeypatch.setattr(images_module, "CACHE_BYTES", room)
    source = open_images(str(class_folders))
    views = Views(DataConfig(flip=True))
    rows = ImageRows(source, (16, 16), views)
    assert len(rows) == 14
    expected = torch.cat([from_uint8(pixels) for pixels, _ in pixel_batches(source, (16, 16), None, 4, views)])
    for chosen in (np.array([13, 0, 5, 5]), np.array([5, 2, 13])):
        images, labels = rows.batch(chosen)
        assert torch.equal(images, expected[chosen])
        assert labels.tolist() == source.labels[chosen // 2].tolist()


def test_rows_kept_in_memory_are_read_once(class_folders):
    source = open_images(str(class_folders))
    rows = ImageRows(source, (16, 16))
    first, _ = rows.batch(np.arange(7))
    shutil.rmtree(class_folders)
    assert torch.equal(rows.batch(np.arange(7))[0], first)


def test_a_split_may_follow_the_name(tmp_path, monkeypatch):
    assert split_name("digits") == ("digits", "train")
    assert split_name("digits:test") == ("digits", "test")
    assert split_name("some/folder:val", "train") == ("some/folder", "val")
    assert split_name("C:/pictures") == ("C:/pictures", "train")
    (tmp_path / "odd:test").mkdir()
    assert split_name(f"{tmp_path}/odd:test") == (f"{tmp_path}/odd:test", "train")


def test_a_grid_is_laid_out_row_by_row(tmp_path):
    images = np.stack([np.full((3, 4, 3), 10 * number, np.uint8) for number in range(1, 6)])
    grid = make_grid(images, columns=3, gap=1)
    assert grid.shape == (7, 14, 3)
    assert grid[0, 0, 0] == 10
    assert grid[0, 5, 0] == 20
    assert grid[4, 0, 0] == 40
    assert grid[3, 0, 0] == grid[0, 4, 0] == grid[4, 10, 0] == 255
    assert np.array_equal(make_grid(torch.from_numpy(images), columns=3, gap=1), grid)
    save_png(grid, tmp_path / "new/grid.png")
    with Image.open(tmp_path / "new/grid.png") as written:
        assert np.array_equal(np.asarray(written), grid)


def test_a_png_is_whole_or_absent(tmp_path, photographs):
    save_png(photographs[0][:8, :8], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), photographs[0][:8, :8])
    with pytest.raises(TypeError):
        save_png(np.zeros((2, 2, 7), np.uint8), tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_importing_loads_no_optional_library():
    code = "import sys, mvar_core.data.images, mvar_core.data.tokens, mvar_core.data.evaluation_images as e;"
    code += "sys.exit(any(name in sys.modules for name in ('sklearn', 'torch_fidelity', 'torchvision', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("header", [b"%!PS-Adobe-3.0 EPSF-3.0", b"\xc5\xd0\xd3\xc6"])
def test_an_eps_file_named_png_starts_no_program(tmp_path, monkeypatch, header):
    """Pillow recognises EPS by content and would hand it to Ghostscript, which runs what is in it."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(ghostscript))
    eps = tmp_path / "1.png"
    eps.write_bytes(header + b"\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_rgb, check_image):
        with pytest.raises(DataError, match="1.png"):
            read(eps)
    assert not (tmp_path / "started").exists()
