from __future__ import annotations

import logging
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.data.images import open_images
from mvar_core.errors import DataError


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8)


def read(path: Path | str, batch_size: int = 3, image_shape: tuple[int, int] | None = None) -> np.ndarray:
    batches = list(open_evaluation_images(str(path), image_shape).batches(batch_size))
    assert all(batch.dtype == torch.uint8 and len(batch) == batch_size for batch in batches[:-1])
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("array", "labels"), [("arr_0", "labels"), ("images", "labels"), ("arr_0", "arr_1")])
def test_an_npz_is_read_in_batches(tmp_path, images, save, array, labels):
    save(tmp_path / "samples.npz", **{array: images, labels: np.arange(7, dtype=np.int32)})
    opened = open_evaluation_images(str(tmp_path / "samples.npz"))
    assert (opened.count, opened.image_shape) == (7, (8, 12))
    assert opened.labels.tolist() == list(range(7))
    assert np.array_equal(read(tmp_path / "samples.npz"), images)
    assert sum(len(batch) for batch in opened.batches(7)) == 7  # and again, from the start


def test_an_npz_without_labels_has_none(tmp_path, images):
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.zeros((7, 3)))
    assert open_evaluation_images(str(tmp_path / "a.npz")).labels is None


@pytest.mark.parametrize(
    "labels",
    [np.arange(6), np.zeros((7, 1), int), np.zeros(7), np.arange(7) - 1, np.array([None] * 7), np.full(7, 2**64 - 1)],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, images, labels):
    np.savez(tmp_path / "a.npz", arr_0=images, labels=labels)
    with pytest.raises(DataError, match=r"a\.npz.*labels"):
        open_evaluation_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("shape", [(0, 8), (10**6, 10**6), (-1, 8)])
def test_a_size_that_no_image_has_is_refused(tmp_path, images, shape):
    np.savez(tmp_path / "a.npz", arr_0=images)
    with pytest.raises(DataError, match=r"a\.npz"):
        open_evaluation_images(str(tmp_path / "a.npz"), shape)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_never_whole_in_memory(tmp_path, save):
    save(tmp_path / "large.npz", arr_0=np.zeros((400, 128, 128, 3), np.uint8))  # 19.7 MB
    opened = open_evaluation_images(str(tmp_path / "large.npz"))
    tracemalloc.start()
    count = sum(len(batch) for batch in opened.batches(8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 400
    assert peak < 4 * 2**20


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), r"float32 \(4, 8, 8, 3\)"),
        (np.zeros((4, 3, 8, 8), np.uint8), r"uint8 \(4, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"uint8 \(0, 8, 8, 3\)"),
        (np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8)), "stored in Fortran order"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path, array, found):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(DataError, match=rf"a\.npz, array arr_0 is {found if '(' in found else '.*' + found}.*expected"):
        open_evaluation_images(str(tmp_path / "a.npz"))


def test_objects_are_not_images(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"a\.npz, array arr_0"):
        open_evaluation_images(str(tmp_path / "a.npz"))


def test_an_npz_of_statistics_says_what_it_is_good_for(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"holds no images.*found mu, sigma.*can serve as --reference"):
        open_evaluation_images(str(tmp_path / "a.npz"))


def test_a_missing_a_false_and_a_cut_npz_are_refused(tmp_path, images):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match=r"a\.npz does not exist"):
        open_evaluation_images(str(path))
    path.write_bytes(b"not a zip file")
    with pytest.raises(DataError, match=r"a\.npz is not a whole npz file"):
        open_evaluation_images(str(path))
    np.savez(path, arr_0=images)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"a\.npz is not a whole npz file"):
        open_evaluation_images(str(path))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("bytes_of_it", [slice(0, -400), slice(0, None), slice(0, 0)])
def test_an_array_of_another_length_than_it_promises_is_refused(tmp_path, images, compression, bytes_of_it):
    np.save(tmp_path / "whole.npy", images)
    content = (tmp_path / "whole.npy").read_bytes()[bytes_of_it]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", content + bytes(1 if bytes_of_it.stop is None else 0))
    with pytest.raises(DataError, match=r"a\.npz"):
        open_evaluation_images(str(tmp_path / "a.npz"))


