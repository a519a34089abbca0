from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.data.images import open_images, pixel_batches
from mvar_core.errors import DataError

Member = tuple[str, bytes]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[Member], kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path, piece) -> Path:
    """Two shards of four and three images, of classes 0, 1, 2, 0, 1, 2, 0."""
    for shard, numbers in enumerate((range(4), range(4, 7))):
        members = []
        for number in numbers:
            members += [(f"{number:06d}.cls", str(number % 3).encode()), (f"{number:06d}.png", png(piece(number)))]
            members += [(f"{number:06d}.txt", b"a caption")]
        write_tar(tmp_path / f"shards/{shard:03d}.tar", members)
    return tmp_path / "shards"


def test_images_and_classes_of_shards(shards, piece):
    source = open_images(str(shards))
    assert source.item_names[:2] == ["000.tar/000000.png", "000.tar/000001.png"]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.class_names == ("0", "1", "2")
    for index in (6, 0, 3):  # in any order
        assert np.array_equal(source.read(index, (40, 40)), piece(index)[:, 8:48])
    source.check()
    assert len(open_images(f"{shards}/{{000..001}}.tar")) == len(open_images(f"{shards}/*.tar")) == 7
    assert len(open_images(f"{shards}/001.tar")) == 3


def test_batches_read_in_threads_come_in_order(shards):
    source = open_images(str(shards))
    batches = list(pixel_batches(source, (16, 16), batch_size=2))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 0], [1, 2], [0]]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_long_names_and_every_tar_format(tmp_path, piece, kind):
    name = "a/" + "long-" * 19 if kind == tarfile.USTAR_FORMAT else "a/" + "long-" * 40
    write_tar(tmp_path / "0.tar", [(f"./{name}.png", png(piece(1))), (f"./{name}.cls", b"7\n")], kind)
    source = open_images(str(tmp_path / "0.tar"))
    assert source.item_names == [f"0.tar/{name}.png"]
    assert source.labels.tolist() == [7]
    assert np.array_equal(source.read(0, (40, 56)), piece(1))


def test_names_that_repeat_in_another_folder_are_other_samples(tmp_path, piece):
    write_tar(tmp_path / "0.tar", [("a/1.png", png(piece(1))), ("b/1.png", png(piece(2)))])
    source = open_images(str(tmp_path / "0.tar"))
    assert source.item_names == ["0.tar/a/1.png", "0.tar/b/1.png"]


def test_class_names_from_text_json_and_a_file_beside(tmp_path, piece):
    image = png(piece())
    write_tar(tmp_path / "text.tar", [("a.png", image), ("a.cls", b"owl"), ("b.png", image), ("b.cls", b"cat")])
    source = open_images(str(tmp_path / "text.tar"))
    assert (source.class_names, source.labels.tolist()) == (("cat", "owl"), [1, 0])
    values = [{"label": 2, "class_name": "owl"}, {"label": 0, "class_name": "cat"}]
    members = [(f"{number}.json", json.dumps(value).encode()) for number, value in enumerate(values)]
    members = [part for number in range(2) for part in (members[number], (f"{number}.png", image))]
    write_tar(tmp_path / "json.tar", members)
    source = open_images(str(tmp_path / "json.tar"))
    assert (source.class_names, source.labels.tolist()) == (("cat", "1", "owl"), [2, 0])
    (tmp_path / "classes.txt").write_text("fish\nbird\nfrog\n")
    assert open_images(str(tmp_path / "json.tar")).class_names == ("fish", "bird", "frog")
    (tmp_path / "classes.json").write_text('{"1": "b", "0": "a", "2": "c"}')
    assert open_images(str(tmp_path / "json.tar")).class_names == ("a", "b", "c")
    (tmp_path / "classes.json").write_text('["a"]')
    with pytest.raises(DataError, match="images of class 2, and names for 1 classes"):
        open_images(str(tmp_path / "json.tar"))


def test_a_split_has_the_classes_of_train(tmp_path, piece):
    image = png(piece())
    write_tar(tmp_path / "train-0.tar", [("a.png", image), ("a.cls", b"owl"), ("b.png", image), ("b.cls", b"cat")])
    write_tar(tmp_path / "test-0.tar", [("c.png", image), ("c.cls", b"owl")])
    source = open_images(f"{tmp_path}:test")
    assert (source.class_names, source.labels.tolist()) == (("cat", "owl"), [1])
    write_tar(tmp_path / "test-0.tar", [("c.png", image), ("c.cls", b"oul")])
    with pytest.raises(DataError, match="class 'oul' is not among the 2 classes of the split train. Did you mean owl"):
        open_images(str(tmp_path), "test")


def test_images_without_classes_are_one_class_and_half_of_them_is_refused(tmp_path, piece):
    image = png(piece())
    write_tar(tmp_path / "flat/0.tar", [("a.png", image), ("b.png", image)])
    source = open_images(str(tmp_path / "flat"))
    assert (source.class_names, source.labels.tolist()) == (("flat",), [0, 0])
    write_tar(tmp_path / "half/0.tar", [("a.png", image), ("a.cls", b"1"), ("b.png", image)])
    with pytest.raises(DataError, match=r"0\.tar/b\.png has no class \(1 of 2 images have none\)"):
        open_images(str(tmp_path / "half"))


def test_damaged_shards_and_members_are_named(tmp_path, shards, piece):
    content = png(piece())
    write_tar(tmp_path / "bad/0.tar", [("good.png", content), ("cut.png", content[:-200]), ("no.jpg", b"hello")])
    source = open_images(str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"bad/0\.tar: cut\.png cannot be read as an image"):
        source.read(1, (8, 8))
    with pytest.raises(DataError, match=r"bad/0\.tar: no\.jpg is not an image"):
        source.read(2, (8, 8))
    with pytest.raises(DataError, match=r"bad/0\.tar: (cut\.png|no\.jpg)"):
        source.check()
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"001\.tar is not a whole tar file"):
        open_images(str(shards))
    write_tar(tmp_path / "outer.tar", [("n01440764.tar", whole)])
    with pytest.raises(DataError, match=r"holds no images .*further tar files \(n01440764\.tar"):
        open_images(str(tmp_path / "outer.tar"))


def test_tar_shards_serve_as_a_reference(shards, piece):
    opened = open_evaluation_images(str(shards))
    assert (opened.count, opened.image_shape) == (7, (40, 56))
    assert opened.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    batch = next(iter(opened.batches(3, start=2)))
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), piece(3))
    assert len(opened.fingerprint()) == 64
