"""How the making of a token cache is divided: into shards, among processes, and how far all of them are."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mvar_core.data.manifest import Manifest, Shard
from mvar_core.data.sources import Progress

SHARD_BYTES = 32 * 2**20
LARGEST_SHARD = 65_536
SMALLEST_SHARD = 256
SHARDS_WANTED = 64
"""A shard is what a process takes, and what is done again after a crash: so small sets are cut into this many too."""

SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class CacheSummary:
    """What writing a cache leaves behind.

    Attributes:
        images: Images in the cache.
        views: Views per image.
        bytes: Size of its tokens and labels.
        encoded: Images encoded by this call; the others were there already.
        skipped: Names of images that could not be read and were left out.
    """

    images: int
    views: int
    bytes: int
    encoded: int
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest, encoded: int) -> CacheSummary:
        """The summary of a complete cache."""
        size = sum(shard.tokens.bytes + shard.labels.bytes for shard in manifest.shards)
        skipped = tuple(name for shard in manifest.shards for name in shard.skipped)
        return cls(manifest.images, manifest.views, size, encoded, skipped)

    @property
    def bytes_per_view(self) -> float:
        """Size of one view's tokens, with its part of labels and headers."""
        return self.bytes / max(1, self.images * self.views)


@dataclass(frozen=True)
class Work:
    """What is left to do for a cache; every process is given the same.

    Attributes:
        total: Images of the source.
        images_per_shard: Of these, in every shard but the last.
        pending: Numbers of the shards that are not there yet.
    """

    total: int
    images_per_shard: int
    pending: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return -(-self.total // self.images_per_shard)

    @property
    def images(self) -> int:
        """Images that are still to be encoded."""
        return sum(len(self.images_of(number)) for number in self.pending)

    def images_of(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.images_per_shard, min((number + 1) * self.images_per_shard, self.total))

    def of(self, rank: int, count: int) -> tuple[int, ...]:
        """The shards that one of `count` processes writes."""
        return self.pending[rank::count]


class Tally:
    """Counts images over all processes: the own ones as they come, those of others by their receipts.

    Args:
        out: The cache's directory.
        work: What there was to do.
        own: This process's shards.
        progress: Where to report.
    """

    def __init__(self, out: Path, work: Work, own: Collection[int], progress: Progress | None):
        self.out = out
        self.work = work
        self.progress = progress
        self.done = work.total - work.images
        self.others = [number for number in work.pending if number not in set(own)]
        self.looked = time.monotonic()

    def report(self, images: int) -> None:
        """So many images of the own shard are encoded."""
        if self.progress is None:
            return
        if self.others and time.monotonic() - self.looked > SECONDS_BETWEEN_LOOKS:
            self.looked = time.monotonic()
            there = {number for number in self.others if Shard.receipt(self.out, number).exists()}
            self.others = [number for number in self.others if number not in there]
            self.done += sum(len(self.work.images_of(number)) for number in there)
        self.progress(min(self.done + images, self.work.total), self.work.total)

    def add(self, images: int) -> None:
        """The own shard with so many images is done."""
        self.done += images


def default_shard(bytes_per_image: int, images: int) -> int:
    """Images in a shard: a power of two, for some tens of megabytes, and fewer where the images are few."""
    fits = min(max(SHARD_BYTES // bytes_per_image, 1), LARGEST_SHARD)
    wanted = max(SMALLEST_SHARD, -(-images // SHARDS_WANTED))
    return 1 << (min(fits, wanted).bit_length() - 1)
