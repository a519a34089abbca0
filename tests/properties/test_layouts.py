"""Random layouts of images with a known truth: a source and its cache have these images, labels and names alone.

`make test` tries 50 of each, `make properties` as many as MVAR_EXAMPLES says.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mvar_core.config import ModelConfig, TokenizerConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import open_images
from mvar_core.data.token_writer import write_token_cache
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import DataError

EXAMPLES = settings(max_examples=int(os.environ.get("MVAR_EXAMPLES", "50")))

CLASSES = (
    "cat", "Größe", "Gro\u0308ße", "日本語", "собака", "حصان", "ครอบครัว", "🦊", "with space & 'quote'", "10", "9",
    "001", "#1", "a,b", "n01440764", "test tube", "trains", "x.png", "-dash", "A", "a b", "a",
)  # fmt: skip
"""Names in several scripts, composed and decomposed, and such as look like numbers, splits, files or options."""
STEMS = ("0", "photo", "Größe", "日本", "a b", "x.y", "🦊", "-1", "IMG_0001")
TRAIN = ("train", "Train", "TRAINING", "training")
OTHERS = {"val": ("val", "Valid", "validation", "validate", "DEV", "eval"), "test": ("test", "Testing", "TEST")}
FORMATS = {
    ".png": {}, ".PNG": {}, ".apng": {"format": "PNG"}, ".jpg": {"quality": 95}, ".JPEG": {"quality": 95},
    ".jfif": {"format": "JPEG"}, ".bmp": {}, ".tif": {}, ".TIFF": {}, ".gif": {}, ".webp": {"lossless": True},
    ".ppm": {}, ".pgm": {}, ".tga": {}, ".pcx": {}, ".jp2": {}, ".qoi": {}, ".dds": {}, ".sgi": {},
}  # fmt: skip
TURNED = (".png", ".jpg", ".JPEG", ".tif", ".TIFF", ".webp", ".apng", ".jfif")
JUNK = ("@eaDir", "__MACOSX", ".ipynb_checkpoints", ".git", "#recycle")
OTHER_FILES = (
    "notes.txt",
    "page.eps",
    "paper.PDF",
    "LICENSE",
    "Thumbs.db",
    ".DS_Store",
    "._0.png",
    ".hidden.png",
    "a.svg",
)
STEP = 4
"""Image N is of the gray level 4·N + 2 all over, which even a JPEG keeps to the next level."""

CONFIG = ModelConfig(
    image_size=8,
    patch_sizes=(1, 2),
    tokenizer=TokenizerConfig(
        codebook_size=256, latent_channels=8, base_channels=8, channel_multipliers=(1, 1, 1), norm_groups=4
    ),
    transformer=None,
)


def encode(images: Tensor) -> Tensor:
    """Five tokens: the gray level."""
    levels = ((images.mean(dim=(1, 2, 3)) + 1) * 127.5).round().long()
    return levels[:, None].expand(-1, 5)


@dataclass
class Truth:
    """What a source, or a folder of it, holds: classes in order; class, number and shape of each image by its name."""

    classes: list[str] = field(default_factory=list)
    images: dict[str, tuple[str, int, tuple[int, int]]] = field(default_factory=dict)
    folder: str = ""


class Writer:
    """Writes images, each of another gray level."""

    def __init__(self, draw: st.DrawFn, stems: Sequence[str] = STEMS):
        self.draw, self.stems, self.formats, self.count = draw, stems, sorted(FORMATS), 0

    def image(self, path: Path, suffix: str | None = None) -> tuple[int, tuple[int, int]]:
        """Write an image of some size, perhaps turned; its number, and its shape as it is shown."""
        suffix = suffix or path.suffix
        height, width = self.draw(st.tuples(st.integers(3, 24), st.integers(3, 24)), label="size")
        options = dict(FORMATS[suffix])
        shape = (height, width)
        if suffix in TURNED and (turn := self.draw(st.integers(1, 8))) > 1:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = turn
            shape = (width, height) if turn > 4 else shape
        mode = "L" if suffix == ".pgm" else "RGB"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = STEP * self.count + 2
        Image.new(mode, (width, height), level if mode == "L" else (level,) * 3).save(path, **options)
        self.count += 1
        return self.count - 1, shape

    def files(self, folder: Path, most: int = 3) -> Iterator[tuple[str, tuple[int, tuple[int, int]]]]:
        """Write some images into a folder; their names and what they are."""
        for number in range(self.draw(st.integers(1, most))):
            name = f"{self.draw(st.sampled_from(self.stems))}-{number}{self.draw(st.sampled_from(self.formats))}"
            yield name, self.image(folder / name)

    def junk(self, folder: Path) -> None:
        """What is left out, whatever it is next to."""
        for name in self.draw(st.sets(st.sampled_from(JUNK), max_size=2)):
            self.image(folder / name / "cat" / "junk.png")
        for name in self.draw(st.sets(st.sampled_from(OTHER_FILES), max_size=3)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"%!PS")

    def classes(self, folder: Path, names: Sequence[str], known: Sequence[str]) -> Truth:
        """Class folders, some images of which are in folders of their own."""
        truth = Truth(sorted(known))
        for name in names:
            below = self.draw(st.sampled_from(["", "", "images", "deep/deeper"]))
            for file, found in self.files(folder / name / below):
                truth.images["/".join(filter(None, (name, below, file)))] = (name, *found)
            self.junk(folder / name)
        self.junk(folder)
        if self.draw(st.booleans()):
            (folder / "nothing in it" / "nor here").mkdir(parents=True)
        if self.draw(st.booleans()):
            self.image(folder / "next to them.png")
        return truth

    def flat(self, folder: Path, class_name: str) -> Truth:
        """A folder with images and no class folders."""
        self.junk(folder)
        return Truth([class_name], {name: (class_name, *found) for name, found in self.files(folder)})


KINDS = ("classes", "flat", "splits", "splits", "flat splits", "tiny")


@st.composite
def folders(
    draw: st.DrawFn, root: Path, kinds: Sequence[str] = KINDS, stems: Sequence[str] = STEMS, least: int = 1
) -> dict[str, Truth]:
    """A folder of images; what it holds by the split that one asks for, "" for none."""
    writer = Writer(draw, stems)
    names = draw(st.lists(st.sampled_from(CLASSES), min_size=least, max_size=4, unique=True))
    kind = draw(st.sampled_from(kinds))
    if kind == "classes":
        return {"": writer.classes(root, names, names)}
    if kind == "flat":
        return {"": writer.flat(root, root.name)}
    train = draw(st.sampled_from(TRAIN))
    others = {draw(st.sampled_from(OTHERS[split])): split
              for split in draw(st.sets(st.sampled_from(sorted(OTHERS)), min_size=1))}  # fmt: skip
    writer.junk(root)
    if kind == "flat splits":
        found = {folder: writer.flat(root / folder, train) for folder in (train, *others)}
    elif kind == "splits":
        found = {train: writer.classes(root / train, names, names)}
        for folder in others:
            some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            found[folder] = writer.classes(root / folder, some, names)
        if draw(st.booleans()):
            (root / "devkit" / "data").mkdir(parents=True)
            (root / "devkit" / "data" / "meta.mat").write_bytes(b"x")
    else:
        found, others = {train: Truth(sorted(names))}, {"val": "val"}
        for name in names:
            for file, image in writer.files(root / train / name / "images"):
                found[train].images[f"{name}/images/{file}"] = (name, *image)
        found["val"], lines = Truth(sorted(names)), []
        for file, image in writer.files(root / "val" / "images"):
            name = draw(st.sampled_from(names))
            found["val"].images[f"images/{file}"] = (name, *image)
            lines.append(f"{file}\t{name}\t0\t0\t62\t62\n")
        (root / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    for folder, truth in found.items():
        truth.folder = f"{folder}/"
    asked = {"": found[train], train: found[train]}
    for folder, split in others.items():
        asked |= {folder: found[folder], split: found[folder]}
    return asked


def check(data: str, truth: Truth, out: Path, names: Sequence[str] | None = None) -> None:
    """Compare a source, and the cache that is made of it unless it is there, with the truth; `names` in order."""
    source = open_images(data)
    assert list(source.class_names) == truth.classes
    assert source.item_names == (names or sorted(truth.images, key=lambda name: (truth.images[name][0], name)))
    classes, numbers, shapes = zip(*(truth.images[name] for name in source.item_names), strict=True)
    assert [source.class_names[label] for label in source.labels] == list(classes)
    assert source.stored_shapes() == list(shapes)
    write_token_cache(
        out, source, encode, config=CONFIG, tokenizer_hash="a" * 64, data=DataConfig(), batch_size=4, images_per_shard=5
    )
    cache = TokenCache.open(out)
    assert list(cache.class_names) == truth.classes
    assert [cache.class_names[label] for label in cache.labels] == list(classes)
    tokens, _ = cache.batch(np.arange(len(cache)))
    assert (torch.div(tokens, STEP, rounding_mode="floor") == torch.tensor(numbers)[:, None]).all()
    lines = [
        line
        for shard in cache.manifest.shards
        for line in (out / shard.names.file).read_text(encoding="utf-8").splitlines()
    ]
    assert lines == list(source.item_names)


@EXAMPLES
@given(st.data())
def test_folders(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / data.draw(st.sampled_from(("images", "mit Umlaut ä", "写真")))
        root.mkdir()
        layout = data.draw(folders(root))
        for split, truth in layout.items():
            check(f"{root}:{split}" if split else str(root), truth, Path(temporary) / f"cache-{id(truth)}")
        if "test" not in layout:
            with pytest.raises(DataError):
                open_images(f"{root}:test")
