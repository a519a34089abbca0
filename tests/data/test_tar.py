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
    for listed in ('{"0": "b", "3": "a"}', '{"a": 0, "b": 0}', "[]", '["a", ""]'):
        (tmp_path / "classes.json").write_text(listed)
        with pytest.raises(DataError, match=r"classes\.json does not list"):
            open_images(str(tmp_path / "json.tar"))
    (tmp_path / "classes.json").write_text('["a"]')
    with pytest.raises(DataError, match="is of class 2; there are names for 1 classes"):
        open_images(str(tmp_path / "json.tar"))


def test_a_split_has_the_classes_of_train(tmp_path, piece):
    image = png(piece())
    write_tar(tmp_path / "train-0.tar", [("a.png", image), ("a.cls", b"owl"), ("b.png", image), ("b.cls", b"cat")])
    write_tar(tmp_path / "test-0.tar", [("c.png", image), ("c.cls", b"owl")])
    source = open_images(f"{tmp_path}:test")
    assert (source.class_names, source.labels.tolist()) == (("cat", "owl"), [1])
    write_tar(tmp_path / "test-0.tar", [("c.png", image), ("c.cls", b"oul")])
    with pytest.raises(DataError, match="test-0.tar/c.png is of class 'oul'.*Did you mean owl"):
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
    with pytest.raises(DataError, match=r"outer\.tar holds no images.*n01440764\.tar"):
        open_images(str(tmp_path / "outer.tar"))


def test_tar_shards_serve_as_a_reference(shards, piece):
    opened = open_evaluation_images(str(shards))
    assert (opened.count, opened.image_shape) == (7, (40, 56))
    assert opened.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    batch = next(iter(opened.batches(3, start=2)))
    assert np.array_equal(batch[1].permute(1, 2, 0).numpy(), piece(3))
    assert len(opened.fingerprint()) == 64


def labelled(source: object) -> list[tuple[str, str]]:
    """Member and class of each image."""
    return [
        (name.partition("/")[2], source.class_names[label])
        for name, label in zip(source.item_names, source.labels, strict=True)
    ]


def test_keys_end_at_the_first_dot_of_the_file_name(tmp_path, piece):
    members = [(f"train.v1/{number}.png", png(piece(number))) for number in range(2)]
    write_tar(tmp_path / "0.tar", [*members, ("train.v1/1.cls", b"5"), ("train.v1/0.cls", b"3")])
    source = open_images(str(tmp_path / "0.tar"))
    assert labelled(source) == [("train.v1/0.png", "3"), ("train.v1/1.png", "5")]
    write_tar(tmp_path / "1.tar", [("22.00.png", png(piece(0))), ("22.00.cls", b"0"), ("22.01.png", png(piece(1)))])
    with pytest.raises(DataError, match=r"1\.tar holds 22\.00\.png and 22\.01\.png, two images of one sample"):
        open_images(str(tmp_path / "1.tar"))


def test_members_of_a_sample_need_not_be_adjacent(tmp_path, piece):
    images = [(f"{number}.png", png(piece(number))) for number in range(3)]
    labels = [(f"{number}.cls", str(10 + number).encode()) for number in (2, 0, 1)]
    for name, members in (("apart", [*images, *labels]), ("before", [*labels, *images])):
        source = open_images(str(write_tar(tmp_path / f"{name}.tar", members)))
        assert {name: int(label) for name, label in labelled(source)} == {"0.png": 10, "1.png": 11, "2.png": 12}
        for index, name in enumerate(source.item_names):
            assert np.array_equal(source.read(index, (40, 56)), piece(int(name[-5])))
    write_tar(tmp_path / "twice.tar", [*images, images[1]])
    with pytest.raises(DataError, match=r"twice\.tar holds 1\.png and 1\.png"):
        open_images(str(tmp_path / "twice.tar"))


def test_suffixes_of_any_case(tmp_path, piece):
    members = [part for n in range(2) for part in ((f"A{n}.PNG", png(piece(n))), (f"A{n}.Cls", b"%d" % n))]
    assert labelled(open_images(str(write_tar(tmp_path / "0.tar", members)))) == [("A0.PNG", "0"), ("A1.PNG", "1")]


def test_one_of_several_images_of_a_sample_is_chosen(tmp_path, piece):
    members = []
    for number in range(3):
        members += [
            (f"{number}.seg.png", png(piece(9))),
            (f"{number}.png", png(piece(number))),
            (f"{number}.cls", b"1"),
        ]
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=r"0\.seg\.png and 0\.png.*0\.tar:image=png"):
        open_images(str(path))
    source = open_images(f"{path}:image=png")
    assert [name for name, _ in labelled(source)] == ["0.png", "1.png", "2.png"]
    assert np.array_equal(source.read(2, (40, 56)), piece(2))
    assert np.array_equal(open_images(f"{path}:image=SEG.PNG:train").read(2, (40, 56)), piece(9))
    with pytest.raises(DataError, match="holds no images called jpg"):
        open_images(f"{path}:image=jpg")


