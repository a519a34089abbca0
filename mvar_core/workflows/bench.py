"""VAR against MVAR, measured in one run: sampling, a training step, or attention alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.analysis.attention_sweep import sweep
from mvar_core.analysis.cost import MAX_BATCH
from mvar_core.config import AttentionConfig, Machine, RunConfig, SamplingConfig
from mvar_core.config.section import validate
from mvar_core.errors import BackendError, ConfigError, nearest
from mvar_core.kernels import available_backends, check_backend
from mvar_core.progress import Progress, silent
from mvar_core.pyramid import PatchSize, read_sizes, spread_window
from mvar_core.reports.figures import plot_attention, plot_batches
from mvar_core.results import Result
from mvar_core.runtime import describe_machine, resolve_device, resolve_dtype
from mvar_core.sampling.sampler import resolve_settings
from mvar_core.workflows.bench_row import Request, measure_alone
from mvar_core.workflows.plan import resolve

WHAT = ("sample", "train", "attention")
LONGEST_SIDE = 1024
"""Of a scale whose attention is measured, in tokens: 16,384 pixels as tokenizers are published."""
NO_FIGURES = {"seconds": None, "images_per_second": None, "peak_memory_bytes": None, "kv_cache_bytes": None}


@dataclass(frozen=True, kw_only=True)
class BenchResult(Result):
    """What was measured, and on which machine: processor, GPU, versions, date.

    There is a row for each model and batch size, or for each side, window and backend of attention: name, batch_size,
    seconds (median), images_per_second, peak_memory_bytes, kv_cache_bytes; for models also runs, times_faster and
    memory_ratio (against `baseline`), stages (seconds by stage), and the `reason` where there are no figures; for
    attention also what `mvar_core.analysis.attention_sweep.sweep` returns.
    """

    what: str
    model: str
    rows: tuple[dict[str, Any], ...]
    machine: dict[str, Any]
    plot: Path | None


def bench(
    preset: str | None = None,
    *,
    checkpoint: Path | str | None = None,
    settings: Sequence[str] = (),
    image_size: PatchSize | str | None = None,
    what: str = "sample",
    batch_size: int | Sequence[int] = 4,
    published_style: bool = False,
    repeats: int = 3,
    breakdown: bool = True,
    sampling: SamplingConfig = SamplingConfig(),
    sides: Sequence[PatchSize] | str | None = None,
    windows: Sequence[int] = (0, 7),
    backward: bool = False,
    plot: Path | str | None = None,
    seed: int = 0,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> BenchResult:
    """Measure time, memory and throughput of a model and of its twin, each row in a process of its own.

    The twin is a VAR of the same sizes, in which every token sees all earlier scales whole; or, where the model is a
    VAR, the MVAR of its sizes. With a preset, weights are random: they change neither time nor memory.

        rows = mvar.bench("mvar-d16-256", batch_size=(1, 4), machine=mvar.Machine(dtype="bfloat16")).rows

    The model is as of `plan`. `what` is "sample", "train" (a step of all scales) or "attention" (of one layer, by every
    backend); `batch_size` is one number of images or several; medians are of `repeats` repetitions. With
    `published_style` VAR is also sampled as its published code does it, as the baseline; with `breakdown` each stage is
    measured too, in a run of its own. `sampling` is guidance and filters; what is not set is the model's.

    For attention, `sides` are sizes of the scales, also as "8,16x24", by default the model's from 8 on; `windows` are
    sides of the windows, 0 for the whole scale; `backward` adds the backward pass. `plot` is a .png or .svg file.

    Raises:
        MvarError: Something that cannot be measured, before anything is.
    """
    if what not in WHAT:
        raise ConfigError(f"--what {what!r} is not one of {', '.join(WHAT)}. {nearest(what, WHAT)}")
    plot = None if plot is None else Path(plot)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot} must end in .png or .svg.")
    batches = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
    if not batches or not all(isinstance(batch, int) and 1 <= batch <= MAX_BATCH for batch in batches):
        raise ConfigError(f"--batch-size {','.join(map(str, batches))!r}: a batch has 1 … {MAX_BATCH:,} images.")
    if repeats < 1 or not windows:
        raise ConfigError(f"--repeats {repeats}, --windows {list(windows)}: at least one of each is measured.")
    if preset is None and checkpoint is None:
        raise ConfigError(
            "There is nothing to measure.", "Give --preset NAME (`mvar plan` lists them) or --checkpoint."
        )
    config = resolve(preset, checkpoint, settings, image_size)
    if config.transformer is None:
        raise ConfigError(f"{config.name} is a tokenizer without a transformer.", "Give a model that can sample.")
    if not isinstance(config, RunConfig):
        config = validate(RunConfig, config.model_dump(), str(checkpoint))
    config = config.model_copy(update={"sampling": resolve_settings(config, sampling)})
    if what == "attention":
        rows = _attention(config, sides, windows, batches, repeats, backward, machine, progress or silent)
        if plot is not None:
            plot_attention(rows, plot)
    else:
        request = Request(
            what=what, config=config, checkpoint=checkpoint, repeats=repeats, machine=machine, seed=seed,
            breakdown=breakdown,
        )  # fmt: skip
        rows = _compare(request, batches, published_style and what == "sample", progress or silent)
        if plot is not None:
            plot_batches(rows, plot, title=f"{config.name}: {'sampling' if what == 'sample' else 'a training step'}")
    return BenchResult(what=what, model=config.name, rows=tuple(rows), machine=describe_machine(), plot=plot)


def twins(config: RunConfig) -> list[tuple[str, RunConfig]]:
    """The models to compare, by label, VAR first: same sizes, other attention."""
    var = config.model_copy(update={"attention": AttentionConfig(scale_prefixes="all")})
    if config.attention.scale_prefixes != "all":
        label = "MVAR" if config.attention.scale_prefixes == 1 else f"{config.attention.scale_prefixes} scale prefixes"
        return [("VAR", var), (label, config)]
    if any(config.windows):
        return [("VAR", var), ("VAR with windows", config)]
    windows = spread_window(7, config.windows)
    mvar = config.model_copy(update={"attention": AttentionConfig(scale_prefixes=1, windows=windows)})
    return [("VAR", config), ("MVAR", mvar)]


def _compare(
    common: Request, batches: Sequence[int], published_style: bool, progress: Progress
) -> list[dict[str, Any]]:
    """Measure every model at every batch size; each row next to the baseline's of the same batch."""
    models = [(label, config, False) for label, config in twins(common.config)]
    for _, twin, _ in models:  # refuse before the first process what every one of them would refuse
        try:
            backend, needs_grad = common.machine.attention, common.what == "train"
            check_backend(backend, twin.patterns, common.device, common.dtype, needs_grad=needs_grad)
        except BackendError as error:
            raise BackendError(f"{error.message} ({twin.name})", error.hint) from None
    if published_style:
        models.insert(0, ("VAR, published style", models[0][1], True))
    rows: list[dict[str, Any]] = []
    total, baseline = len(batches) * len(models), models[0][0]
    for batch, (label, config, published) in itertools.product(batches, models):
        progress("measuring", len(rows), total, unit="rows", note=f"{label}, batch {batch}")
        changes = {"config": config, "batch_size": batch, "published_style": published}
        found = measure_alone(common.model_copy(update=changes))
        attention = {"scale_prefixes": config.attention.scale_prefixes, "windows": list(config.windows)}
        rows.append({"name": label, "batch_size": batch, **attention, **NO_FIGURES, **found, "baseline": baseline})
    base = {row["batch_size"]: row for row in rows if row["name"] == baseline}
    for row in rows:
        other = base[row["batch_size"]]
        measured = row["seconds"] is not None and other["seconds"] is not None
        row["times_faster"] = other["seconds"] / row["seconds"] if measured else None
        row["memory_ratio"] = row["peak_memory_bytes"] / other["peak_memory_bytes"] if measured else None
    return rows


