from __future__ import annotations

import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mvar_core.data.decoding import check_image, read_rgb
from mvar_core.data.folders import FolderSource, find_classes
from mvar_core.data.images import open_images
from mvar_core.errors import DataError


def test_class_folders_are_classes_in_alphabetical_order(class_folders):
    source = open_images(str(class_folders))
    assert source.class_names == ("ant", "bee", "cat")
    assert source.item_names == [
        "ant/a.png", "ant/b.bmp", "bee/a.webp", "bee/b.tiff", "cat/a.png", "cat/b.jpg", "cat/more/c.png"
    ]  # fmt: skip
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    source.check()
    assert all(source.read(index, (24, 16)).shape == (24, 16, 3) for index in range(7))


def test_a_flat_folder_is_one_class_named_after_it(write):
    write("holiday/b.png", 1)
    write("holiday/A.JPG", 2)
    source = open_images(str(write("holiday/c.jpeg", 3).parent))
    assert source.class_names == ("holiday",)
    assert source.item_names == ["A.JPG", "b.png", "c.jpeg"]
    assert source.labels.tolist() == [0, 0, 0]


def test_reading_resizes_and_crops(write, piece):
    path = write("flat/a.png", 0, shape=(64, 96))
    assert np.array_equal(open_images(str(path.parent)).read(0, (64, 64)), piece(0, (64, 96))[:, 16:80])


def test_train_and_validation_folders_are_splits(tmp_path, write):
    for number, name in enumerate(["train/a/0.png", "train/b/0.png", "train/c/0.png", "val/c/0.png", "val/a/0.png"]):
        write(f"set/{name}", number)
    root = tmp_path / "set"
    assert len(open_images(str(root))) == 3
    for source in (open_images(str(root), "val"), open_images(f"{root}:val"), open_images(f"{root}:Validation")):
        assert source.class_names == ("a", "b", "c")
        assert source.item_names == ["a/0.png", "c/0.png"]
        assert source.labels.tolist() == [0, 2]  # train's numbers, though class b is absent
    with pytest.raises(DataError, match="test.*train, val"):
        open_images(f"{root}:test")


SPELLINGS = [("train", "val"), ("Train", "Test"), ("training", "validation"), ("TRAIN", "Validate"), ("train", "valid"),
             ("train", "dev"), ("train", "eval"), ("Training", "Testing")]  # fmt: skip


@pytest.mark.parametrize(("train", "other"), SPELLINGS)
def test_spellings_of_splits(tmp_path, write, train, other, caplog):
    for number, name in enumerate(
        [f"{train}/cat/0.png", f"{train}/dog/0.png", f"{train}/dog/1.png", f"{other}/dog/2.png"]
    ):
        write(f"set/{name}", number)
    (tmp_path / "set/devkit/data").mkdir(parents=True)
    (tmp_path / "set/devkit/data/meta.mat").write_bytes(b"x")
    root = tmp_path / "set"
    with caplog.at_level(logging.INFO, logger="mvar"):
        source = open_images(str(root))
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]
    assert f"{root}:{other}" in caplog.text  # what the others are called
    source = open_images(f"{root}:{other}")
    assert (source.item_names, source.labels.tolist()) == (["dog/2.png"], [1])


def test_flat_splits_are_of_one_class(tmp_path, write):
    for number, name in enumerate(["train/0.png", "train/1.png", "val/2.png"]):
        write(f"set/{name}", number)
    train, val = open_images(str(tmp_path / "set")), open_images(f"{tmp_path}/set:val")
    assert (train.item_names, val.item_names) == (["0.png", "1.png"], ["2.png"])
    assert train.class_names == val.class_names == ("train",)


def test_a_flat_split_of_classes_has_none(tmp_path, write, caplog):
    for number, name in enumerate(["train/a/0.png", "train/b/1.png", "test/2.png", "test/3.png"]):
        write(f"set/{name}", number)
    assert open_images(str(tmp_path / "set")).class_names == ("a", "b")
    caplog.clear()
    source = open_images(f"{tmp_path}/set:test")
    assert (source.class_names, source.labels.tolist()) == (("test",), [0, 0])
    assert "not divided into classes" in caplog.text


