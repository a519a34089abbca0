"""What a run measures while it trains: metrics.jsonl, skipped.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mvar_core.config.training import LoopConfig
from mvar_core.errors import ConfigError
from mvar_core.io.files import naming, write_text
from mvar_core.runtime import peak_memory_bytes

if TYPE_CHECKING:
    from mvar_core.training.trainer import Objective, Plan

METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"


@dataclass(frozen=True)
class StepResult:
    """What one step gave; `values` is None where it was left out.

    `overflow` says that it was left out because float16 gradients overflowed, as they now and then do.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    values: Tensor | None
    overflow: bool = False


class Recorder:
    """Sums the measures of steps, and writes them to metrics.jsonl and the trackers.

    `window` holds sums of the measures since the last line, and how many steps each sums: (2, 1 + measures). `loss` is
    averaged over the last finished line; `course` is the watched loss of the first step, of the highest line and of the
    last one, empty before; `earlier_seconds` were spent in earlier sessions of the run.
    """

    def __init__(self, objective: Objective, plan: Plan):
        self.objective, self.plan = objective, plan
        self.window = torch.zeros(2, 1 + len(objective.metric_names), device=plan.device)
        self.loss = math.nan
        self.course: tuple[float, ...] = ()
        self.earlier_seconds = 0.0
        self._started = time.monotonic()
        self._out: Path | None = None
        self.trackers: list[Tracker] = []
        self.restart_clock()

    @property
    def seconds(self) -> float:
        """Time spent so far, over all sessions of the run."""
        return self.earlier_seconds + time.monotonic() - self._started

    @property
    def images_per_second(self) -> float:
        """Throughput since the last line."""
        return self._images / max(time.monotonic() - self._line_started, 1e-9)

    def open(self, out: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Begin to write under `out`; without this call nothing is written, which is right for all ranks but 0.

        Lines of steps after `step` are dropped: they will be written again. `settings` are shown by the trackers.
        """
        self._out = out
        self.trackers = open_trackers(self.plan.train, out, step, settings)
        for name in (METRICS, SKIPPED):
            if (out / name).exists():
                kept = [line for line in read_metrics(out / name) if line["step"] <= step] if step else []
                write_text(out / name, "".join(json.dumps(line) + "\n" for line in kept))

    def restart_clock(self) -> None:
        """Count images per second from now on."""
        self._images, self._line_started = 0, time.monotonic()

    def add(self, values: Tensor | None) -> None:
        """Add one step's measures; None where the step was left out."""
        self._images += self.plan.train.batch_size
        if values is not None:
            if not self.course:
                self.course = (self._watched(values),) * 3
            self.window += torch.stack([values.nan_to_num(), (~values.isnan()).float()])

    def write_training(self, step: int, result: StepResult, skipped: int) -> None:
        """Write the means of the window as a line, after `step` steps, and start the next window."""
        sums, counts = self.window  # a measure that no step had is 0 / 0 = nan
        if counts[0]:
            first, highest, _ = self.course or (math.nan,) * 3
            last = self._watched(sums / counts)
            self.course = (first, max(highest, last), last)
        means = dict(zip(("loss", *self.objective.metric_names), (sums / counts).tolist(), strict=True))
        self.loss = means.pop("loss")
        speed = self.images_per_second
        line = {"step": step, "loss": self.loss, **self.objective.describe(means)}
        line |= {"lr": result.learning_rate, "grad_norm": result.grad_norm, "skipped": skipped}
        line |= {"images_per_second": speed, "tokens_per_second": speed * self.objective.tokens_per_image}
        self.write(line | {"peak_memory_bytes": peak_memory_bytes(self.plan.device)})
        self.window.zero_()

    def _watched(self, values: Tensor) -> float:
        names = ("loss", *self.objective.metric_names)
        return float(values[[names.index(name) for name in self.objective.watched]].nanmean())

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and tell the trackers."""
        self.append(METRICS, line)
        for tracker in self.trackers:
            tracker.write(line["step"], {name: value for name, value in line.items() if name != "step"})

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a file of the run directory."""
        if self._out is not None:
            with naming(self._out / name), (self._out / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(line)) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where it does not exist, and without one that was cut off."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    """A value as JSON can hold it: nan and inf become null, floats are rounded."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


class TensorBoard:
    """Event files under `directory`; what earlier sessions wrote of steps after `step` is hidden."""

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)
        self.close = self._writer.close

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers as scalars, lists as one scalar per scale."""
        for name, value in flat_numbers(values):
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """A picture under "samples"."""
        self._writer.add_image("samples", image, step, dataformats="HWC")


class WeightsAndBiases:
    """A run at Weights & Biases; project, entity and mode are what its environment variables say.

    Its identifier is kept in the run directory, so that a resumed run continues there. Steps that a killed session had
    logged after its last checkpoint are logged a second time, with equal values.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        name = out / "wandb-id.txt"
        identifier = name.read_text(encoding="utf-8").strip() if name.is_file() else wandb.util.generate_id()
        write_text(name, identifier + "\n")
        project = os.environ.get("WANDB_PROJECT", "mvar")
        self._run = wandb.init(
            project=project, name=out.name, id=identifier, resume="allow", dir=str(out), config=dict(settings)
        )
        self._run.define_metric("*", step_metric="step")
        self.close = self._run.finish

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers, against the step as their axis."""
        self._run.log({"step": step, **dict(flat_numbers(values))})

    def picture(self, step: int, image: np.ndarray) -> None:
        """A picture under "samples"."""
        self._run.log({"step": step, "samples": self._wandb.Image(image)})


Tracker = TensorBoard | WeightsAndBiases


def open_trackers(train: LoopConfig, out: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that the configuration asks for, in a run directory with `step` steps done."""
    trackers: list[Tracker] = [TensorBoard(out / "tensorboard", step)] if train.tensorboard else []
    return [*trackers, WeightsAndBiases(out, settings)] if train.wandb else trackers


def check_trackers(train: LoopConfig) -> None:
    """Refuse trackers that are not installed, before anything slow begins (ConfigError)."""
    for package in ("tensorboard", "wandb"):
        if getattr(train, package) and find_spec(package) is None:
            raise ConfigError(
                f"{package} is not installed.",
                f"Install it with `pip install {package}`, or set {package}=false in the training section.",
            )


def flat_numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a line, those in lists under name/index."""
    for name, value in values.items():
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, item in items:
            if isinstance(item, int | float) and np.isfinite(item):
                yield (name if index is None else f"{name}/{index}"), float(item)
