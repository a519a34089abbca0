"""Features that several processes have measured, brought together in the order of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.statistics import FeatureSet, Statistics, merge_statistics

IMAGES_PER_PROCESS = 2
"""A process needs a covariance of its own to merge."""


def shard(total: int) -> range:
    """The images that this process measures, of `total`: contiguous blocks in the order of ranks, even to one image.

    Without torch.distributed, all.

    Raises:
        DataError: Too few images for the number of processes; every process raises it, so that none waits.
    """
    if not _is_distributed():
        return range(total)
    rank, world = dist.get_rank(), dist.get_world_size()
    if total < IMAGES_PER_PROCESS * world:
        raise DataError(
            f"{total} images are too few for {world} processes, each of which needs {IMAGES_PER_PROCESS}.",
            "Use fewer processes.",
        )
    return range(total * rank // world, total * (rank + 1) // world)


def merge_features(local: FeatureSet, positions: NDArray[np.int64] | range, total: int) -> FeatureSet:
    """Bring together what all processes have measured; each gets all of it. Without torch.distributed, `local`.

    Features, logits, labels and content keys are put in the order of the images, bit for bit as one process would have
    them, so that precision, recall, KID and the shuffled inception score are the same. Means and covariances are merged
    rank by rank in float64 (Chan, Golub and LeVeque 1979): they differ from one process's by the rounding of float64
    sums, some 1e-13 relative. Networks may round differently in batches of another size, so what one process gives to
    the last bit needs shards that are cut at the same batches.

    Args:
        local: What this process has measured.
        positions: Which of all images those are, in the same order, for example from `shard`.
        total: Number of images of all processes.

    Raises:
        DataError: The positions are not all images, each once, or the processes measured differently.
    """
    if not _is_distributed():
        return local
    ours = torch.as_tensor(np.asarray(positions, dtype=np.int64))
    world = dist.get_world_size()
    # What one process lacks, none sends: checked first, or some would wait for the others for ever.
    shapes = [
        None if rows is None else tuple(rows.shape[1:])
        for rows in (local.features, local.logits, _labels(local), local.content_keys)
    ]
    statistics = [part is not None for part in (local.statistics, local.spatial)]
    description = (local.extractor, local.weights_hash, shapes, statistics)
    everyone: list[tuple[object, int, int | None]] = [(None, 0, None)] * world
    dist.all_gather_object(everyone, (description, len(ours), local.count))
    if any(other != description for other, _, _ in everyone):
        raise DataError(f"The {world} processes measured with different extractors or kept different features.")
    counts = [count for _, count, _ in everyone]
    if [measured for _, _, measured in everyone] != counts:
        raise DataError(f"The processes say that they measured images {counts}, but have other numbers of features.")
    order = torch.cat(_gather(ours, counts))
    if not torch.equal(order.sort().values, torch.arange(total)):
        raise DataError(f"The {world} processes together did not measure each of {total} images once.")
    labels = _in_order(_labels(local), order, counts)
    return replace(
        local,
        count=total,
        statistics=_merge(local.statistics, counts),
        spatial=_merge(local.spatial, counts),
        features=_in_order(local.features, order, counts),
        logits=_in_order(local.logits, order, counts),
        labels=None if labels is None else labels.numpy(),
        content_keys=_in_order(local.content_keys, order, counts),
    )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _labels(images: FeatureSet) -> Tensor | None:
    return None if images.labels is None else torch.from_numpy(images.labels)


def _gather(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Every rank's rows, on the CPU; ranks may have different numbers of rows."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = rows.new_zeros((max(counts), *rows.shape[1:]), device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count].cpu() for part, count in zip(parts, counts, strict=True)]


def _in_order(rows: Tensor | None, order: Tensor, counts: list[int]) -> Tensor | None:
    if rows is None:
        return None
    result = rows.new_empty((len(order), *rows.shape[1:]))
    result[order] = torch.cat(_gather(rows, counts))
    return result


def _merge(statistics: Statistics | None, counts: list[int]) -> Statistics | None:
    if statistics is None:
        return None
    once = [1] * len(counts)
    means = _gather(torch.from_numpy(statistics["mu"])[None], once)
    covariances = _gather(torch.from_numpy(statistics["sigma"])[None], once)
    return merge_statistics(
        [
            (count, Statistics(mu=mean[0].numpy(), sigma=covariance[0].numpy()))
            for count, mean, covariance in zip(counts, means, covariances, strict=True)
        ]
    )