def test_a_class_may_be_called_train(tmp_path, write, caplog):
    for number, name in enumerate(["train/0.png", "train/old/1.png", "bus/0.png", "car/0.png"]):
        write(f"set/{name}", number)
    source = open_images(str(tmp_path / "set"))
    assert source.class_names == ("bus", "car", "train")
    assert source.labels.tolist() == [0, 1, 2, 2]
    assert not caplog.messages
    write("set/test/0.png", 5)
    assert len(open_images(str(tmp_path / "set")).class_names) == 4
    assert "test, train are counted as classes, since bus is one" in caplog.text


def test_folders_next_to_splits_are_left_out(tmp_path, write, caplog):
    for number, name in enumerate(["train/a/0.png", "test/a/0.png", "unlabeled/0.png"]):
        write(f"set/{name}", number)
    assert open_images(str(tmp_path / "set")).item_names == ["a/0.png"]
    assert "left out: images in unlabeled" in caplog.text


def test_splits_without_train_must_be_named(tmp_path, write):
    for number, name in enumerate(["val/a/0.png", "test/a/0.png", "test/b/0.png"]):
        write(f"set/{name}", number)
    with pytest.raises(DataError, match="train.*test, val"):
        open_images(str(tmp_path / "set"))
    assert open_images(f"{tmp_path}/set:test").class_names == ("a", "b")


def test_two_folders_of_one_split_must_be_told_apart(tmp_path, write):
    for number, name in enumerate(["train/a/0.png", "dev/a/1.png", "eval/a/2.png"]):
        write(f"set/{name}", number)
    with pytest.raises(DataError, match="2 splits dev, eval.*set:dev"):
        open_images(f"{tmp_path}/set:val")
    assert open_images(f"{tmp_path}/set:eval").where(0).endswith("eval/a/2.png")


def test_tiny_imagenet(tmp_path, write):
    for number, name in enumerate(["n01629819/images/a.JPEG", "n01443537/images/b.JPEG", "n01443537/images/c.JPEG"]):
        write(f"tiny/train/{name}", number)
    (tmp_path / "tiny/train/n01443537/n01443537_boxes.txt").write_text("b.JPEG\t0\t0\t62\t62\n")
    for number in range(3):
        write(f"tiny/val/images/val_{number}.JPEG", number)
        write(f"tiny/test/images/test_{number}.JPEG", number)
    (tmp_path / "tiny/wnids.txt").write_text("n01629819\nn01443537\n")
    annotations = tmp_path / "tiny/val/val_annotations.txt"
    lines = [
        "val_0.JPEG\tn01629819\t0\t0\t62\t62",
        "val_1.JPEG\tn01443537\t0\t0\t9\t9",
        "val_2.JPEG\tn01443537\t1\t1\t9\t9",
    ]
    annotations.write_text("\n".join(lines) + "\n")
    train, val = open_images(str(tmp_path / "tiny")), open_images(f"{tmp_path}/tiny:val")
    assert train.class_names == val.class_names == ("n01443537", "n01629819")
    assert train.labels.tolist() == [0, 0, 1]
    assert train.classes.find("goldfish") == train.classes.find("n01443537") == [0]
    labels = dict(zip(val.item_names, val.labels.tolist(), strict=True))
    assert labels == {"images/val_0.JPEG": 1, "images/val_1.JPEG": 0, "images/val_2.JPEG": 0}
    val.check()
    assert open_images(f"{tmp_path}/tiny:test").class_names == ("images",)
    annotations.write_text("\n".join(lines[:2]))
    with pytest.raises(DataError, match=r"val_2\.JPEG has no class"):
        open_images(f"{tmp_path}/tiny:val")
    annotations.write_text("\n".join([*lines, "val_3.JPEG\tn01443537\t0\t0\t1\t1"]))
    with pytest.raises(DataError, match=r"val_3\.JPEG does not exist"):
        open_images(f"{tmp_path}/tiny:val").check()


def test_a_class_that_train_lacks_is_refused(tmp_path, write):
    for number, name in enumerate(["train/apple/0.png", "train/fig/0.png", "test/aple/0.png"]):
        write(f"set/{name}", number)
    with pytest.raises(DataError, match=r"class 'aple' is not among the 2 classes.*Did you mean apple\?"):
        open_images(str(tmp_path / "set"), "test")