@pytest.mark.parametrize(
    ("cls", "values", "expected"),
    [
        ("2", {"label": 2, "class_name": "owl"}, "owl"),
        ("2", {"label": 2.0}, "2"),
        (None, {"label": 1, "class": "owl"}, "owl"),
        (None, {"class": "owl"}, "owl"),
        (None, {"class_name": "owl", "caption": "an owl"}, "owl"),
        (None, {"cls": "3"}, "3"),
        (None, {"class_id": "n01440764", "label": 1, "similarity": float("nan")}, "1"),
        (" owl\n", {"label": 5, "class_name": "cat"}, "owl"),
        ("7", {"class": "owl"}, "owl"),
        ("7", [1, 2], "7"),
    ],
)
def test_labels_of_cls_and_json(tmp_path, piece, cls, values, expected):
    members = [("a.json", json.dumps(values).encode()), ("a.png", png(piece()))]
    members += [("a.cls", cls.encode())] if cls else []
    for order in (members, members[::-1]):
        assert labelled(open_images(str(write_tar(tmp_path / "0.tar", order)))) == [("a.png", expected)]


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        ("2", {"label": 3}),
        ("cat", {"class": "dog"}),
        (None, {"label": 1, "cls": 2}),
        (None, {"label": [1, 2]}),
        ("1\n2", {}),
    ],
)
def test_labels_that_contradict_or_are_several_are_refused(tmp_path, piece, cls, values):
    members = [("a.json", json.dumps(values).encode()), ("a.png", png(piece()))]
    members += [("a.cls", cls.encode())] if cls else []
    for order in (members, members[::-1]):
        write_tar(tmp_path / "0.tar", order)
        with pytest.raises(DataError, match=r"0\.tar: a\.(cls|json)"):
            open_images(str(tmp_path / "0.tar"))


def test_a_class_has_one_name_and_files_may_number_classes_differently(tmp_path, piece):
    def member(key: str, label: int, name: str) -> list[Member]:
        return [
            (f"{key}.png", png(piece())),
            (f"{key}.json", json.dumps({"label": label, "class_name": name}).encode()),
        ]

    write_tar(tmp_path / "a/0.tar", [*member("a", 0, "owl"), *member("b", 0, "cat")])
    with pytest.raises(DataError, match="b.png: class 0 is called 'cat' here and 'owl' before"):
        open_images(str(tmp_path / "a"))
    write_tar(tmp_path / "b/0.tar", [*member("a", 0, "owl"), *member("b", 1, "cat")])
    write_tar(tmp_path / "b/1.tar", [*member("c", 0, "cat"), *member("d", 1, "owl")])
    source = open_images(str(tmp_path / "b"))
    assert [name for _, name in labelled(source)] == ["owl", "cat", "cat", "owl"]
    write_tar(tmp_path / "b/1.tar", member("c", 0, "dog"))
    with pytest.raises(DataError, match=r"1\.tar calls class 0 'dog', which is 'owl'"):
        open_images(str(tmp_path / "b"))
    write_tar(tmp_path / "c/train-0.tar", [*member("a", 0, "owl"), *member("b", 1, "cat")])
    write_tar(tmp_path / "c/val-0.tar", [*member("c", 0, "cat"), *member("d", 1, "owl")])
    source = open_images(f"{tmp_path / 'c'}:val")
    assert (source.class_names, source.labels.tolist()) == (("owl", "cat"), [1, 0])


def test_class_folders_tarred_as_they_are(tmp_path, piece):
    names = ["dog/0.png", "cat/a/1.png", "cat/2.png", "._cat", "cat/._2.png", "__MACOSX/cat/._2.png", "@eaDir/x/3.png"]
    names += ["PaxHeaders.7/cat/2.png", "cat/.ipynb_checkpoints/2.png"]
    expected = [("dog/0.png", "dog"), ("cat/a/1.png", "cat"), ("cat/2.png", "cat")]
    for number, root in enumerate(("", "./", "pets/", "./a/b/")):
        path = write_tar(
            tmp_path / f"{number}.tar", [(root + name, png(piece(index))) for index, name in enumerate(names)]
        )
        source = open_images(str(path))
        assert source.class_names == ("cat", "dog")
        assert labelled(source) == [(root.removeprefix("./") + name, label) for name, label in expected]
        assert np.array_equal(source.read(2, (40, 56)), piece(2))
    flat = write_tar(tmp_path / "flat.tar", [("pets/0.png", png(piece())), ("pets/1.png", png(piece()))])
    assert open_images(str(flat)).class_names == ("pets",)


def test_images_next_to_folders_are_left_out_and_told(tmp_path, piece, caplog):
    names = ["preview.png", "cat/0.png", "dog/1.png", "cat/2.heic", "notes.md"]
    path = write_tar(tmp_path / "0.tar", [(name, png(piece())) for name in names])
    assert labelled(open_images(str(path))) == [("cat/0.png", "cat"), ("dog/1.png", "dog")]
    assert "1 images next to folders (0.tar/preview.png" in caplog.text
    assert "1 .heic" in caplog.text
    assert "1 .md" in caplog.text


