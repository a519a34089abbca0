from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from mvar_core.config import ConditioningConfig, ModelConfig, TokenizerConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import ImageSource, open_images
from mvar_core.data.token_writer import write_token_cache
from mvar_core.data.tokens import TokenCache, split_off
from mvar_core.data.vectors import Vectors, embed_words, file_vectors, phrasings, read_vectors, word_vectors
from mvar_core.errors import DataError

SIZES = TokenizerConfig(
    codebook_size=64, latent_channels=8, base_channels=8, channel_multipliers=(1, 1, 1), norm_groups=4
)
CONFIG = ModelConfig(image_size=16, patch_sizes=(1, 2, 4), tokenizer=SIZES, transformer=None)
VECTOR = ConditioningConfig(kind="vector", dim=8)


def encode(images: torch.Tensor) -> torch.Tensor:
    return (images.flatten(1)[:, :21].abs() * 60).long()


def write_cache(out: Path, source: ImageSource, vectors: Vectors | None, **options: object) -> None:
    settings = {"tokenizer_hash": "a" * 64, "batch_size": 4, "images_per_shard": 3, **options}
    write_token_cache(
        out, source, encode, config=CONFIG, data=DataConfig(flip=True, augmented_views=1), vectors=vectors, **settings
    )


@pytest.fixture
def source(class_folders) -> ImageSource:
    return open_images(str(class_folders))


