"""The rows of `mvar ablate`: each is trained, sampled and scored on its own, once, and can be gone on with.

A row is one setting on one seed. It is done once its row.json is there. Costs are measured per setting after all rows,
in processes of their own and in rounds over the settings, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvar_cli.ablation_judge import Judge
from mvar_cli.ablation_request import ROW, Row
from mvar_cli.costs import cost_of
from mvar_cli.old_console import Console, Progress, format_number, format_seconds, plain
from mvar_cli.training import train_run
from mvar_core.analysis.ablation import Setting
from mvar_core.config import Machine, RunConfig
from mvar_core.data.tokens import TokenCache
from mvar_core.io.files import read_json, write_json
from mvar_core.pipeline import Pipeline
from mvar_core.training.checkpoints import remove_checkpoints
from mvar_core.training.metrics import read_metrics
from mvar_core.workflows.bench_row import Request, measure_alone
from mvar_core.workflows.evaluate import SampledImages

ROUNDS = 3
REPEATS = 3


@dataclass
class Experiment:
    """What all rows share.

    Attributes:
        console: Where to report.
        config: The run, fitted to the tokens; attention, seed and name are each row's own.
        tokens: What is trained on.
        validation: Held-out tokens.
        checkpoint: Model directory with the tokenizer.
        out: The experiment's directory.
        judge: Scores samples.
        num: Samples of each class.
        bench_batch: Images together where time and memory are measured.
        device: As on the command line, and the next ones too.
        dtype: See above.
        attention: See above.
    """

    console: Console
    config: RunConfig
    tokens: TokenCache
    validation: TokenCache
    checkpoint: Path
    out: Path
    judge: Judge
    num: int
    bench_batch: int
    device: str
    dtype: str
    attention: str

    def train(self, rows: Sequence[Row], steps: int) -> bool:
        """Train and score every row that is not done; returns whether an interruption ended it early."""
        waiting = [row for row in rows if not row.done]
        for row in rows:
            if row.done:
                _tidy(row)
        if len(waiting) < len(rows):
            self.console.note(f"{len(rows) - len(waiting)} of {len(rows)} rows are there already.")
        begun = time.monotonic()
        with self.console.progress("ablation", "steps") as progress:
            for number, row in enumerate(waiting):
                place = len(rows) - len(waiting) + number
                title = f"row {place + 1} of {len(rows)}: {row.setting.name}, seed {row.seed}"
                show = _steps_of_all(progress, place * steps, len(rows) * steps, title)
                found = self._row(row, _RowConsole(show))
                if found is None:
                    return True
                after = len(waiting) - number - 1
                left = (time.monotonic() - begun) / (number + 1) * after
                self.console.note(f"{title}: {_brief(found)}" + (f"; {format_seconds(left)} left." if after else "."))
        return False

    def _row(self, row: Row, console: Console) -> dict[str, Any] | None:
        """Train, sample and score; None where the training was interrupted."""
        config = row.setting.apply(self.config, row.seed)
        result = train_run(
            console,
            config,
            self.tokens,
            self.checkpoint,
            row.directory,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            resume=True,
            validation=self.validation,
        )
        if result.interrupted:
            return None
        pipeline = Pipeline.from_pretrained(
            row.directory, device=self.device, dtype=self.dtype, attention=self.attention
        )
        count = self.num * pipeline.transformer.no_class
        images = SampledImages(row.setting.name, pipeline, count, seed=row.seed)
        begun = time.monotonic()
        scores = self.judge.score(images, row.directory / "samples.png")
        validation = next(
            line for line in reversed(read_metrics(row.directory / "metrics.jsonl")) if "val_loss" in line
        )
        found = plain(
            {
                "setting": row.setting.name,
                "scale_prefixes": row.setting.scale_prefixes,
                "windows": list(row.setting.windows),
                "seed": row.seed,
                "steps": result.steps,
                "skipped": result.skipped,
                "training_seconds": result.seconds,
                "scoring_seconds": time.monotonic() - begun,
                "loss": result.loss,
                "validation_loss": validation["val_loss"],
                "validation_scale_loss": validation["val_scale_loss"],
                "validation_scale_accuracy": validation["val_scale_accuracy"],
                **self._planned(config),
                "num_samples": count,
                "scores": scores,
                "model": str(row.directory.relative_to(self.out)),
            }
        )
        write_json(row.directory / ROW, found)
        _tidy(row)
        # The next row must not start beside what is left of this one.
        del pipeline, images, scores
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return dict(found)

    def _planned(self, config: RunConfig) -> dict[str, Any]:
        cost = cost_of(config, batch_size=1, dtype=self.dtype, guided=config.sampling.guided, device=self.device)
        return {
            "parameters": cost.parameters,
            "attention_gmacs": cost.attention_gmacs,
            "total_gmacs": cost.total_gmacs,
            "kv_cache_bytes": cost.kv_cache_bytes,
        }

    def measure(self, settings: Sequence[Setting], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Time and memory of sampling, by setting's name: medians over rounds, each in a fresh process.

        Args:
            settings: What to measure.
            rows: A finished row of each, whose weights are taken.

        A round measures every setting once; a measurement that is there already is not repeated.
        """
        work = [(row, "sample", f"round-{number}") for number in range(ROUNDS) for row in rows]
        work += [(row, "sample-memory", "allocated") for row in rows]
        with self.console.progress("measuring", "measurements") as progress:
            progress(0, len(work))
            for done, (row, what, name) in enumerate(work, start=1):
                self._measurement(row, what, name)
                progress(done, len(work), row.setting.name)
        return {setting.name: self._costs(setting) for setting in settings}

    def _measurement(self, row: Row, what: str, name: str) -> None:
        path = self._cost_file(row.setting, name)
        if path.is_file():
            return
        request = Request(
            what=what,
            config=row.setting.apply(self.config, row.seed),
            checkpoint=row.directory,
            batch_size=self.bench_batch,
            repeats=REPEATS,
            machine=Machine(device=self.device, dtype=self.dtype, attention=self.attention),
            seed=row.seed,
            breakdown=False,
        )
        write_json(path, plain(measure_alone(request)))

    def _costs(self, setting: Setting) -> dict[str, Any]:
        rounds = [read_json(self._cost_file(setting, f"round-{number}")) for number in range(ROUNDS)]
        allocated = read_json(self._cost_file(setting, "allocated"))
        measured = [found for found in rounds if found.get("seconds") is not None]
        reason = next((found["reason"] for found in [*rounds, allocated] if "reason" in found), None)
        each = [found["seconds"] / self.bench_batch for found in measured]
        return {
            "batch_size": self.bench_batch,
            "seconds_per_image": statistics.median(each) if each else None,
            "rounds": each,
            "peak_memory_bytes": statistics.median(found["peak_memory_bytes"] for found in measured) if each else None,
            "measured_kv_cache_bytes": measured[0]["kv_cache_bytes"] if each else None,
            "allocated_bytes": allocated.get("measured_bytes"),
            "weight_bytes": allocated.get("weight_bytes"),
            "memory_is": measured[0]["memory_is"] if each else None,
            "reason": reason,
        }

    def _cost_file(self, setting: Setting, name: str) -> Path:
        return self.out / "costs" / setting.name / f"{name}.json"