def _attention(
    config: RunConfig,
    sides: Sequence[PatchSize] | str | None,
    windows: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    backward: bool,
    machine: Machine,
    progress: Progress,
) -> list[dict[str, Any]]:
    device = resolve_device(machine.device)
    dtype = resolve_dtype(machine.dtype, device)
    assert config.transformer is not None
    for window in windows:
        if not isinstance(window, int) or not 0 <= window <= LONGEST_SIDE or (window and window % 2 == 0):
            raise ConfigError(f"--windows holds {window}; a window is odd, and 0 is the whole scale.")
    try:
        sides = read_sizes(sides or ())
    except ValueError as error:
        raise ConfigError(f"--sides {sides!r}: {error}.") from None
    for size in sides:
        if not all(1 <= side <= LONGEST_SIDE for side in ((size,) if isinstance(size, int) else size)):
            raise ConfigError(f"--sides holds {size}; a scale has sides of 1 … {LONGEST_SIDE} tokens.")
    if not sides:
        patches = config.pyramid.patch_sizes
        sides = [size for size, grid in zip(patches, config.pyramid, strict=True) if min(grid) >= 8] or [patches[-1]]
    names = [name for name, reason in available_backends(device, dtype) if reason is None and name != "reference"]
    if machine.attention != "auto":
        names = list(dict.fromkeys(["dense", machine.attention]))
    heads, head_dim = config.transformer.num_heads, config.transformer.head_dim
    total, started = len(batches) * len(sides) * len(windows), itertools.count()
    return [
        row
        for batch in batches
        for row in sweep(
            sides, windows, names, heads=heads, head_dim=head_dim, batch=batch, dtype=dtype, device=device,
            backward=backward, repeats=repeats,
            progress=lambda note: progress("measuring", next(started), total, unit="scales", note=note),
        )
    ]  # fmt: skip