def numbers(rows: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_images_keep_their_own_vectors(tmp_path: Path, source: ImageSource, dtype: str) -> None:
    np.save(tmp_path / "v.npy", numbers(7, dtype=dtype))
    given = file_vectors(tmp_path / "v.npy", classes=3, images=7, encoder="clip")
    assert isinstance(given.values.base, np.memmap)
    write_cache(tmp_path / "cache", source, given)
    cache = TokenCache.open(tmp_path / "cache", verify=True)
    assert cache.manifest.version == 3
    entry = cache.manifest.vectors
    assert entry is not None
    assert (entry.of, entry.dim, entry.encoder, entry.dtype) == ("image", 8, "clip", dtype)
    rows = np.array([20, 0, 1, 7, 11, 1])
    tokens, vectors = cache.conditioned(VECTOR).batch(rows)
    assert vectors.dtype == torch.float32
    assert np.array_equal(vectors.numpy(), numbers(7, dtype=dtype)[rows // 3].astype(np.float32))
    assert torch.equal(tokens, cache.batch(rows)[0])


def test_vectors_of_classes_cost_nothing_per_view(tmp_path: Path, source: ImageSource) -> None:
    np.save(tmp_path / "v.npy", numbers(3))
    write_cache(tmp_path / "cache", source, file_vectors(tmp_path / "v.npy", classes=3, images=7))
    cache = TokenCache.open(tmp_path / "cache", verify=True)
    assert [path.name for path in sorted((tmp_path / "cache").glob("vectors*"))] == ["vectors.npy"]
    rows = np.arange(21)
    assert np.array_equal(cache.vectors(rows).numpy(), numbers(3)[source.labels[rows // 3]])


def test_views_of_a_class_take_its_phrasings_in_turn(tmp_path: Path, source: ImageSource) -> None:
    write_cache(tmp_path / "cache", source, word_vectors(source.class_names, 8))
    cache = TokenCache.open(tmp_path / "cache")
    seen = set()
    for row in range(21):
        image, view = divmod(row, 3)
        texts = phrasings(source.class_names[source.labels[image]])
        assert np.array_equal(cache.vectors(np.array([row]))[0].numpy(), embed_words(texts, 8)[(image + view) % 4])
        seen.add((int(source.labels[image]), (image + view) % 4))
    assert len(seen) == 12


def test_left_out_images_take_their_vectors_along(tmp_path: Path, class_folders: Path) -> None:
    (class_folders / "ant" / "a.png").write_bytes(b"damaged")
    source = open_images(str(class_folders))
    bad = source.item_names.index("ant/a.png")
    np.save(tmp_path / "v.npy", numbers(7))
    write_cache(
        tmp_path / "cache", source, file_vectors(tmp_path / "v.npy", classes=3, images=7), skip_bad=True
    )  # fmt: skip
    cache = TokenCache.open(tmp_path / "cache")
    kept = np.delete(numbers(7), bad, axis=0)
    assert np.array_equal(cache.vectors(np.arange(0, 18, 3)).numpy(), kept)


def test_an_interrupted_cache_ends_as_one_that_was_not(tmp_path: Path, source: ImageSource) -> None:
    given = Vectors.of("image", numbers(7)[:, None], None, "v.npy")
    write_cache(tmp_path / "whole", source, given)
    calls = []

    def stops(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)

    settings = {"tokenizer_hash": "a" * 64, "batch_size": 4, "images_per_shard": 3, "config": CONFIG}
    views = DataConfig(flip=True, augmented_views=1)
    with pytest.raises(KeyboardInterrupt):
        write_token_cache(tmp_path / "cut", source, stops, data=views, vectors=given, **settings)
    with pytest.raises(DataError, match="vectors.phrasings is"):
        write_cache(tmp_path / "cut", source, None)
    write_cache(tmp_path / "cut", source, given)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_changed_vectors_are_noticed(tmp_path: Path, source: ImageSource) -> None:
    write_cache(tmp_path / "cache", source, word_vectors(source.class_names, 8))
    with pytest.raises(DataError, match="vectors.phrasings is"):
        write_cache(tmp_path / "cache", source, Vectors.of("class", numbers(3)[:, None], None, "v.npy"))
    path = tmp_path / "cache" / "vectors.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="has changed"):
        TokenCache.open(tmp_path / "cache", verify=True)
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match="bytes instead of"):
        TokenCache.open(tmp_path / "cache")


def test_caches_without_vectors_are_written_as_before(tmp_path: Path, source: ImageSource) -> None:
    write_cache(tmp_path / "cache", source, None)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert "vectors" not in manifest
    assert "vectors" not in manifest["shards"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 9}, "vectors of 8 .*9"),
        ({"dim": 8, "encoder": "clip"}, "by hashed-words.*by clip"),
    ],
)
def test_models_refuse_vectors_of_others(tmp_path: Path, source: ImageSource, settings, message: str) -> None:
    write_cache(tmp_path / "cache", source, word_vectors(source.class_names, 8))
    cache = TokenCache.open(tmp_path / "cache")
    with pytest.raises(DataError, match=message):
        cache.conditioned(ConditioningConfig(kind="vector", **settings))
    assert cache.conditioned(ConditioningConfig()) is cache  # a class model ignores the vectors


def test_a_cache_without_vectors_is_refused(tmp_path: Path, source: ImageSource) -> None:
    write_cache(tmp_path / "cache", source, None)
    with pytest.raises(DataError, match="holds no vectors") as refused:
        TokenCache.open(tmp_path / "cache").conditioned(VECTOR)
    assert "--words" in str(refused.value)


def test_every_kind_of_file(tmp_path: Path) -> None:
    expected = numbers(5)
    np.save(tmp_path / "a.npy", expected)
    np.savez(tmp_path / "a.npz", vectors=expected, encoder="t5")
    save_file({"vectors": expected}, tmp_path / "a.safetensors", metadata={"encoder": "clip"})
    for name, encoder in (("a.npy", None), ("a.npz", "t5"), ("a.safetensors", "clip")):
        found, named = read_vectors(tmp_path / name)
        assert np.array_equal(found, expected)
        assert named == encoder
    save_tensors({"vectors": torch.from_numpy(expected).bfloat16()}, tmp_path / "b.safetensors")
    assert np.allclose(read_vectors(tmp_path / "b.safetensors")[0], expected, rtol=0.01)


def test_sequences_are_pooled_by_their_mask(tmp_path: Path) -> None:
    sequences = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float16)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    np.savez(tmp_path / "a.npz", vectors=sequences, mask=mask)
    found, _ = read_vectors(tmp_path / "a.npz")
    means = np.stack([sequences[0, :2].astype(np.float32).mean(0), sequences[1, 0].astype(np.float32)])
    assert np.allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 3, 4), np.float32), "mask"),
        (np.ones((2, 3), np.int64), "expected floats"),
        (np.ones((0, 3), np.float32), "expected floats"),
        (np.array([[1, 2], [np.nan, 1]], np.float32), "vector 1 holds"),
    ],
)
def test_what_is_no_vector_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError) as refused:
        read_vectors(tmp_path / "a.npy")
    assert message in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_vectors(tmp_path / "none.npy")
    np.savez(tmp_path / "a.npz", other=numbers(2))
    with pytest.raises(DataError, match="no array `vectors`"):
        read_vectors(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"a\.npy is not a whole"):
        read_vectors(tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("1 2")
    with pytest.raises(DataError, match="is not a file of vectors"):
        read_vectors(tmp_path / "a.txt")
    np.save(tmp_path / "b.npy", numbers(4))
    with pytest.raises(DataError, match="4 vectors; expected 7"):
        file_vectors(tmp_path / "b.npy", classes=3, images=7)


@pytest.mark.parametrize("of", ["image", "class"])
def test_parts_of_a_cache_keep_their_vectors(tmp_path: Path, source: ImageSource, of: str) -> None:
    given = Vectors.of("image", numbers(7)[:, None], None, "v.npy")
    write_cache(tmp_path / "cache", source, given if of == "image" else word_vectors(source.class_names, 8))
    cache = TokenCache.open(tmp_path / "cache")
    for part in split_off(cache, 0.4, seed=0):
        rows = np.arange(len(part))
        whole = part.images[rows // 3] * 3 + rows % 3
        tokens, vectors = part.conditioned(VECTOR).batch(rows)
        assert torch.equal(vectors, cache.vectors(whole))
        assert torch.equal(tokens, cache.batch(whole)[0])