def test_a_folder_without_splits_has_no_test_split(class_folders):
    with pytest.raises(DataError, match=r"pictures has no split 'test'"):
        open_images(str(class_folders), "test")
    with pytest.raises(DataError, match=r"no split 'tests'.*Did you mean test\?"):
        open_images(str(class_folders), "tests")


def test_a_missing_folder_a_file_and_missing_shards_are_refused(tmp_path, write):
    with pytest.raises(DataError, match=r"nowhere does not exist.*`digits`"):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is a file; expected a folder"):
        open_images(str(write("photo.png")))
    with pytest.raises(DataError, match=r"shard-\{000\.\.009\}\.tar.* shard-000\.tar"):
        open_images("shard-{000..009}.tar")


def test_folders_without_images_are_refused(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(DataError, match=r"empty holds no images; found nothing"):
        open_images(str(folder))
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"found 1 \.txt"):
        open_images(str(folder))
    (folder / "shard-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-0\.tar is not a whole tar file: empty file"):
        open_images(str(folder))


def test_images_next_to_class_folders_are_left_out_and_counted(class_folders, write, caplog):
    write("pictures/stray.png")
    assert len(open_images(str(class_folders))) == 7
    assert "images next to the class folders: 1 (stray.png)" in caplog.text


def test_more_images_next_to_folders_than_in_them_are_refused(tmp_path, write):
    for number in range(3):
        write(f"flat/{number}.png")
    write("flat/more/0.png")
    write("flat/more/1.png")
    with pytest.raises(DataError, match=r"flat holds 3 images \(0\.png.*2 in folders \(more\)"):
        open_images(str(tmp_path / "flat"))


def test_what_is_left_out_is_listed(class_folders, caplog):
    (class_folders / "aardvark").mkdir()
    for name in ("cat/a.eps", "cat/b.PDF", "cat/more/c.pdf", "ant/LICENSE", "readme.md"):
        (class_folders / name).write_bytes(b"%!PS")
    for name in ("Thumbs.db", "ant/desktop.ini", ".DS_Store", "ant/._a.png"):  # not worth a word
        (class_folders / name).write_bytes(b"x")
    assert open_images(str(class_folders)).class_names == ("ant", "bee", "cat")
    (message,) = caplog.messages
    for part in ("2 .pdf", "1 .eps", "1 .md", "1 .txt", "1 without suffix", "aardvark"):
        assert part in message
    assert "ini" not in message


