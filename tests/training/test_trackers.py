from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from mvar_core.errors import ConfigError
from mvar_core.training.metrics import check_trackers, flat_numbers, open_trackers

LINE = {"loss": 1.5, "scale_loss": [2.0, float("nan")], "val_loss": None, "note": "text", "skipped": 3}


def test_lines_are_flattened_to_finite_numbers():
    assert dict(flat_numbers(LINE)) == {"loss": 1.5, "scale_loss/0": 2.0, "skipped": 3.0}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(make_config, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        check_trackers(make_config(f"train.{name}=true").train)
    check_trackers(make_config().train)


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert step_metric == "step"

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_goes_on_under_the_same_identifier(make_config, monkeypatch, tmp_path: Path):
    runs: list[tuple[FakeRun, dict]] = []

    def init(**options) -> FakeRun:
        runs.append((FakeRun(), options))
        return runs[-1][0]

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = init
    fake.util = types.SimpleNamespace(generate_id=lambda: "abc")
    fake.Image = lambda image: image.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train = make_config("train.wandb=true").train
    for step in (0, 4):
        (tracker,) = open_trackers(train, tmp_path, step, {"name": "tiny"})
        tracker.write(step + 1, LINE)
        tracker.picture(step + 1, np.zeros((2, 3, 3), dtype=np.uint8))
        tracker.close()
        fake.util.generate_id = lambda: "another"
    assert [options["id"] for _, options in runs] == ["abc", "abc"]
    assert runs[1][1]["config"] == {"name": "tiny"}
    assert runs[1][0].logged == [
        {"step": 5, "loss": 1.5, "scale_loss/0": 2.0, "skipped": 3.0},
        {"step": 5, "samples": (2, 3, 3)},
    ]
    assert all(run.finished for run, _ in runs)


def test_tensorboard_hides_what_will_be_written_again(make_config, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = make_config("train.tensorboard=true").train
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        (tracker,) = open_trackers(train, tmp_path, start, {})
        for step in steps:
            tracker.write(step, {"loss": step + start / 10})
        tracker.picture(steps[-1], np.zeros((4, 4, 3), dtype=np.uint8))
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, pytest.approx(3.2)), (4, pytest.approx(4.2))
    ]  # fmt: skip
    assert events.Tags()["images"] == ["samples"]
