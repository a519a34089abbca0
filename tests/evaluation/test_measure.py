from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.evaluation.features import Features
from mvar_core.evaluation.measure import merge_features, shards
from mvar_core.evaluation.scores import METRICS, evaluate_features
from mvar_core.evaluation.statistics import collect, merge_statistics


class Extractor:
    """Sums of whole numbers below 2²⁴: the same to the last bit in every batch."""

    name, dim, comparable_to_papers, weights_hash = "tiny", 12, False, "abc"
    weights = torch.randint(-3, 4, (48, 12), generator=torch.Generator().manual_seed(7)).float()

    def __call__(self, images: Tensor) -> Features:
        pool = torch.relu((images.flatten(1).float() - 128) @ self.weights) / 1024
        return Features(pool, pool[:, :6], pool[:, 3:9])


def pictures(count: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=source, dtype=torch.uint8)


def test_merged_statistics_are_those_of_the_union() -> None:
    images = pictures(700, 0)
    expected = collect(Extractor(), [images], 700).statistics
    assert expected is not None
    parts = []
    for part in images.split([2, 300, 398]):
        statistics = collect(Extractor(), [part], len(part)).statistics
        assert statistics is not None
        parts.append((len(part), statistics))
    merged = merge_statistics(parts)
    np.testing.assert_allclose(merged["mu"], expected["mu"], rtol=1e-12)
    np.testing.assert_allclose(merged["sigma"], expected["sigma"], rtol=1e-10, atol=1e-12)


def test_one_process_measures_all_and_merges_nothing() -> None:
    assert shards(5) == [range(5)]
    features = collect(Extractor(), [pictures(5, 0)], 5)
    assert merge_features(features, 5) is features


PROCESS = """
import json
import sys

import torch
import torch.distributed as dist

sys.path.insert(0, {tests!r})
from test_measure import Extractor, pictures
from mvar_core.errors import DataError
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.evaluation.measure import merge_features, shards
from mvar_core.evaluation.statistics import collect
from dataclasses import replace
import numpy as np

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)


def measure(count, seed, keep=True):
    rows = shards(count)[rank]
    part = pictures(count, seed)[rows.start : rows.stop]
    local = collect(Extractor(), part.split(20), len(rows), keep_features=keep, first=rows.start)
    local = replace(local, labels=np.arange(rows.start, rows.stop))
    return merge_features(local, count)


samples = measure(301, 0)
scores = evaluate_features(samples, measure(150, 1), seed=5)
assert np.array_equal(samples.labels, np.arange(301))
slim = measure(301, 0, keep=False)
assert slim.features is None and slim.count == 301
assert (slim.statistics["sigma"] == samples.statistics["sigma"]).all()
errors = []
local = collect(Extractor(), [pictures(4, rank)], 4)
for attempt in (
    lambda: shards(3),
    lambda: merge_features(replace(local, features=None) if rank else local, 8),
    lambda: merge_features(local, 6),
):
    try:
        attempt()
    except DataError as error:
        errors.append(str(error))
in_order = torch.equal(samples.features, Extractor()(pictures(301, 0)).pool)
print(json.dumps([scores, errors, in_order, shards(301)[rank].start]))
dist.destroy_process_group()
"""


def test_two_processes_give_the_numbers_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = PROCESS.format(tests=str(Path(__file__).parent), port=port)
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    results = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    alone = evaluate_features(
        collect(Extractor(), pictures(301, 0).split(64), 301),
        collect(Extractor(), pictures(150, 1).split(64), 150),
        seed=5,
    )
    for scores, errors, in_order, _ in results:
        for name in (*METRICS, "inception_score_std", "kid_std"):
            assert alone[name] is not None
            assert scores[name] == pytest.approx(alone[name], rel=1e-9), name
        assert in_order
        assert errors[0].startswith("3 images are too few for 2 processes")
        assert "kept different features" in errors[1]
        assert "measured 8 images; expected 6" in errors[2]
    assert [start for *_, start in results] == [0, 150]
