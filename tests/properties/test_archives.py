"""Random archives and tables of images with a known truth, as `test_layouts` of folders: 20 of each in `make test`."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import CLASSES, FORMATS, OTHERS, STEMS, TRAIN, Truth, Writer, check, folders

from mvar_core.data.images import open_images
from mvar_core.errors import DataError

EXAMPLES = settings(max_examples=int(os.environ.get("MVAR_EXAMPLES", "20")))
TAR_FORMATS = st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
KEYS = tuple(stem for stem in STEMS if "." not in stem)
"""A key ends at the first dot."""
LABELS = ("number", "name", "json number", "json name", "number and json", "name and json")


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], kind: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def check_splits(root: Path, truths: dict[str, Truth], words: dict[str, str], temporary: str) -> None:
    """Compare the data, and its splits by their own and by our names, with the truth; other splits are refused."""
    for split, truth in truths.items():
        for asked in {words[split], split, *(("",) if split == "train" else ())}:
            name = f"{root}:{asked}" if asked else str(root)
            check(name, truth, Path(temporary) / f"cache-{split}", list(truth.images))
    with pytest.raises(DataError):
        open_images(f"{root}:test")


@EXAMPLES
@given(st.data())
def test_tarred_folders(data: st.DataObject) -> None:
    """Class folders and splits, tarred as they are, in any order, below other folders."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "images"
        root.mkdir()
        layout = data.draw(folders(root, ("classes", "splits", "splits", "flat splits"), KEYS, least=2))
        files = data.draw(st.permutations(sorted(path for path in root.rglob("*") if path.is_file())))
        prefix = data.draw(st.sampled_from(("", "./", "images/", "./a b/v1.0/")))
        members = [(prefix + path.relative_to(root).as_posix(), path.read_bytes()) for path in files]
        tar = Path(temporary) / "made" / "写真.tar"
        write_tar(tar, members, data.draw(TAR_FORMATS))
        for split, truth in layout.items():
            below = prefix + truth.folder
            inside = [name.removeprefix(below) for name, _ in members if name.startswith(below)]
            images = {f"{tar.name}/{below.removeprefix('./')}{name}": truth.images[name]
                      for name in inside if name in truth.images}  # fmt: skip
            named = Truth(truth.classes, images=images)
            check(f"{tar}:{split}" if split else str(tar), named, Path(temporary) / f"cache-{id(truth)}", list(images))


def label_members(key: str, kind: str, number: int, name: str) -> Iterator[tuple[str, bytes]]:
    """What tells the class of a sample."""
    if not kind.startswith("json"):
        yield f"{key}.Cls", f" {number if 'number' in kind else name}\n".encode()
    if "json" in kind:
        values = {"label": number, "class_name": name} if "number" in kind else {"class": name}
        yield f"{key}.json", json.dumps({**values, "width": 8, "score": float("nan")}).encode()


@EXAMPLES
@given(st.data())
def test_tar_shards(data: st.DataObject) -> None:
    """Samples whose members stand anywhere in their shard, with labels of every kind, in splits of every spelling."""
    draw = data.draw
    with tempfile.TemporaryDirectory() as temporary:
        root, writer = Path(temporary) / "shards", Writer(draw, KEYS)
        texts = [name for name in CLASSES if not name.isdecimal()]  # in a .cls those are numbers
        names = draw(st.lists(st.sampled_from(texts), min_size=2, max_size=5, unique=True))
        kind, folder = draw(st.sampled_from(LABELS)), draw(st.sampled_from(("", "a/", "v1.0/x.y/")))
        words = {"train": draw(st.sampled_from(TRAIN)), "val": draw(st.sampled_from(OTHERS["val"]))}
        images: dict[str, dict[str, Any]] = {split: {} for split in words}
        used: set[int] = set()
        for split, word in words.items():
            for shard in range(draw(st.integers(1, 2))):
                path, made = root / f"{word}-{shard}.tar", Path(temporary) / f"{split}-{shard}"
                members, found = [("__MACOSX/._x.png", b"x"), ("notes.md", b"x")], {}
                for name, image in writer.files(made):
                    label = draw(st.sampled_from(sorted(used) if split == "val" else range(len(names))))
                    used.add(label)
                    key = folder + name.partition(".")[0]
                    found[key] = (f"{path.name}/{folder}{name}", (label, *image))
                    members += [(folder + name, (made / name).read_bytes())]
                    members += label_members(key, kind, label, names[label])
                    members += [(f"{key}.txt", b"a caption")] * draw(st.integers(0, 1))
                members = draw(st.permutations(members))
                write_tar(path, members, draw(TAR_FORMATS))
                keys = (folder + name.removeprefix(folder).partition(".")[0] for name, _ in members)
                images[split] |= dict(found[key] for key in dict.fromkeys(keys) if key in found)
        called = names if "name" in kind or "json" in kind else [str(number) for number in range(len(names))]
        numbered = [called[label] if label in used else str(label) for label in range(max(used) + 1)]
        classes = sorted(called[label] for label in used) if "name" in kind else numbered
        truths = {
            split: Truth(classes, images={item: (called[label], *image) for item, (label, *image) in found.items()})
            for split, found in images.items()
        }
        check_splits(root, truths, words, temporary)


