"""Images to token caches, from Python."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest

import mvar_core as mvar
from mvar_core.data.tokens import TokenCache
from mvar_core.data.vectors import embed_words


def test_a_tokenizer_and_images_are_enough(model, images, tmp_path):
    reports = []
    result = mvar.tokenize(
        tokenizer=str(model), data=str(images), out=tmp_path / "tokens",
        progress=lambda stage, done, total, **_: reports.append((stage, done, total)),
    )  # fmt: skip
    assert (result.images, result.views, result.encoded, result.path) == (12, 1, 12, tmp_path / "tokens")
    assert result.bytes == sum(path.stat().st_size for path in result.path.glob("*.npy"))
    assert result.seconds > 0
    assert {stage for stage, _, _ in reports} == {"checking images", "tokenizing"}
    assert reports[-1] == ("tokenizing", 12, 12)
    manifest = TokenCache.open(result.path, verify=True).manifest
    assert manifest.tokenizer == str(model)
    assert manifest.patch_sizes == (1, 2, 4)
    assert json.loads(json.dumps(result.to_dict()))["path"] == str(tmp_path / "tokens")


def test_where_the_tokenizer_is_makes_no_difference(model, images, tmp_path):
    """The cache is complete for a copy of the tokenizer, and for caches that do not record one."""
    settings = {"data": str(images), "out": tmp_path / "tokens"}
    assert mvar.tokenize(tokenizer=model, **settings).encoded == 12
    shutil.copytree(model, tmp_path / "copy")
    assert mvar.tokenize(tokenizer=tmp_path / "copy", **settings).encoded == 0
    path = tmp_path / "tokens/manifest.json"
    values = json.loads(path.read_text())
    del values["tokenizer"]
    path.write_text(json.dumps(values))
    assert mvar.tokenize(tokenizer=model, **settings).encoded == 0


def test_views_and_sizes_follow_arguments_over_the_preset(model, preset, images, tmp_path):
    result = mvar.tokenize(
        tokenizer=model, data=images, out=tmp_path / "a", preset=str(preset), settings=["data.augmented_views=1"],
        image_size=32, flip=True, crops=2, seed=7,
    )  # fmt: skip
    manifest = TokenCache.open(result.path).manifest
    assert result.views == manifest.views == 5
    assert (manifest.image_size, manifest.seed) == (32, 7)
    assert manifest.patch_sizes[-1] == 8


def test_a_tar_shard_gives_the_tokens_of_its_folder(model, images, tmp_path):
    members = []
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        members += [(f"{number:04d}.png", path.read_bytes()), (f"{number:04d}.cls", path.parent.name.encode())]
    write_tar(tmp_path / "shard-0.tar", members)
    caches = []
    for data, out in ((images, "folder"), (tmp_path / "shard-0.tar", "tar")):
        assert mvar.tokenize(tokenizer=model, data=data, out=tmp_path / out, crops=2).views == 2
        caches.append(TokenCache.open(tmp_path / out))
    rows = np.arange(len(caches[0]))
    assert len(rows) == 24
    assert caches[0].class_names == caches[1].class_names
    for first, second in zip(caches[0].batch(rows), caches[1].batch(rows), strict=True):
        assert first.equal(second)


def test_bad_images_stop_it_or_are_left_out(model, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/dog/1.png").write_bytes(b"damaged")
    settings = {"tokenizer": model, "data": tmp_path / "images", "out": tmp_path / "tokens"}
    with pytest.raises(mvar.DataError, match=r"dog/1\.png is not an image"):
        mvar.tokenize(**settings)
    result = mvar.tokenize(**settings, skip_bad=True)
    assert (result.images, result.skipped) == (11, ("dog/1.png",))
    cache = TokenCache.open(tmp_path / "tokens", verify=True)
    assert cache.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    names = (tmp_path / "tokens" / cache.manifest.shards[0].names.file).read_text().splitlines()
    assert names[5] == "dog/2.png"
    assert mvar.tokenize(**settings).encoded == 0  # complete, as it is


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"words": True}, "conditioning.dim"),
        ({"words": True, "vectors": "v.npy"}, "--vectors"),
        ({"encoder": "clip"}, "--vectors FILE"),
        ({"settings": ["data.flips=true"]}, "flip"),
        ({"image_size": "12xx3"}, "12xx3"),
    ],
)
def test_arguments_that_make_no_sense(model, images, tmp_path, arguments, named):
    with pytest.raises(mvar.ConfigError, match=named):
        mvar.tokenize(tokenizer=model, data=images, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_vectors_of_words_are_stored(model, images, tmp_path):
    settings = ["conditioning.kind=vector", "conditioning.dim=8"]
    mvar.tokenize(tokenizer=model, data=images, out=tmp_path / "out", settings=settings, words=True)
    vectors = TokenCache.open(tmp_path / "out").manifest.vectors
    assert vectors is not None
    assert (vectors.dim, vectors.encoder) == (8, "hashed-words")


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_vectors_of_captions_are_stored_where_there_are_no_classes(model, images, tmp_path):
    settings = {"tokenizer": model, "words": True, "settings": ["conditioning.kind=vector", "conditioning.dim=8"]}
    paths = sorted(images.rglob("*.png"))
    texts = [f"{path.parent.name} number {number}" for number, path in enumerate(paths)]
    members = [(f"{number}.txt", text.encode()) for number, text in enumerate(texts)]
    members += [(f"{number}.png", path.read_bytes()) for number, path in enumerate(paths)]
    mvar.tokenize(data=write_tar(tmp_path / "a.tar", members), out=tmp_path / "a", flip=True, **settings)
    cache = TokenCache.open(tmp_path / "a")
    entry = cache.manifest.vectors
    assert entry is not None
    assert (entry.of, entry.encoder, entry.source) == ("image", "hashed-words", "captions")
    assert np.array_equal(cache.vectors(np.arange(24)).numpy(), embed_words(texts, 8).repeat(2, axis=0))
    members[3] = ("3.txt", b"...")
    with pytest.raises(mvar.DataError, match=r"'\.\.\.' holds no word"):
        mvar.tokenize(data=write_tar(tmp_path / "b.tar", members), out=tmp_path / "b", **settings)
    del members[3]
    with pytest.raises(mvar.DataError, match=r"b\.tar/3\.png has no caption"):
        mvar.tokenize(data=write_tar(tmp_path / "b.tar", members), out=tmp_path / "b", **settings)


def test_the_image_of_samples_that_have_several(model, images, tmp_path):
    paths = sorted(images.rglob("*.png"))
    members = [(f"{number}.{key}.png", path.read_bytes()) for number, path in enumerate(paths) for key in ("a", "b")]
    path = write_tar(tmp_path / "0.tar", members)
    with pytest.raises(mvar.DataError, match=r"0\.a\.png and 0\.b\.png"):
        mvar.tokenize(tokenizer=model, data=path, out=tmp_path / "out")
    result = mvar.tokenize(tokenizer=model, data=path, out=tmp_path / "out", image_key="b.png")
    manifest = TokenCache.open(tmp_path / "out").manifest
    assert (result.images, manifest.source) == (12, f"{path}:image=b.png:train")
    assert mvar.tokenize(tokenizer=model, data=manifest.source, out=tmp_path / "out").encoded == 0
    with pytest.raises(mvar.DataError, match="fingerprint"):
        mvar.tokenize(tokenizer=model, data=path, out=tmp_path / "out", image_key="a.png")


def test_a_dry_run_does_nothing(model, images, tmp_path):
    result = mvar.tokenize(tokenizer=model, data=images, out=tmp_path / "out", flip=True, dry_run=True)
    assert result.dry_run is not None
    assert result.to_dict().items() >= {"dry_run": True, "images": 12, "views": 2, "bytes": 12 * 2 * 21}.items()
    assert not (tmp_path / "out").exists()
