"""Results on stdout, everything else on stderr; one JSON object where it is asked for."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_PLAIN_LINES = 30.0
WIDTH_WITHOUT_TERMINAL = 140


class StderrHandler(logging.Handler):
    """Log records as plain lines on whatever stderr is at the time: a progress bar may have taken it over."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr)


def log_to_stderr() -> None:
    """Show what the core logs; calling it again changes nothing."""
    logger = logging.getLogger("mvar")
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
        logger.propagate = False
    logger.setLevel(logging.INFO)


class Console:
    """What a command prints.

    Args:
        as_json: Tables and lines are left out and `finish` prints one JSON object.
    """

    def __init__(self, as_json: bool = False):
        self.as_json = as_json

    def say(self, text: str = "") -> None:
        """A line of the result, on stdout."""
        if not self.as_json:
            print(text)

    def note(self, text: str) -> None:
        """A line for the person watching, on stderr."""
        print(text, file=sys.stderr)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of results on stdout; numbers stand to the right."""
        if self.as_json:
            return
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table

        rich_console = RichConsole()
        if not rich_console.is_terminal:
            rich_console.width = WIDTH_WITHOUT_TERMINAL
        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for position, column in enumerate(columns):
            numbers = all(isinstance(row[position], (int, float, type(None))) for row in rows)
            table.add_column(column, justify="right" if numbers and rows else "left", overflow="fold")
        for row in rows:
            table.add_row(*(format_cell(value) for value in row))
        rich_console.print(table, markup=False)

    def finish(self, result: Mapping[str, Any]) -> None:
        """End of the command: the JSON object, where it was asked for."""
        if self.as_json:
            print(json.dumps(plain(result), ensure_ascii=False, allow_nan=False))

    @contextmanager
    def progress(self, title: str, unit: str = "images") -> Iterator[Progress]:
        """A progress bar on stderr for as long as the block runs; without a terminal, a line now and then."""
        from rich import progress as bars
        from rich.console import Console as RichConsole

        rich_console = RichConsole(stderr=True)
        if not rich_console.is_terminal:
            yield Progress(title, unit, None)
            return
        with bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=rich_console,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=None, rate="", note="")

            def show(done: int, total: int, rate: str, note: str) -> None:
                bar.update(task, completed=done, total=total, rate=rate, note=note)

            yield Progress(title, unit, show)


class Progress:
    """Counts work and shows how fast it goes; call it with (done, total) and, where there is one, a note."""

    def __init__(self, title: str, unit: str, show: Callable[[int, int, str, str], None] | None):
        self.title = title
        self.unit = unit
        self._show = show
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units are finished."""
        now = time.monotonic()
        if self._start is None:
            # The first report starts the clock, so that loading and a resumed part do not count as speed.
            self._start = (now, done)
        began, first = self._start
        speed = (done - first) / (now - began) if now > began else 0.0
        rate = f"{speed:.3g} {self.unit}/s" if speed else ""
        if self._show is not None:
            self._show(done, total, rate, note)
        elif now - self._last_line >= SECONDS_BETWEEN_PLAIN_LINES:
            self._last_line = now
            left = f", {format_seconds((total - done) / speed)} left" if speed else ""
            print(f"{self.title}: {done}/{total} {rate}{left} {note}".rstrip(), file=sys.stderr)


def plain(value: Any) -> Any:
    """A value as JSON knows it: numbers that are not finite become null, paths and arrays become text and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def format_cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return format_number(value)
    return str(value)


def format_number(value: float) -> str:
    """Four significant figures, without an exponent where one can do without."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(decimals, 6)}f}"
    return f"{value:.3e}"


def format_bytes(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "–"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A duration that a person can read."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_count(count: float) -> str:
    """A large count in thousands, millions or billions, as papers print parameters."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
