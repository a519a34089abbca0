from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mvar_core.config import ModelConfig, TokenizerConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import ImageSource, Views, open_images
from mvar_core.data.token_writer import CacheWriter, default_shard, write_token_cache
from mvar_core.data.tokens import TokenCache, map_array, split_off
from mvar_core.errors import DataError, WriteError
from mvar_core.io.pixels import from_uint8
from mvar_core.pyramid import ScalePyramid

HASH = "a" * 64
OTHER_HASH = "b" * 64


def small_config(codebook_size: int = 64, patch_sizes: tuple[int, ...] = (1, 2, 4)) -> ModelConfig:
    tokenizer = TokenizerConfig(
        codebook_size=codebook_size, latent_channels=8, base_channels=8, channel_multipliers=(1, 1, 1), norm_groups=4
    )
    return ModelConfig(image_size=4 * patch_sizes[-1], patch_sizes=patch_sizes, tokenizer=tokenizer, transformer=None)


class MeanTokenizer:
    """Every token is the mean brightness of its patch, in V levels; counts its images and can fail after some."""

    def __init__(self, config: ModelConfig, fail_after: int | None = None):
        self.config = config
        self.fail_after = fail_after
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        if self.fail_after is not None and self.seen > self.fail_after:
            raise KeyboardInterrupt
        gray = (images.mean(dim=1, keepdim=True).double() + 1) / 2
        scales = [adaptive_avg_pool2d(gray, side).flatten(1) for side in self.config.patch_sizes]
        levels = self.config.tokenizer.codebook_size
        return (torch.cat(scales, dim=1) * levels).long().clamp(max=levels - 1)


def write_cache(
    out: Path,
    source: ImageSource,
    config: ModelConfig | None = None,
    encode: MeanTokenizer | None = None,
    data: DataConfig | None = None,
    **options: object,
) -> SimpleNamespace:
    config = config or small_config()
    settings = {"tokenizer_hash": HASH, "batch_size": 4, "images_per_shard": 3, **options}
    data = data or DataConfig(flip=True, augmented_views=1)
    made, encoded = write_token_cache(
        out, source, encode or MeanTokenizer(config), config=config, data=data, **settings
    )
    size = sum(shard.tokens.bytes + shard.labels.bytes for shard in made.shards)
    skipped = tuple(name for shard in made.shards for name in shard.skipped)
    return SimpleNamespace(images=made.images, views=made.views, bytes=size, encoded=encoded, skipped=skipped)


