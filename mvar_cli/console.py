"""What a command prints: results on stdout, everything else on stderr; one JSON object where it is asked for."""

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from mvar_core.errors import MvarError
from mvar_core.formatting import format_bytes as format_bytes
from mvar_core.formatting import format_count as format_count
from mvar_core.formatting import format_number as format_number
from mvar_core.formatting import format_seconds as format_seconds
from mvar_core.results import plain
from mvar_core.untrusted import write_yaml

if TYPE_CHECKING:
    from mvar_core.analysis.cost import Plan
    from mvar_core.results import DryRun

SECONDS_BETWEEN_PLAIN_LINES = 30.0
WIDTH_WITHOUT_TERMINAL = 140


class Output:
    """How this process prints: with `as_json` one JSON object, without tables and lines. There is one, `output`."""

    def __init__(self) -> None:
        self.as_json, self.stage, self.last_line = False, "", 0.0
        self.bar: bars.Progress | None = None
        self.task, self.began = bars.TaskID(0), (0.0, 0)

    @property
    def silent(self) -> bool:
        """Whether another process of this job prints."""
        return os.environ.get("RANK", "0") != "0"


output = Output()


class StderrHandler(logging.Handler):
    """Log records as plain lines on whatever stderr is at the time: a progress bar may have replaced it.

    What a command has said once, as of a folder that it opens again, it does not say again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{level}{record.getMessage()}"
        if text not in self.said:
            self.said.add(text)
            write(text, sys.stderr)


def log_to_stderr() -> None:
    """Show what the library logs from now on."""
    logger = logging.getLogger("mvar")
    others = [handler for handler in logger.handlers if not isinstance(handler, StderrHandler)]
    logger.handlers[:] = [*others, StderrHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def write(text: str, stream: TextIO) -> None:
    """Print lines; where the reader has gone, as in `mvar plan | head -1`, drop them and let the work finish.

    MvarError where the stream cannot be written for another reason, such as a full disk.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno not in (errno.EPIPE, errno.EIO) and stream is sys.stdout:
            raise MvarError(
                f"stdout cannot be written: {error.strerror}.", "The command's own files, named by --out, are complete."
            ) from None


def say(text: str = "") -> None:
    """A line of the result, on stdout."""
    if not output.as_json and not output.silent:
        write(text, sys.stdout)


def note(text: str) -> None:
    """A line for the person watching, on stderr."""
    if not output.silent:
        write(text, sys.stderr)


def show_json(values: Mapping[str, Any]) -> None:
    """The one JSON object on stdout, where it is asked for."""
    if output.as_json and not output.silent:
        write(json.dumps(values, allow_nan=False), sys.stdout)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of results on stdout; numbers are aligned right."""
    if output.as_json or output.silent:
        return
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_WITHOUT_TERMINAL
    grid = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        numbers = all(isinstance(row[position], (int, float, type(None))) for row in rows)
        grid.add_column(column, justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(format_cell(value) for value in row))
    with console.capture() as printed:
        console.print(grid, markup=False)
    write(printed.get().removesuffix("\n"), sys.stdout)


def show(
    result: Any, columns: Sequence[str] = (), *, title: str = "", headings: Mapping[str, str] | None = None
) -> None:
    """End of a command: its result as one JSON object, or the fields `columns`, where not None, as a table of one row.

    Interrupted work exits with 130.
    """
    end_progress()
    values = result.to_dict()
    if output.as_json:
        show_json(values)
    elif getattr(result, "dry_run", None) is not None:
        show_dry_run(result.dry_run)
    else:
        shown = [name for name in columns if values.get(name) is not None]
        if shown:
            plain_names = {name: name.removesuffix("_bytes").replace("_", " ") for name in shown}
            names = plain_names | {"images_per_second": "images/s"} | dict(headings or {})
            table(title, [names[name] for name in shown], [[format_field(name, values[name]) for name in shown]])
    if values.get("interrupted"):
        note("Interrupted; what was finished is saved. The same command resumes from here.")
        raise typer.Exit(130)


def show_dry_run(planned: "DryRun") -> None:
    """What a command would do: configuration, cost and steps."""
    if values := plain(planned.configuration):
        say(write_yaml(values).rstrip())
    if planned.cost is not None:
        show_cost(planned.cost)
    for number, step in enumerate(planned.steps, 1):
        say(f"{number}. {step}")
    say("Nothing was done (--dry-run).")


def show_cost(cost: "Plan") -> None:
    """The predicted cost of a model: totals, operations, one row per scale, and how sampling divides the memory."""
    table(cost.name, ("what", "how much"), _totals(cost))
    operations = [(name, gmacs, 100 * gmacs / cost.total_gmacs) for name, gmacs in cost.parts_gmacs.items() if gmacs]
    table("where the operations are, one image, no guidance", ("operation", "GMACs", "%"), operations)
    scales = [
        {
            "side": side_name(scale["side"]),
            "tokens": scale["tokens"],
            "window": str(scale["window"] or "whole"),
            "keys per query": scale["keys_per_query"],
            "attention GMACs": scale["attention_gmacs"],
            "total GMACs": scale["total_gmacs"],
            "KV cache kept": format_bytes(scale["kv_cache_bytes"]),
            "micro-batch": scale["micro_batch"],
            "its memory": format_bytes(scale["activation_bytes"]),
        }
        for scale in cost.scales
    ]
    table("scales", [*scales[0]], [[*scale.values()] for scale in scales])
    together = f"{cost.images_together} image" + ("s" if cost.images_together > 1 else "")
    budget = f" in {format_bytes(cost.memory)}" if cost.memory is not None else ""
    say(
        f"Sampling: {together} from scale to scale together{budget}, at each scale a micro-batch at a time;"
        f" {cost.decoder_images} decoded at a time."
    )
    if cost.largest_batch:
        say(
            "What an image keeps from scale to scale limits the batch of sampling; a scale itself uses the memory that"
            " it is given."
        )


def side_name(side: int | Sequence[int]) -> str:
    """What tables call a scale's size: 16, or 16×24."""
    return str(side) if isinstance(side, int) else "×".join(map(str, side))


