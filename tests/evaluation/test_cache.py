"""Features that were measured before are read from the cache, and nothing else is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.features import Features
from mvar_core.evaluation.measure import Measurer, check_values
from mvar_core.evaluation.statistics import FeatureSet


class Network:
    """Features of four pixels; counts the images it sees."""

    dim, comparable_to_papers = 4, False

    def __init__(self, name: str = "tiny", weights_hash: str = "abc"):
        self.name, self.weights_hash, self.seen = name, weights_hash, 0

    def __call__(self, images: Tensor) -> Features:
        self.seen += len(images)
        return Features(images.flatten(1)[:, :4].float())


class Images:
    """Random images that are known by their seed."""

    image_shape, labels, class_names = (4, 4), None, None

    def __init__(self, count: int = 6, seed: int = 0):
        self.name, self.count, self.seed = "images", count, seed
        source = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=source, dtype=torch.uint8)

    def batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        yield from self.pixels[start:stop].split(batch_size)

    def fingerprint(self) -> str:
        return f"images of seed {self.seed}"


def measure(
    cache: Path, images: Images | None = None, network: Network | None = None, keep: bool = True
) -> tuple[FeatureSet, int]:
    """The features, and how many images the network had to see."""
    network = network or Network()
    return Measurer(network, cache, keep).measure(images or Images(), "samples"), network.seen


def test_features_come_back_for_the_same_images_and_network_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, seen = measure(cache)
    assert seen == 6
    again, seen = measure(cache)
    assert seen == 0
    assert torch.equal(again.features, first.features)  # type: ignore[arg-type]
    assert (again.statistics["sigma"] == first.statistics["sigma"]).all()  # type: ignore[index]
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    for others in (
        {"images": Images(7)},
        {"images": Images(seed=1)},
        {"network": Network("other")},
        {"network": Network(weights_hash="def")},
    ):
        assert measure(cache, **others)[1] > 0
    assert len(list(cache.iterdir())) == 5


def test_statistics_do_not_serve_where_features_are_needed(tmp_path: Path) -> None:
    assert measure(tmp_path, keep=False)[1] == 6
    assert measure(tmp_path, keep=False)[1] == 0
    assert measure(tmp_path)[1] == 6
    assert measure(tmp_path, keep=False)[1] == 0


def test_a_single_image_can_be_cached(tmp_path: Path) -> None:
    measure(tmp_path, Images(1))
    found, seen = measure(tmp_path, Images(1))
    assert (found.statistics, seen) == (None, 0)


def test_a_damaged_file_is_measured_again_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = measure(tmp_path)[0]
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    measure(tmp_path, Images(seed=1))
    other = next(each for each in tmp_path.iterdir() if each != path).read_bytes()
    with caplog.at_level(logging.WARNING, logger="mvar"):
        for damaged in (b"", b"text", content[:-40], content[:200] + bytes(64) + content[264:], other):
            path.write_bytes(damaged)
            caplog.clear()
            found, seen = measure(tmp_path)
            assert seen == 6
            assert torch.equal(found.features, expected.features)  # type: ignore[arg-type]
            assert path.name in caplog.text
    assert path.read_bytes() == content


def test_the_cache_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--cache"):
        check_values(tmp_path / "file")


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
def test_what_is_not_a_file_in_the_cache_costs_nothing_but_time(tmp_path: Path, kind: str) -> None:
    measure(tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    if kind == "directory":
        (path / "inner").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    assert measure(tmp_path)[1] == 6


def test_a_cache_that_cannot_be_written_keeps_the_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert measure(tmp_path / "file" / "cache")[1] == 6
    assert "not cached" in caplog.text