class _RowConsole(Console):
    """What the training of a row reports: its steps become those of the whole, its tables are left out."""

    def __init__(self, show: Callable[[int, int, str, str], None]):
        super().__init__(as_json=True)
        self._show = show

    def note(self, text: str) -> None:
        """Nothing: there is a line for each row."""

    @contextmanager
    def progress(self, title: str, unit: str = "images") -> Iterator[Progress]:
        """Steps of this row, shown as steps of all rows."""
        yield Progress(title, unit, self._show)


def _steps_of_all(progress: Progress, before: int, total: int, title: str) -> Callable[[int, int, str, str], None]:
    """Show a row's steps on the progress over all rows."""

    def show(done: int, steps: int, rate: str, note: str) -> None:
        progress(before + done, total, title)

    return show


def _brief(found: dict[str, Any]) -> str:
    fid = found["scores"].get("fid")
    loss = f"validation loss {format_number(found['validation_loss'])}"
    quality = f"{loss}, FID {format_number(fid)}" if fid is not None else loss
    return f"{quality}, {format_seconds(found['training_seconds'] + found['scoring_seconds'])}"


def _tidy(row: Row) -> None:
    """A finished row keeps its model, not the state from which its training would go on."""
    remove_checkpoints(row.directory)
    shutil.rmtree(row.directory / "checkpoints", ignore_errors=True)
