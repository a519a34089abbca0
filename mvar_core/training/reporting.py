"""What a run measures while it trains: means between two lines of metrics.jsonl, speed, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar_core.runtime import peak_memory_bytes
from mvar_core.training.objective import Objective, Plan
from mvar_core.training.record import MetricsLog, StepReport
from mvar_core.training.step import StepResult
from mvar_core.training.trackers import Tracker, open_trackers


class Recorder:
    """Sums the measures of steps, and turns them into lines and reports.

    Attributes:
        window: Sums of the measures since the last line, and how many steps each sums; (2, 1 + measures).
        loss: Training loss, averaged over the last finished line.

    Args:
        objective: Names and describes the measures.
        plan: When lines are due.
    """

    def __init__(self, objective: Objective[Any], plan: Plan):
        self.objective = objective
        self.plan = plan
        self.window = torch.zeros(2, 1 + len(objective.metric_names), device=plan.device)
        self.loss = math.nan
        self.started = time.monotonic()
        self.earlier_seconds = 0.0
        self._log: MetricsLog | None = None
        self._skipped_log: MetricsLog | None = None
        self._trackers: list[Tracker] = []
        self._first_step = 0
        self._images = 0
        self._line_started = self._first_step_started = self.started

    @property
    def seconds(self) -> float:
        """Time spent so far, over all sessions of the run."""
        return self.earlier_seconds + time.monotonic() - self.started

    @property
    def images_per_second(self) -> float:
        """Throughput since the last line."""
        return self._images / max(time.monotonic() - self._line_started, 1e-9)

    def open(self, out: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Begin to write under `out`; without this call nothing is written, which is right for all processes but one.

        Args:
            out: The run directory.
            step: Steps done; lines of later ones are dropped, they will be written again.
            settings: The run's configuration, for the trackers.

        Raises:
            ConfigError: A tracker that is not installed.
        """
        self._trackers = open_trackers(self.plan.train, out, step, settings)
        self._log = MetricsLog(out / "metrics.jsonl", step)
        self._skipped_log = MetricsLog(out / "skipped.jsonl", step)

    def start(self, step: int) -> None:
        """The first step of this session comes next, after `step` steps of others."""
        self._first_step = step
        self.restart_clock()
        self._first_step_started = self._line_started

    def close(self) -> None:
        """Write what the trackers still hold."""
        for tracker in self._trackers:
            tracker.close()

    def restart_clock(self) -> None:
        """Count images per second anew."""
        self._images, self._line_started = 0, time.monotonic()

    def add(self, values: Tensor | None) -> None:
        """Take one step's measures in, or None of a step that was left out."""
        self._images += self.plan.train.batch_size
        if values is not None:
            self.window += torch.stack([values.nan_to_num(), (~values.isnan()).float()])

    def training_line(self, step: int, result: StepResult, skipped: int) -> dict[str, Any]:
        """Write and return the line that is due after `step` steps; empty where none is."""
        if step % self.plan.train.log_every and step != self.plan.total_steps:
            return {}
        means = dict(zip(("loss", *self.objective.metric_names), self._means(), strict=True))
        self.loss = means["loss"]
        speed = self.images_per_second
        line = {
            "step": step,
            "loss": self.loss,
            **self.objective.describe(means),
            "lr": result.learning_rate,
            "grad_norm": result.grad_norm,
            "skipped": skipped,
            "images_per_second": speed,
            "tokens_per_second": speed * self.objective.tokens_per_image,
            "peak_memory_bytes": peak_memory_bytes(self.plan.device),
        }
        self.write(line)
        self.window.zero_()
        return line

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._log is not None:
            self._log.append(line)
        for tracker in self._trackers:
            tracker.write(line["step"], {name: value for name, value in line.items() if name != "step"})

    def picture(self, step: int, image: np.ndarray) -> None:
        """Hand a picture of what the model makes to the trackers."""
        for tracker in self._trackers:
            tracker.picture(step, image)

    def write_skipped(self, step: int, result: StepResult, rows: Any) -> None:
        """Append a step that was left out to skipped.jsonl, with the rows of the data that it trained on."""
        if self._skipped_log is not None:
            line = {"step": step, "loss": result.found_loss, "grad_norm": result.grad_norm, "rows": rows.tolist()}
            self._skipped_log.append(line)

    def report(self, step: int, result: StepResult, skipped: int, line: Mapping[str, Any]) -> StepReport:
        """What a progress bar may show of a step."""
        return StepReport(
            step=step,
            total_steps=self.plan.total_steps,
            loss=result.loss,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            images_per_second=self.images_per_second,
            skipped=skipped,
            metrics=line,
            tokens_per_second=self.images_per_second * self.objective.tokens_per_image,
            peak_memory_bytes=peak_memory_bytes(self.plan.device),
            seconds_left=self._seconds_left(step),
        )

    def _seconds_left(self, step: int) -> float:
        return (
            (time.monotonic() - self._first_step_started) / (step - self._first_step) * (self.plan.total_steps - step)
        )

    def _means(self) -> list[float]:
        sums, counts = self.window
        means: list[float] = (sums / counts).tolist()  # nan where no step had the measure
        return means