def _totals(cost: "Plan") -> list[tuple[str, str]]:
    batch = f"batch {cost.batch_size}" + (", guided" if cost.guided else "")
    rows = [
        ("parameters, transformer", format_count(cost.parameters)),
        ("parameters, tokenizer", format_count(cost.tokenizer_parameters)),
        ("tokens per image", f"{cost.tokens:,}"),
        ("attention, one image, no guidance", f"{cost.attention_gmacs:,.4g} GMACs"),
        ("everything, one image, no guidance", f"{cost.total_gmacs:,.4g} GMACs"),
        ("everything, one image, guided", f"{cost.guided_gmacs:,.4g} GMACs"),
        (f"KV cache, {batch}", format_bytes(cost.kv_cache_bytes)),
        (f"weights for sampling, {8 * cost.dtype_bytes} bit", format_bytes(cost.weight_bytes)),
        (f"peak memory of sampling, {batch}, {cost.device}", format_bytes(cost.sample_peak_bytes)),
        ("each further image of the batch keeps", format_bytes(cost.image_bytes)),
    ]
    if cost.train_peak_bytes is not None:
        rows.append((f"peak memory of training, batch {cost.train_batch_size}", format_bytes(cost.train_peak_bytes)))
    for what, largest in (("sampling", cost.largest_batch), ("training", cost.largest_train_batch)):
        if largest is not None:
            rows.append((f"largest batch of {what} in {format_bytes(cost.device_memory)}", f"{largest:,}"))
    return rows


def progress(stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
    """A progress bar on stderr, one stage at a time; without a terminal, a line now and then."""
    if output.silent:
        return
    now = time.monotonic()
    if stage != output.stage:
        end_progress()
        # The first report starts the clock, so that loading and a resumed part do not count as speed.
        output.stage, output.began, output.last_line = stage, (now, done), now
        console = Console(stderr=True)
        if console.is_terminal:
            columns = "{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), "{task.fields[rate]}"
            remaining = bars.TimeRemainingColumn()
            output.bar = bars.Progress(*columns, remaining, "{task.fields[note]}", console=console, transient=True)
            output.bar.start()
            output.task = output.bar.add_task(stage, total=total, rate="", note="")
    began, first = output.began
    speed = (done - first) / (now - began) if now > began else 0.0
    rate = f"{speed:.3g} {unit}/s" if speed else ""
    if output.bar is not None:
        output.bar.update(output.task, completed=done, total=total, rate=rate, note=note)
    elif now - output.last_line >= SECONDS_BETWEEN_PLAIN_LINES:
        output.last_line = now
        left = f", {format_seconds((total - done) / speed)} left" if speed else ""
        write(f"{stage}: {done}/{total} {rate}{left} {note}".rstrip(), sys.stderr)


def end_progress() -> None:
    """Remove the progress bar."""
    if output.bar is not None:
        output.bar.stop()
    output.bar, output.stage = None, ""


def format_field(name: str, value: Any) -> Any:
    """A field's value as a table shows it: by its unit, which the name ends with."""
    if name.endswith("seconds"):
        return format_seconds(value)
    if name.endswith("bytes"):
        return format_bytes(value)
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