@pytest.mark.parametrize("junk", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", ".hidden", "#recycle", "$RECYCLE.BIN"])
def test_folders_of_systems_are_no_classes(class_folders, write, junk):
    write(f"pictures/{junk}/a.png")
    write(f"pictures/{junk}/cat/a.png")
    write(f"pictures/cat/{junk}/b.png")
    source = open_images(str(class_folders))
    assert source.class_names == ("ant", "bee", "cat")
    assert len(source) == 7


def test_links_are_followed_but_never_in_circles(class_folders, write):
    os.symlink(class_folders / "cat", class_folders / "dog")
    os.symlink(class_folders / "cat", class_folders / "cat/more/again")
    classes = find_classes(class_folders)
    assert list(classes) == ["ant", "bee", "cat", "dog"]
    assert classes["dog"] == ["dog/a.png", "dog/b.jpg", "dog/more/c.png"]


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(class_folders):
    os.symlink("nowhere.png", class_folders / "cat/dangling.png")
    source = open_images(str(class_folders))
    assert len(source) == 8
    with pytest.raises(DataError, match=r"cat/dangling\.png does not exist"):
        source.check()
    flat = class_folders / "cat/more"
    os.symlink("nowhere.png", flat / "dangling.png")
    with pytest.raises(DataError, match=r"more/dangling\.png does not exist"):
        open_images(str(flat)).check()


def test_something_else_under_an_images_name_is_named(tmp_path):
    path = tmp_path / "flat/page.jpg"
    path.parent.mkdir()
    path.write_text("<html></html>")
    source = open_images(str(path.parent))
    with pytest.raises(DataError, match=r"page\.jpg is not an image"):
        source.check()
    with pytest.raises(DataError, match=r"page\.jpg is not an image"):
        source.read(0, (8, 8))


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tiff"])
def test_a_truncated_file_is_named_by_the_check_and_by_reading(write, extension):
    write(f"flat/a.{extension}", 0, shape=(120, 160))
    path = write(f"flat/b.{extension}", 1, shape=(120, 160))
    source = open_images(str(path.parent))
    source.check()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    for attempt in (source.check, lambda: source.read(1, (16, 16))):
        with pytest.raises(DataError, match=rf"b\.{extension} (cannot be read as|is not) an image") as failure:
            attempt()
        assert "\n" not in str(failure.value)


def test_damaged_pixels_are_found_when_read(write):
    path = write("flat/a.png", 0, shape=(120, 160))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        open_images(str(path.parent)).read(0, (16, 16))


def test_an_empty_and_a_vanished_file_are_named(write):
    path = write("flat/a.png")
    source = open_images(str(path.parent))
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png is not an image"):
        source.check()
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png does not exist"):
        source.read(0, (8, 8))


def test_bytes_after_the_end_of_an_image_do_no_harm(write):
    path = write("flat/a.jpg", 0, shape=(120, 160))
    path.write_bytes(path.read_bytes() + bytes(500))
    open_images(str(path.parent)).check()


def test_the_check_reports_progress(class_folders):
    calls = []
    open_images(str(class_folders)).check(lambda done, total: calls.append((done, total)))
    assert calls == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png"])
def test_the_exif_orientation_is_applied(write, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    path = write(name, 0, shape=(40, 56), exif=exif)
    with Image.open(path) as stored:
        upright = np.rot90(np.asarray(stored), -1)
    assert np.array_equal(np.asarray(read_rgb(path)), upright)
    assert check_image(path) == (56, 40)


def test_every_kind_of_pixel_becomes_rgb(tmp_path, photographs):
    photograph = Image.fromarray(photographs[0][:32, :32])
    gray = np.asarray(photograph.convert("L"))
    half = Image.new("L", photograph.size, 0)
    half.paste(255, (0, 0, 16, 32))
    clear = photograph.copy()
    clear.putalpha(half)
    images = {
        "1.png": photograph.convert("1"),
        "L.png": photograph.convert("L"),
        "16.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "P.png": photograph.quantize(),
        "RGBA.png": clear,
        "LA.png": clear.convert("LA"),
        "CMYK.tiff": photograph.convert("CMYK"),
        "YCbCr.tiff": photograph.convert("YCbCr"),
    }
    read = {}
    for name, image in images.items():
        image.save(tmp_path / name)
        result = read_rgb(tmp_path / name)
        assert result.mode == "RGB", name
        read[name] = np.asarray(result).astype(int)
    assert np.array_equal(read["L.png"], np.repeat(gray[..., None], 3, axis=2))
    assert np.array_equal(read["16.png"], read["L.png"])
    assert (read["RGBA.png"][:, 16:] == 255).all()  # what is transparent is white
    assert np.array_equal(read["RGBA.png"][:, :16], np.asarray(photograph)[:, :16])
    assert (read["LA.png"][:, 16:] == 255).all()
    for name in ("P.png", "CMYK.tiff", "YCbCr.tiff"):
        assert np.abs(read[name] - np.asarray(photograph)).mean() < 8, name


def test_a_transparent_palette_colour_is_white(tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("P")
    image.save(tmp_path / "clear.png", transparency=0)
    assert (np.asarray(read_rgb(tmp_path / "clear.png")) == 255).all()


def test_pixels_without_a_range_are_refused(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    with pytest.raises(DataError, match="its pixels are of kind 'F'; convert it to 8 or 16 bits a channel"):
        read_rgb(path)


def test_the_fingerprint_follows_names_labels_and_sizes_not_the_place(class_folders, tmp_path):
    fingerprint = open_images(str(class_folders)).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(class_folders, copy)
    assert FolderSource(copy).fingerprint() == fingerprint
    (copy / "cat/a.png").write_bytes((copy / "cat/a.png").read_bytes() + b"x")
    assert FolderSource(copy).fingerprint() != fingerprint