def test_changed_bytes_are_noticed(tmp_path, images):
    np.savez(tmp_path / "a.npz", arr_0=images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[700] ^= 255
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz.*CRC"):
        read(tmp_path / "a.npz")


def test_a_folder_of_one_size_is_read_as_it_is(write, piece):
    for number in range(5):
        path = write(f"samples/{number:03d}.png", number, shape=(16, 24))
    opened = open_evaluation_images(str(path.parent))
    assert (opened.count, opened.image_shape, opened.labels) == (5, (16, 24), None)
    assert np.array_equal(read(path.parent), np.stack([piece(number, (16, 24)) for number in range(5)]))


def test_class_folders_give_labels(write):
    for number, name in enumerate(["b/0.png", "a/0.png", "b/1.png"]):
        path = write(f"samples/{name}", number)
    opened = open_evaluation_images(str(path.parent.parent))
    assert opened.labels.tolist() == [0, 1, 1]
    assert opened.class_names == ("a", "b")


def test_a_folder_of_several_sizes_is_refused_naming_two_files(write):
    write("samples/0.png", 0, shape=(16, 24))
    write("samples/1.png", 1, shape=(16, 24))
    path = write("samples/2.png", 2, shape=(24, 16))
    with pytest.raises(DataError, match=r"0\.png is 16×24, 2\.png is 24×16 pixels"):
        open_evaluation_images(str(path.parent))


def test_a_folder_with_a_damaged_file_is_refused_at_once(write):
    path = write("samples/0.png", 0, shape=(120, 120))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        open_evaluation_images(str(path.parent))


def test_a_reference_of_photographs_is_brought_to_the_size_asked_for(write, caplog):
    write("photos/0.png", 0, shape=(16, 16))
    path = write("photos/1.png", 1, shape=(60, 80)).parent
    with caplog.at_level(logging.WARNING, logger="mvar"):
        pixels = read(path, image_shape=(16, 16))
    assert "images of 60×80 pixels are resized and cropped to 16×16" in caplog.text
    source = open_images(str(path))
    assert np.array_equal(pixels, np.stack([source.read(0, (16, 16)), source.read(1, (16, 16))]))


def test_an_npz_is_brought_to_the_size_asked_for(tmp_path, images, caplog):
    np.savez(tmp_path / "a.npz", arr_0=images)
    with caplog.at_level(logging.WARNING, logger="mvar"):
        assert read(tmp_path / "a.npz", image_shape=(4, 4)).shape == (7, 4, 4, 3)
        assert "8×12 pixels are resized and cropped to 4×4" in caplog.text
        caplog.clear()
        assert np.array_equal(read(tmp_path / "a.npz", image_shape=(8, 12)), images)
    assert not caplog.text


def test_digits_are_read_at_the_size_asked_for():
    opened = open_evaluation_images("digits:test", (16, 16))
    assert (opened.count, opened.image_shape, opened.class_names) == (360, (16, 16), tuple("0123456789"))
    source = open_images("digits", "test")
    assert opened.labels.tolist() == source.labels.tolist()
    assert np.array_equal(next(iter(opened.batches(2)))[1].permute(1, 2, 0).numpy(), source.read(1, (16, 16)))
    with pytest.raises(DataError, match="digits has no image size of its own"):
        open_evaluation_images("digits")


def test_a_part_of_the_images_is_those_of_the_whole(tmp_path, write, images):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=images)
        opened = open_evaluation_images(str(tmp_path / "a.npz"))
        part = torch.cat(list(opened.batches(2, 3, 6))).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(part, images[3:6])
    for number in range(5):
        path = write(f"samples/{number}.png", number, shape=(16, 24))
    opened = open_evaluation_images(str(path.parent))
    whole = torch.cat(list(opened.batches()))
    assert torch.equal(torch.cat(list(opened.batches(2, 1, 4))), whole[1:4])
    assert len(torch.cat(list(opened.batches(2, 3, 99)))) == 2


def test_the_fingerprint_is_that_of_the_pixels_and_their_size(tmp_path, write, images):
    np.savez(tmp_path / "a.npz", arr_0=images)
    first = open_evaluation_images(str(tmp_path / "a.npz")).fingerprint()
    assert open_evaluation_images(str(tmp_path / "a.npz"), (4, 4)).fingerprint() != first
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    assert open_evaluation_images(str(tmp_path / "b.npz")).fingerprint() == first
    images[3, 2, 1, 0] ^= 1
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert open_evaluation_images(str(tmp_path / "a.npz")).fingerprint() != first
    path = write("samples/0.png", 0)
    write("samples/1.png", 1)
    folder = open_evaluation_images(str(path.parent)).fingerprint()
    shutil.copytree(path.parent, tmp_path / "copy")
    assert open_evaluation_images(str(tmp_path / "copy")).fingerprint() == folder
    (tmp_path / "copy" / "0.png").rename(tmp_path / "copy" / "2.png")
    assert open_evaluation_images(str(tmp_path / "copy")).fingerprint() != folder  # another order
    assert (
        open_evaluation_images("digits", (8, 8)).fingerprint()
        != open_evaluation_images("digits:test", (8, 8)).fingerprint()
    )


def test_lossy_and_resized_images_are_known(tmp_path, write, images):
    write("samples/0.png", 0, shape=(16, 16))
    write("samples/1.jpg", 1, shape=(16, 16))
    path = write("samples/2.webp", 2, shape=(16, 16))
    assert open_evaluation_images(str(path.parent)).num_lossy == 2
    assert open_evaluation_images(str(path.parent), (16, 16)).stored_shape is None
    assert open_evaluation_images(str(path.parent), (8, 8)).stored_shape == (16, 16)
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert open_evaluation_images(str(tmp_path / "a.npz"), (4, 4)).stored_shape == (8, 12)
    assert open_evaluation_images(str(tmp_path / "a.npz"), (8, 12)).stored_shape is None


def test_other_kinds_of_pixels_are_converted(tmp_path):
    """Gray and CMYK become RGB, transparent parts white, 16-bit gray is scaled to 8 bits."""
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    transparent = np.stack([ramp, ramp, ramp, np.where(ramp < 128, 0, 255).astype(np.uint8)], axis=-1)
    expected = {
        "0-gray.png": (Image.fromarray(ramp), ramp),
        "1-alpha.png": (Image.fromarray(transparent, "RGBA"), np.where(ramp < 128, 255, ramp)),
        "2-sixteen.png": (Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        "3-cmyk.tif": (Image.fromarray(ramp).convert("RGB").convert("CMYK"), ramp),
    }
    for name, (image, _) in expected.items():
        image.save(tmp_path / name)
    pixels = read(tmp_path)
    for found, (_, gray) in zip(pixels, expected.values(), strict=True):
        assert np.array_equal(found, np.repeat(gray[..., None], 3, axis=2))


def test_a_file_that_is_damaged_inside_is_named_when_it_is_read(write):
    path = write("samples/1.png", 1, shape=(120, 120))
    write("samples/0.png", 0, shape=(120, 120))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    opened = open_evaluation_images(str(path.parent))
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(opened.batches())