@EXAMPLES
@given(st.data())
def test_tables(data: st.DataObject) -> None:
    """Parquet and arrow files in every layout of splits, each file with an order of classes of its own."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    draw = data.draw
    with tempfile.TemporaryDirectory() as temporary:
        root, writer = Path(temporary) / "tables", Writer(draw, KEYS)
        writer.formats = sorted(set(FORMATS) - {".tga", ".pcx", ".sgi"})  # whose content alone does not tell what it is
        names = draw(st.lists(st.sampled_from(CLASSES), min_size=2, max_size=5, unique=True))
        layout, coded = draw(st.sampled_from(("parquet", "data", "folders", "saved"))), draw(st.booleans())
        words = {"train": draw(st.sampled_from(TRAIN)), "val": draw(st.sampled_from(OTHERS["val"]))}
        truths, first = {split: Truth() for split in words}, list(draw(st.permutations(names)))
        for split, word in words.items():
            listed = []
            for number in range(draw(st.integers(1, 2))):
                order = first if split == "train" and number == 0 else list(draw(st.permutations(names)))
                made = Path(temporary) / f"{split}-{number}"
                rows = [(made / name, *image) for name, image in writer.files(made)]
                known = truths["train"].classes if split == "val" and not coded else names
                classes = [draw(st.sampled_from(known)) for _ in rows]
                table = pyarrow.table({
                    "label": [order.index(name) for name in classes] if coded else classes,
                    "image": [{"bytes": path.read_bytes(), "path": None} for path, *_ in rows],
                })  # fmt: skip
                features = {"label": {"names": order, "_type": "ClassLabel"}} if coded else {}
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
                stem = f"{word}-0000{number}-of-00002"
                path = {
                    "parquet": root / f"{stem}.parquet",
                    "data": root / "data" / f"{stem}.parquet",
                    "folders": root / word / f"{number}.parquet",
                    "saved": root / word / f"data-{number}.arrow",
                }[layout]
                path.parent.mkdir(parents=True, exist_ok=True)
                if layout == "saved":
                    for name in (path.name, "cache-0123456789abcdef.arrow"):
                        with pyarrow.ipc.new_stream(path.with_name(name), table.schema) as stream:
                            stream.write_table(table, max_chunksize=2)
                    listed.append({"filename": path.name})
                    (path.parent / "state.json").write_text(json.dumps({"_data_files": listed, "_split": word}))
                else:
                    parquet.write_table(table, path, row_group_size=2)
                for row, ((_, *image), name) in enumerate(zip(rows, classes, strict=True)):
                    truths[split].images[f"{path.name}#{row}"] = (name, *image)
                if split == "train":
                    truths[split].classes = first if coded else sorted({*truths[split].classes, *classes})
            truths[split].classes = truths["train"].classes
        if layout == "saved":
            (root / "dataset_dict.json").write_text(json.dumps({"splits": list(words.values())}))
        check_splits(root, truths, words, temporary)
