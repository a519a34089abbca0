from __future__ import annotations

import numpy as np
import pytest

from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError, DataError
from mvar_core.training.trainer import batch_rows, planned_steps, prefetch


def test_epochs_are_fresh_permutations_and_batches_straddle_them():
    rows = np.concatenate([batch_rows(step, 4, 10, seed=3) for step in range(10)])  # 4 epochs of 10 rows
    epochs = rows.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_rows_depend_on_seed_and_step_alone():
    expected = batch_rows(7, 5, 13, seed=1)
    for step in (0, 11, 3):
        batch_rows(step, 5, 13, seed=2)
    assert (batch_rows(7, 5, 13, seed=1) == expected).all()
    assert (batch_rows(7, 5, 13, seed=2) != expected).any()


def test_a_batch_may_hold_several_epochs():
    rows = batch_rows(0, 7, 2, seed=0)
    assert rows.shape == (7,)
    assert sorted(rows[:6]) == [0, 0, 0, 1, 1, 1]


def test_the_returned_rows_are_the_callers_own():
    batch_rows(0, 4, 4, seed=9)[:] = -1
    assert sorted(batch_rows(0, 4, 4, seed=9)) == [0, 1, 2, 3]


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="nothing to train on"):
        batch_rows(0, 4, 0, seed=0)


def test_planned_steps():
    assert planned_steps(TrainConfig(steps=7, epochs=3), rows=100) == 7
    assert planned_steps(TrainConfig(batch_size=30, epochs=2), rows=100) == 7  # 200 / 30, rounded up
    with pytest.raises(ConfigError, match=r"train\.steps"):
        planned_steps(TrainConfig(epochs=None), rows=100)


@pytest.mark.parametrize("ahead", [0, 2, 20])
def test_prefetch_keeps_order_and_passes_errors_on(ahead):
    assert list(prefetch(lambda step: step * step, 2, 9, ahead)) == [4, 9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, 5, 5, ahead)) == []

    def fail_at_three(step: int) -> int:
        if step == 3:
            raise DataError("unreadable")
        return step

    received = []
    with pytest.raises(DataError, match="unreadable"):
        for step in prefetch(fail_at_three, 0, 10, ahead):
            received.append(step)
    assert received == [0, 1, 2]


def test_prefetch_reads_little_ahead():
    read: list[int] = []
    batches = prefetch(read.append, 0, 1000)
    next(batches)
    batches.close()
    assert len(read) <= 4