def names_of(cache: TokenCache) -> list[str]:
    return [
        name for shard in cache.manifest.shards for name in (cache.path / shard.names.file).read_text().splitlines()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(class_folders) -> ImageSource:
    return open_images(str(class_folders))


def test_every_row_is_the_tokens_of_its_image_and_view(tmp_path, source):
    summary = write_cache(tmp_path / "cache", source, seed=5)
    cache = TokenCache.open(tmp_path / "cache", verify=True)
    assert (len(cache), cache.num_images, cache.num_views) == (21, 7, 3)
    assert cache.class_names == ("ant", "bee", "cat")
    assert cache.labels.tolist() == source.labels.tolist()
    assert names_of(cache) == source.item_names
    assert [shard.images for shard in cache.manifest.shards] == [3, 3, 1]
    views = Views(DataConfig(flip=True, augmented_views=1), seed=5)
    encode = MeanTokenizer(small_config())
    rows = np.array([20, 0, 1, 7, 11, 1])
    tokens, labels = cache.batch(rows)
    assert tokens.dtype == labels.dtype == torch.int64
    for row, found, label in zip(rows, tokens, labels, strict=True):
        image, view = divmod(int(row), 3)
        pixels = views.apply(source.read(image, (16, 16)), image, view)
        assert torch.equal(found, encode(from_uint8(pixels[None]))[0])
        assert label == source.labels[image]
    assert len(np.unique(tokens[:, 5:])) > 10  # the fake tokenizer does tell images apart
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.npy"))
    assert (summary.images, summary.views, summary.bytes, summary.encoded) == (7, 3, sizes, 7)


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_take_the_smallest_unsigned_type(tmp_path, source, codebook_size, dtype):
    config = small_config(codebook_size)
    write_cache(tmp_path / "cache", source, config)
    assert np.load(tmp_path / "cache/tokens-00000.npy").dtype == dtype
    tokens, _ = TokenCache.open(tmp_path / "cache").batch(np.arange(0, 21, 3))
    pixels = np.stack([source.read(index, (16, 16)) for index in range(7)])
    assert torch.equal(tokens, MeanTokenizer(config)(from_uint8(pixels)))


def test_a_view_of_680_tokens_takes_at_most_1400_bytes(tmp_path, write):
    for number in range(20):
        path = write(f"flat/{number}.png", number)
    config = ModelConfig(transformer=None)
    assert (config.pyramid.num_tokens, config.tokenizer.codebook_size) == (680, 4096)
    data = DataConfig(flip=True)
    summary = write_cache(tmp_path / "cache", open_images(str(path.parent)), config, data=data, images_per_shard=None)
    assert summary.bytes / (summary.images * summary.views) <= 1400
    assert [path.name for path in sorted((tmp_path / "cache").glob("*.npy"))] == [
        "labels-00000.npy",
        "tokens-00000.npy",
    ]


def test_default_shards_hold_tens_of_megabytes_and_small_sets_are_cut_into_many(tmp_path, source):
    write_cache(tmp_path / "large", source, ModelConfig(transformer=None), data=DataConfig(), images_per_shard=None)
    assert TokenCache.open(tmp_path / "large").manifest.images_per_shard == 256
    assert default_shard(2 * 1360, 1_281_167) == 8192  # 22 MB, and 157 shards
    assert default_shard(1360, 10**8) == 16_384
    assert default_shard(85, 10**8) == 65_536
    assert default_shard(2 * 1360, 50_000) == 512


@pytest.mark.parametrize("fail_after", [0, 9, 12, 20])
def test_an_interrupted_cache_is_finished_by_the_same_call(tmp_path, source, fail_after):
    write_cache(tmp_path / "whole", source)
    config = small_config()
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cut", source, encode=MeanTokenizer(config, fail_after))
    done = fail_after // 9 * 3  # nine views make a shard
    with pytest.raises(DataError, match=rf"is not finished: {done} of 7 images.*mvar tokenize"):
        TokenCache.open(tmp_path / "cut")
    encode = MeanTokenizer(config)
    calls = []

    def progress(stage: str, done: int, total: int, **_: object) -> None:
        calls.append((stage, done, total))

    summary = write_cache(
        tmp_path / "cut",
        source,
        encode=encode,
        progress=progress,
    )
    assert encode.seen == (7 - done) * 3
    assert summary.encoded == 7 - done
    assert next(call for call in calls if call[0] == "tokenizing")[1] >= done
    assert calls[-1] == ("tokenizing", 7, 7)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_unfinished_cache_is_continued_even_with_overwrite(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cut", source, encode=MeanTokenizer(small_config(), 9), overwrite=True)
    assert write_cache(tmp_path / "cut", source, overwrite=True).encoded == 4


def test_a_damaged_shard_of_an_unfinished_cache_is_made_again(tmp_path, source, caplog):
    write_cache(tmp_path / "whole", source)
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cut", source, encode=MeanTokenizer(small_config(), 18))
    path = tmp_path / "cut/tokens-00001.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (tmp_path / "cut/.tokens-00002.npy.x1y2z3.tmp").write_bytes(b"left by a killed process")
    with caplog.at_level(logging.INFO, logger="mvar"):
        assert write_cache(tmp_path / "cut", source).encoded == 4
    assert "3 of 7 images" in caplog.text
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_complete_cache_is_left_alone_or_made_again_when_asked(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    before = contents(tmp_path / "cache")
    encode = MeanTokenizer(small_config(), fail_after=0)
    assert write_cache(tmp_path / "cache", source, encode=encode).encoded == 0
    assert write_cache(tmp_path / "cache", source, overwrite=True).encoded == 7
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("fail_after", [None, 9])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer_hash": OTHER_HASH}, "tokenizer_hash is a+… there, b+… asked"),
        ({"seed": 1}, "seed is 0 there, 1 asked"),
        ({"data": DataConfig()}, "views is 3 there, 1 asked"),
        ({"config": small_config(32)}, "codebook_size is 64 there, 32 asked"),
        ({"config": small_config(64, (1, 3, 4))}, r"patch_sizes is \[1, 2, 4\] there, \[1, 3, 4\] asked"),
        ({"images_per_shard": 2}, "images_per_shard is 3 there, 2 asked"),
    ],
)
def test_a_cache_of_other_settings_is_kept_unless_overwritten(tmp_path, source, change, named, fail_after):
    out = tmp_path / "cache"
    try:
        write_cache(out, source, encode=MeanTokenizer(small_config(), fail_after))
    except KeyboardInterrupt:
        assert fail_after
    with pytest.raises(DataError, match=rf"made with other settings: .*{named}.*--overwrite"):
        write_cache(out, source, **change)
    write_cache(out, source, **change, overwrite=True)
    write_cache(tmp_path / "fresh", source, **change)
    assert contents(out) == contents(tmp_path / "fresh")


def test_changed_images_are_other_settings(tmp_path, source, write):
    write_cache(tmp_path / "cache", source)
    write("pictures/ant/a.png", 30, shape=(41, 57))
    with pytest.raises(DataError, match="other settings: fingerprint is"):
        write_cache(tmp_path / "cache", source)


def test_files_that_are_no_cache_are_never_lost(tmp_path, source):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"is not empty.*--overwrite"):
        write_cache(out, source)
    write_cache(out, source, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert len(TokenCache.open(out)) == 21
    with pytest.raises(DataError, match="is a file"):
        write_cache(out / "thesis.tex", source)


def test_damaged_images_are_found_before_anything_is_encoded(tmp_path, class_folders):
    (class_folders / "cat/b.jpg").write_bytes(b"damaged")
    encode = MeanTokenizer(small_config())
    with pytest.raises(DataError, match=r"cat/b\.jpg is not an image"):
        write_cache(tmp_path / "cache", open_images(str(class_folders)), encode=encode)
    assert encode.seen == 0


def test_a_tokenizer_that_does_not_fit_its_config_is_refused(tmp_path, source):
    with pytest.raises(DataError, match=r"gave \(4, 21\) tokens .*expected \(4, 30\) below 64"):
        write_cache(tmp_path / "a", source, small_config(64, (1, 2, 5)), encode=MeanTokenizer(small_config()))
    with pytest.raises(DataError, match=r"expected \(4, 21\) below 8"):
        write_cache(tmp_path / "b", source, small_config(8), encode=MeanTokenizer(small_config()))


def test_what_is_no_cache_is_not_opened(tmp_path):
    with pytest.raises(DataError, match=r"nowhere .*does not exist.*mvar tokenize"):
        TokenCache.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is not a token cache: it has no manifest\.json.*mvar tokenize"):
        TokenCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(DataError, match=r"manifest\.json is not the manifest of a token cache"):
        TokenCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not a JSON file"):
        TokenCache.open(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        TokenCache.open(tmp_path / "manifest.json")


def test_a_manifest_of_another_version_or_with_wrong_values_is_refused(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    path = tmp_path / "cache/manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 4}))
    with pytest.raises(DataError, match="has format version 4; this mvar reads versions 1, 2, 3"):
        TokenCache.open(tmp_path / "cache")
    path.write_text(json.dumps({**values, "images": "many"}))
    with pytest.raises(DataError, match=r"manifest\.json: images: .*integer"):
        TokenCache.open(tmp_path / "cache")


def test_missing_shortened_and_changed_files_are_named(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    path = tmp_path / "cache/tokens-00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(DataError, match=r"tokens-00001\.npy has changed since it was written"):
        TokenCache.open(tmp_path / "cache", verify=True)
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match=rf"tokens-00001\.npy has {len(content) - 5} bytes instead of {len(content)}"):
        TokenCache.open(tmp_path / "cache")
    path.unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.npy is missing.*mvar tokenize .* --overwrite"):
        TokenCache.open(tmp_path / "cache")
    with pytest.raises(DataError, match=r"tokens-00001\.npy is missing.*--overwrite"):
        write_cache(tmp_path / "cache", source)
    write_cache(tmp_path / "cache", source, overwrite=True)
    assert path.read_bytes() == content


def test_a_file_that_is_not_the_array_it_should_be_is_refused(tmp_path, source):
    write_cache(tmp_path / "cache", source, images_per_shard=7)
    path = tmp_path / "cache/tokens-00000.npy"
    tokens = np.load(path)
    np.save(path, tokens.transpose(1, 0, 2).copy())
    with pytest.raises(DataError, match=r"holds uint8 \(3, 7, 21\); its manifest says uint8 \(7, 3, 21\)"):
        TokenCache.open(tmp_path / "cache").batch(np.arange(2))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"tokens-00000\.npy is not a whole \.npy file"):
        TokenCache.open(tmp_path / "cache").batch(np.arange(2))


def test_a_cache_of_another_tokenizer_or_pyramid_is_refused(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    cache = TokenCache.open(tmp_path / "cache")
    pyramid = small_config().pyramid
    cache.check(HASH, pyramid)
    with pytest.raises(DataError, match=f"another tokenizer: {HASH} there, {OTHER_HASH} in this model.*mvar tokenize "):
        cache.check(OTHER_HASH, pyramid)
    with pytest.raises(DataError, match="another pyramid: 1,2,4 there, 1,4 in this model"):
        cache.check(HASH, ScalePyramid.from_patch_sizes([1, 4]))


def test_rows_that_do_not_exist_are_refused(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    cache = TokenCache.open(tmp_path / "cache")
    for rows in ([21], [-1, 3]):
        with pytest.raises(IndexError, match="of 21"):
            cache.batch(np.array(rows))
    assert cache.batch(np.array([], np.int64))[0].shape == (0, 21)


def test_tokens_are_mapped_not_loaded(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    cache = TokenCache.open(tmp_path / "cache")
    assert not cache._maps
    cache.batch(np.array([10, 17]))  # both in the second shard
    assert [(file, type(array)) for file, array in cache._maps.items()] == [("tokens-00001.npy", np.memmap)]


def test_non_square_images_and_pyramids(tmp_path, source):
    tokenizer = TokenizerConfig(codebook_size=64, base_channels=8, channel_multipliers=(1, 1), norm_groups=4)
    config = ModelConfig(image_size=(8, 16), patch_sizes=(1, (2, 3), (4, 8)), tokenizer=tokenizer, transformer=None)
    write_cache(tmp_path / "cache", source, config)
    cache = TokenCache.open(tmp_path / "cache")
    assert cache.batch(np.arange(3))[0].shape == (3, 39)
    cache.check(HASH, config.pyramid)


def test_digits_make_a_cache_with_the_views_of_the_bundled_recipe(tmp_path):
    config = small_config(64, (1, 2, 4, 8))
    source = open_images("digits:test")
    data = DataConfig(augmented_views=4)
    summary = write_cache(tmp_path / "cache", source, config, data=data, images_per_shard=None, batch_size=128)
    cache = TokenCache.open(tmp_path / "cache")
    assert (summary.images, summary.views, len(cache)) == (360, 5, 1800)
    assert summary.bytes <= 1800 * 85 + 360 + 512  # a byte a token, a byte a label, headers of two shards' files
    assert names_of(cache)[-1] == source.item_names[359]
    assert cache.manifest.source == "digits:test"


def as_version_1(folder: Path) -> None:
    """Rewrite a cache as mvar 0.1 wrote it: one file of names, fewer keys in the manifest."""
    values = json.loads((folder / "manifest.json").read_text())
    lines = "".join((folder / shard["names"]["file"]).read_text() for shard in values["shards"])
    (folder / "items.txt").write_text(lines)
    for shard in values["shards"]:
        (folder / shard["names"]["file"]).unlink()
        del shard["names"], shard["skipped"]
    for key in ("crops", "crop", "crop_scale"):
        del values["data"][key]
    del values["skipped"]
    (folder / "manifest.json").write_text(json.dumps({**values, "version": 1}))


def test_a_cache_of_the_earlier_version_is_still_read(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    expected, rows = TokenCache.open(tmp_path / "cache", verify=False), np.arange(21)
    as_version_1(tmp_path / "cache")
    cache = TokenCache.open(tmp_path / "cache", verify=True)
    assert torch.equal(cache.batch(rows)[0], expected.batch(rows)[0])
    assert write_cache(tmp_path / "cache", source).encoded == 0  # complete: left as it is


def test_an_unfinished_cache_of_the_earlier_version_is_refused(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    as_version_1(tmp_path / "cache")
    (tmp_path / "cache/manifest.json").rename(tmp_path / "cache/manifest.partial.json")
    with pytest.raises(DataError, match="unfinished token cache of an earlier version of mvar.*--overwrite"):
        write_cache(tmp_path / "cache", source)
    assert write_cache(tmp_path / "cache", source, overwrite=True).encoded == 7


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path, source, count):
    write_cache(tmp_path / "alone", source)
    config = small_config()
    settings = {"config": config, "tokenizer_hash": HASH, "data": DataConfig(flip=True, augmented_views=1)}
    out = tmp_path / "shared"
    writers = [
        CacheWriter(
            out,
            source,
            MeanTokenizer(config),
            **settings,
            batch_size=4,
            images_per_shard=3,
            rank=rank,
            world_size=count,
        )
        for rank in range(count)
    ]
    work = writers[0].prepare()
    for writer in reversed(writers):
        writer.accept(*work)
        writer.check()
        writer.write()
    assert [writer.finish()[1] for writer in writers] == [7] * count
    assert contents(out) == contents(tmp_path / "alone")


def test_a_directory_that_another_process_does_not_see_is_refused(tmp_path, source):
    config = small_config()
    settings = {"config": config, "tokenizer_hash": HASH, "data": DataConfig()}
    work = CacheWriter(tmp_path / "here", source, MeanTokenizer(config), **settings).prepare()
    with pytest.raises(DataError, match=r"prepared by process 0, and process 1 does not see it.*storage that all"):
        other = CacheWriter(tmp_path / "there", source, MeanTokenizer(config), **settings, rank=1, world_size=2)
        other.accept(*work)
        other.check()


def test_images_found_damaged_while_encoding_are_left_out_if_wanted(tmp_path, class_folders, caplog):
    path = class_folders / "bee/a.webp"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (class_folders / "cat/a.png").write_bytes(b"damaged")
    source = open_images(str(class_folders))
    summary = write_cache(tmp_path / "cache", source, skip_bad=True)
    assert (summary.images, summary.skipped) == (5, ("bee/a.webp", "cat/a.png"))
    assert "Left out: " in caplog.text
    cache = TokenCache.open(tmp_path / "cache", verify=True)
    assert names_of(cache) == [name for name in source.item_names if name not in summary.skipped]
    assert cache.labels.tolist() == [0, 0, 1, 2, 2]
    kept = [index for index, name in enumerate(source.item_names) if name not in summary.skipped]
    pixels = np.stack([source.read(index, (16, 16)) for index in kept])
    assert torch.equal(cache.batch(np.arange(0, 15, 3))[0], MeanTokenizer(small_config())(from_uint8(pixels)))
    with pytest.raises(DataError, match="None of the 1 images"):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/a.png").write_bytes(b"damaged")
        write_cache(tmp_path / "none", open_images(str(tmp_path / "bad")), skip_bad=True)


def test_crops_are_views_that_follow_from_the_seed(tmp_path, source):
    data = DataConfig(flip=True, crops=3)
    write_cache(tmp_path / "cache", source, data=data, seed=5)
    cache = TokenCache.open(tmp_path / "cache")
    assert cache.manifest.view_names == ("image", "flip", "crop-1", "crop-1-flip", "crop-2", "crop-2-flip")
    views = Views(data, seed=5)
    encode = MeanTokenizer(small_config())
    for image in (0, 4):
        pixels = np.stack(views.render(source, image, (16, 16), range(6)))
        assert torch.equal(cache.batch(np.arange(6 * image, 6 * image + 6))[0], encode(from_uint8(pixels)))
        assert np.array_equal(pixels[3], pixels[2][:, ::-1])
        assert len({view.tobytes() for view in pixels}) == 6
        [alone] = views.render(source, image, (16, 16), [4])
        assert np.array_equal(alone, pixels[4])  # whatever else is asked for
    write_cache(tmp_path / "other", source, data=data, seed=6)
    assert not torch.equal(TokenCache.open(tmp_path / "other").batch(np.array([2]))[0], cache.batch(np.array([2]))[0])


def test_opening_reads_the_manifest_and_the_labels_alone(tmp_path, source, monkeypatch):
    """What opening costs must not grow with the number of rows, beyond a number for each label."""
    write_cache(tmp_path / "cache", source, images_per_shard=2)
    opened: list[str] = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    cache = TokenCache.open(tmp_path / "cache", verify=False)
    names = {Path(path).name for path in opened if str(tmp_path) in path}
    assert names == {"manifest.json", *(f"labels-{number:05d}.npy" for number in range(4))}
    opened.clear()
    cache.batch(np.array([0, 1, 7]))  # views of images 0 and 2: two shards
    names = {Path(path).name for path in opened if str(tmp_path) in path}
    assert names == {"tokens-00000.npy", "tokens-00001.npy"}
    sizes = {name: value.nbytes for name, value in vars(cache).items() if isinstance(value, np.ndarray)}
    assert sizes == {"labels": 7 * 8, "_starts": 5 * 8}
    containers = [value for value in vars(cache).values() if isinstance(value, (list, tuple, dict, set))]
    assert all(len(value) <= 4 for value in containers)  # a shard each, never a row each


@pytest.mark.parametrize("small", [0, 10**9])
def test_a_flipped_bit_is_found_while_rows_are_read(tmp_path, source, monkeypatch, small):
    monkeypatch.setattr("mvar_core.data.tokens.SMALL_CACHE", small)
    write_cache(tmp_path / "cache", source)
    path = tmp_path / "cache/tokens-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    TokenCache.open(tmp_path / "cache").verify()
    path.write_bytes(content)
    cache = TokenCache.open(tmp_path / "cache")
    part, _ = split_off(cache, 0.3, 0)
    for reader in (cache, part):
        with pytest.raises(DataError, match=r"tokens-00001\.npy has changed.*mvar tokenize .* --overwrite"):
            reader.batch(np.arange(3))
            reader.verify()
            pytest.fail("not noticed")
        with pytest.raises(DataError, match=r"tokens-00001\.npy has changed"):
            reader.batch(np.arange(3))  # and in every batch from then on
    TokenCache.open(tmp_path / "cache", verify=False).batch(np.arange(3))


def test_hostile_manifests(tmp_path, source):
    write_cache(tmp_path / "cache", source)
    path = tmp_path / "cache/manifest.json"
    values = json.loads(path.read_text())

    def changed(**change: object) -> str:
        return json.dumps({**values, **change})

    def shard(**change: object) -> str:
        return changed(shards=[{**values["shards"][0], **change}, *values["shards"][1:]])

    tokens = values["shards"][0]["tokens"]
    hostile = [
        "", "[]", "{}", "[" * 10**5, "{" * 10**5, '{"format": "mvar-token-cache"}', changed(shards=[]),
        changed(images=-1), changed(images=8), changed(images=10**30), changed(images=float("nan")), changed(views=0),
        changed(views=2), changed(views=-3), changed(view_names=[]), changed(class_names=[]), changed(shards=3),
        changed(class_names=["a"]),
        changed(patch_sizes=[]), changed(patch_sizes=[0]), changed(patch_sizes=[-1, 2]), changed(patch_sizes=[10**9]),
        changed(patch_sizes=[1, 2, 5]), changed(patch_sizes=["x" * 10**6]),
        changed(codebook_size=0), changed(dtype="object"),
        changed(dtype="uint32"), changed(version=None), changed(version=[1]), changed(version=99), changed(more=1),
        changed(data={"crop_scale": float("inf")}), changed(images_per_shard=0), changed(codebook_size=2),
        shard(images=10**9), shard(images=-3), shard(images="many"), shard(tokens=None), shard(labels=tokens),
        shard(tokens={**tokens, "file": "../cache/tokens-00000.npy"}), shard(tokens={**tokens, "file": "/dev/zero"}),
        shard(tokens={**tokens, "file": ".."}), shard(tokens={**tokens, "bytes": -1}),
        shard(tokens={**tokens, "bytes": 1}),
        shard(tokens={**tokens, "file": "absent.npy"}), shard(tokens={**tokens, "sha256": "0" * 64}),
        shard(tokens={**tokens, "file": "a\0b"}), shard(tokens={**tokens, "file": "x" * 5000}),
        changed(vectors={"of": "image", "dim": 3, "dtype": "float32", "source": "", "sha256": ""}) + "x",
    ]  # fmt: skip
    for text in hostile:
        path.write_text(text)
        with pytest.raises(DataError, match="cache") as failure:
            TokenCache.open(tmp_path / "cache").batch(np.arange(21))
        assert len(str(failure.value)) < 2000, text[:100]
        with contextlib.suppress(DataError):
            write_cache(tmp_path / "cache", source)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        TokenCache.open(tmp_path / "cache")


def test_hostile_arrays(tmp_path, source):
    write_cache(tmp_path / "cache", source, images_per_shard=7)
    whole = {kind: (tmp_path / f"cache/{kind}-00000.npy").read_bytes() for kind in ("tokens", "labels")}
    values = json.loads((tmp_path / "cache/manifest.json").read_text())
    for kind, name in itertools.product(whole, ("empty", "zeros", "header", "long", "pickle", "large", "cut")):
        content = {
            "empty": b"", "zeros": bytes(200), "header": whole[kind].replace(b"(7,", b"(9,"),
            "long": b"\x93NUMPY\x02\0\xff\xff\xff\xff" + bytes(50), "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
            "large": whole[kind][:-1] + b"\xff", "cut": whole[kind][:-1],
        }[name]  # fmt: skip
        for other, original in whole.items():
            (tmp_path / f"cache/{other}-00000.npy").write_bytes(content if other == kind else original)
        entry = {"file": f"{kind}-00000.npy", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        shards = [{**values["shards"][0], kind: entry}]
        (tmp_path / "cache/manifest.json").write_text(json.dumps({**values, "shards": shards}))
        with pytest.raises(DataError, match="cache"):
            TokenCache.open(tmp_path / "cache").batch(np.arange(21))


def test_a_full_disk_keeps_what_is_finished(tmp_path, source, monkeypatch):
    write_cache(tmp_path / "whole", source)
    save, room = np.save, 3

    def full(file, array):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError("430080 requested and 147328 written")  # what numpy raises, without a number
        save(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(WriteError, match=r"cut.* cannot be written: No space left.*again"):
        write_cache(tmp_path / "cut", source)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir() if path.name.startswith(".")) == []
    monkeypatch.setattr(np, "save", save)
    assert write_cache(tmp_path / "cut", source).encoded == 4
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_an_npz_is_no_array(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(DataError, match=r"x\.npy"):
        map_array(tmp_path / "x.npy")
