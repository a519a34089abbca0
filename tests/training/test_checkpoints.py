from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvar_core.errors import CheckpointError
from mvar_core.training.checkpoints import (
    TrainingState,
    check_settings,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def state(step: int) -> TrainingState:
    return TrainingState(
        step=step,
        settings={"train": {"betas": (0.9, 0.95)}, "seed": 3},
        model={"w": torch.arange(3.0)},
        optimizer={"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]},
        window=torch.ones(2, 3),
        loss=1.5,
    )


def test_round_trip(tmp_path):
    loaded = load_checkpoint(save_checkpoint(tmp_path, state(7)))
    assert (loaded.step, loaded.loss, loaded.optimizer) == (7, 1.5, state(7).optimizer)
    assert loaded.model["w"].equal(torch.arange(3.0))
    check_settings(tmp_path, loaded.settings, state(7).settings)  # tuples and lists are the same setting


def test_the_last_two_are_kept_in_order_of_steps(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, state(step))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010.pt", "step-00000100.pt"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000100.pt"


def test_the_checkpoint_of_the_best_validation_is_kept_beside_the_last_ones(tmp_path):
    for step in (1, 2, 3, 4, 5):
        best = 2 if step >= 2 else None
        save_checkpoint(tmp_path, replace(state(step), best_step=best, best_score=0.5), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.pt", "step-00000005.pt"]
    save_checkpoint(tmp_path, replace(state(6), best_step=6, best_score=0.4), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000006.pt"]


def test_checkpoints_from_before_a_field_was_added_still_load(tmp_path):
    path = save_checkpoint(tmp_path, state(1))
    content = torch.load(path)
    for name in ("average", "random", "best_step"):
        del content[name]
    torch.save(content, path)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.average, loaded.best_step) == (1, {}, None)


def test_leftovers_of_killed_writers_are_removed_and_never_read(tmp_path):
    save_checkpoint(tmp_path, state(1))
    leftover = tmp_path / "checkpoints" / ".step-00000002.pt.abc.tmp"
    leftover.write_bytes(b"half")
    assert latest_checkpoint(tmp_path).name == "step-00000001.pt"
    save_checkpoint(tmp_path, state(2))
    assert not leftover.exists()


def test_other_settings_are_named(tmp_path):
    with pytest.raises(CheckpointError) as error:
        check_settings(Path("x.pt"), {"a": {"lr": 1, "b": 2}, "old": 0}, {"a": {"lr": 3, "b": 2}, "new": 1})
    for part in ("a.lr (checkpoint 1, now 3)", "old (checkpoint 0, now absent)", "new (checkpoint absent, now 1)"):
        assert part in str(error.value)
    assert "a.b" not in str(error.value)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-was-here",)


def test_files_that_would_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000001.pt"
    torch.save({"format": 1, "step": Hostile()}, path)
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt cannot be read"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "hostile-was-here").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(1))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="--overwrite"):
        load_checkpoint(path)
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "absent.pt")
