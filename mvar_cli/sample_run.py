"""How samples come to be: shards of them drawn in one process or several, put together, and reported."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from mvar_cli.drawing import Draw, Progressing, agreed, draw_shards, termination_interrupts
from mvar_cli.launch import leave
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_cli.outputs import is_published, outputs_of, publish, put_together, require_free
from mvar_cli.parts import MANIFEST, Parts, Request, parts_directory
from mvar_cli.processes import Processes
from mvar_cli.sample_request import Place
from mvar_core.errors import DataError
from mvar_core.runtime import peak_memory_bytes
from mvar_core.sampling.budget import IMAGES_AT_ONCE
from mvar_core.sampling.writers import WriterPool


def check_place(team: Processes, place: Place) -> None:
    """Refuse an output that is there before anything slow; one that is on its way is looked at when more is known."""

    def check() -> None:
        if not parts_directory(place.target).is_dir():
            require_free(place.target, place.out, place.output_format, place.overwrite)

    agreed(team, check)


def check_parts(team: Processes, place: Place, request: Request) -> tuple[Parts, set[int]]:
    """The shards' directory, and which of them are there; refuses what does not fit together."""
    parts = Parts(place.target, request)

    def check() -> set[int]:
        parts.require_same(place.overwrite)
        same = not parts.difference()
        if same and is_published(parts):
            return set(request.shards)
        require_free(place.target, place.out, place.output_format, place.overwrite)
        kept = parts.intact() if same else set()
        parts.require_space(parts.samples_in(kept))
        return kept

    return parts, agreed(team, check)


def make(
    console: Console,
    team: Processes,
    parts: Parts,
    draw: Draw | None,
    place: Place,
    device: torch.device,
    batch_size: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Draw what is missing, put it together, and report.

    Args:
        console: Where to.
        team: The processes that share the work.
        parts: From `check_parts`.
        draw: How samples are drawn; None where all are there.
        place: Where the output goes.
        device: Where samples are drawn.
        batch_size: As asked for.
        facts: Further keys of the JSON object.
    """
    request = parts.request
    begun = time.monotonic()
    drawn = 0
    drawing_seconds = 0.0
    try:
        with termination_interrupts():
            if draw is not None:
                drawn = _draw(console, team, parts, draw)
                drawing_seconds = time.monotonic() - begun
            if team.first:
                with console.progress("putting together") as progress:
                    if is_published(parts):
                        publish(parts)
                    else:
                        put_together(parts, place.overwrite, progress)
    except KeyboardInterrupt:
        done = parts.samples_in(parts.present())
        if team.first:
            _report_interruption(console, parts, done, time.monotonic() - begun)
        if team.count == 1:  # else another process may be about to finish a shard
            parts.remove_if_empty()
        raise leave(130) from None
    except BaseException:
        parts.remove_if_empty()
        raise
    if team.first:
        batch = min(batch_size or IMAGES_AT_ONCE, request.total)
        seconds = time.monotonic() - begun
        _report(console, team, parts, device, batch, drawn, drawing_seconds, seconds, facts or {})


def _draw(console: Console, team: Processes, parts: Parts, draw: Draw) -> int:
    """Draw this process's part of the missing shards; returns how many samples all processes have drawn."""
    request = parts.request

    def start() -> set[int]:
        parts.start()
        kept = parts.intact()
        for shard in parts.present() - kept:
            parts.shard_path(shard).unlink()
        return kept

    kept = agreed(team, start)
    if not (parts.directory / MANIFEST).is_file():
        raise DataError(
            f"Process {team.rank} does not see {parts.directory}, which the first process has made.",
            "Choose an --out on a file system that all machines share.",
        )
    missing = [shard for shard in request.shards if shard not in kept]
    own = missing[team.rank :: team.count]
    if kept:
        console.note(f"Going on: {parts.samples_in(kept)} of {request.total} images are there already.")
    with console.progress("sampling") as progress:
        progressing = Progressing(parts, kept, own, progress)
        draw_shards(parts, own, draw, progressing, WriterPool(processes=team.count))
        if team.first:
            progressing.wait_for_others()
    return request.total - parts.samples_in(kept)


def _report_interruption(console: Console, parts: Parts, done: int, seconds: float) -> None:
    total = parts.request.total
    if done:
        console.note(f"Interrupted; {done} of {total} images are kept. The same command goes on from here.")
    else:
        console.note("Interrupted before the first image was finished.")
    console.finish({"images": done, "total": total, "interrupted": True, "seconds": seconds, "outputs": []})


def _report(
    console: Console,
    team: Processes,
    parts: Parts,
    device: torch.device,
    batch: int,
    drawn: int,
    drawing_seconds: float,
    seconds: float,
    facts: Mapping[str, Any],
) -> None:
    request = parts.request
    memory = peak_memory_bytes(device)
    speed = drawn / drawing_seconds if drawn else None
    settings = request.settings
    row: dict[str, Any] = {
        "images": request.total,
        "time": format_seconds(seconds),
        "images/s": speed,
        "batch": batch,
        "peak memory": format_bytes(memory),
        "device": str(device),
        "cfg": settings["cfg"],
        "top-k": settings["top_k"],
        "top-p": settings["top_p"],
    }
    if drawn < request.total:
        row["drawn before"] = request.total - drawn
    if team.count > 1:
        row["processes"] = team.count
    console.table(request.model, tuple(row), [tuple(row.values())])
    console.say(f"Written: {parts.target}")
    console.finish(
        {
            "images": request.total,
            "resumed": request.total - drawn,
            "seconds": seconds,
            "images_per_second": speed,
            "peak_memory_bytes": memory,
            "outputs": outputs_of(parts),
            "batch_size": batch,
            "processes": team.count,
            "device": str(device),
            "settings": settings,
            **facts,
        }
    )
