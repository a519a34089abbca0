"""What a run tells while it trains: a report per step, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.io.files import write_text


@dataclass(frozen=True)
class StepReport:
    """One finished step, for progress bars.

    Attributes:
        step: Steps done, this one included.
        total_steps: Steps of the whole run.
        loss: Loss of this step; nan where the step was skipped.
        learning_rate: Learning rate of this step.
        grad_norm: Norm of the gradient before clipping.
        images_per_second: Throughput since the run or the last line of metrics.jsonl began.
        skipped: Steps left out so far because their loss or gradient was not finite.
        metrics: The line just appended to metrics.jsonl; empty on the steps between.
        tokens_per_second: Throughput in tokens.
        peak_memory_bytes: Highest memory so far.
        seconds_left: Until the last step, at the speed of this session; nan before there is one.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    images_per_second: float
    skipped: int
    metrics: Mapping[str, Any]
    tokens_per_second: float = math.nan
    peak_memory_bytes: int = 0
    seconds_left: float = math.nan


class MetricsLog:
    """metrics.jsonl of a run directory: one JSON object per line, each with the number of steps done.

    Args:
        path: The file.
        resume_step: Lines of later steps, and a line that was cut off, are dropped: they will be written again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = path
        lines = read_metrics(path) if resume_step > 0 else []
        kept = [line for line in lines if line["step"] <= resume_step]
        if kept or path.exists():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line; numbers that JSON does not have (nan, inf) become null."""
        with self.path.open("a", encoding="utf-8") as file:
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
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