def test_splits_within_an_archive(tmp_path, piece):
    names = ["train/cat/0.png", "train/dog/1.png", "Val/dog/2.png", "testing/cat/3.png", "extra/cat/4.png"]
    path = write_tar(tmp_path / "pets.tar", [(f"pets/{name}", png(piece())) for name in names])
    assert labelled(open_images(str(path))) == [("pets/train/cat/0.png", "cat"), ("pets/train/dog/1.png", "dog")]
    for split, expected in (("val", ("pets/Val/dog/2.png", "dog")), ("test", ("pets/testing/cat/3.png", "cat"))):
        source = open_images(f"{path}:{split}")
        assert source.class_names == ("cat", "dog")
        assert labelled(source) == [expected]
    members = [("train/0.png", png(piece())), ("train/0.cls", b"4"), ("val/0.png", png(piece())), ("val/0.cls", b"2")]
    path = write_tar(tmp_path / "keys.tar", members)
    assert labelled(open_images(str(path))) == [("train/0.png", "4")]
    assert labelled(open_images(f"{path}:validation")) == [("val/0.png", "2")]
    with pytest.raises(DataError, match=r"keys\.tar has no split 'test'.* train, val"):
        open_images(f"{path}:test")
    path = write_tar(tmp_path / "classes.tar", [(f"{name}/0.png", png(piece())) for name in ("test", "train", "exam")])
    assert open_images(str(path)).class_names == ("exam", "test", "train")


def test_a_folder_around_the_splits_may_be_called_as_a_class(tmp_path, piece):
    names = ("train/cat/0", "train/dog/1", "train/loose", "val/cat/2")
    members = [(f"cat/v1/{name}.png", png(piece())) for name in names]
    path = str(write_tar(tmp_path / "pets.tar", members))
    assert [name for _, name in labelled(open_images(path))] == ["cat", "dog"]
    assert [name for _, name in labelled(open_images(f"{path}:val"))] == ["cat"]


def test_a_file_for_each_class(tmp_path, piece):
    for number, name in enumerate(("n01440764", "n01443537")):
        write_tar(tmp_path / f"imagenet/{name}.tar", [(f"{name}_{number}.JPEG", png(piece(number)))])
    assert [name for _, name in labelled(open_images(str(tmp_path / "imagenet")))] == ["n01440764", "n01443537"]
    for name in ("dog", "cat"):
        write_tar(tmp_path / f"pets/{name}.tar", [("1.png", png(piece()))])
    assert open_images(str(tmp_path / "pets")).class_names == ("cat", "dog")
    for name in ("a-0", "a-1"):
        write_tar(tmp_path / f"flat/{name}.tar", [("1.png", png(piece()))])
    assert open_images(str(tmp_path / "flat")).class_names == ("flat",)


def test_captions(tmp_path, piece):
    def members(number: int) -> list[Member]:
        return [(f"{number}.png", png(piece())), (f"{number}.txt", f" a bird, nº {number}\n".encode())]

    write_tar(
        tmp_path / "all/0.tar", [*members(0), *members(1), ("2.png", png(piece())), ("2.json", b'{"caption": "x"}')]
    )
    source = open_images(str(tmp_path / "all"))
    assert (source.class_names, source.captions()) == (("all",), ["a bird, nº 0", "a bird, nº 1", "x"])
    write_tar(tmp_path / "some/0.tar", [*members(0), ("1.png", png(piece()))])
    with pytest.raises(DataError, match=r"0\.tar/1\.png has no caption"):
        open_images(str(tmp_path / "some")).captions()
    write_tar(tmp_path / "none/0.tar", [("1.png", png(piece()))])
    assert open_images(str(tmp_path / "none")).captions() is None


def test_what_would_be_lost_is_refused_or_told(tmp_path, piece, caplog):
    path = write_tar(tmp_path / "0.tar", [(f"{number}.png", png(piece(number))) for number in range(2)])
    whole = path.read_bytes()
    header = next(at for at in range(512, len(whole), 512) if whole[at : at + 5] == b"1.png")
    damaged = bytearray(whole)
    damaged[header + 150] ^= 1  # in the checksum
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"0\.tar holds something else than a member"):
        open_images(str(path))
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"0\.tar holds something else than a member"):
        open_images(str(path))
    path.write_bytes(whole[: header + 600])
    with pytest.raises(DataError, match=r"0\.tar is not a whole tar file.*1\.png"):
        open_images(str(path))
    assert not caplog.records
    path.write_bytes(whole[:header])
    assert len(open_images(str(path))) == 1
    assert "0.tar has no mark at its end" in caplog.text
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("cut.cls")
        info.size = 4000
        archive.addfile(info, io.BytesIO(b"1" * 4000))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"0\.tar is not a whole tar file.*cut\.cls"):
        open_images(str(path))


def test_links_are_counted(tmp_path, piece, caplog):
    path = write_tar(tmp_path / "0.tar", [("a/0.png", png(piece())), ("b/1.png", png(piece()))])
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo("b/2.png")
            info.type, info.linkname = kind, "a/0.png"
            archive.addfile(info)
    assert len(open_images(str(path))) == 2
    assert "2 links" in caplog.text
