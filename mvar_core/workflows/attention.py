"""Where a model's attention goes, measured on tokens, images or its own samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from mvar_core.analysis.attention import AttentionReport, measure_attention
from mvar_core.analysis.cost import cost_of
from mvar_core.analysis.findings import find
from mvar_core.analysis.recommendation import check_keep, preset_values, savings
from mvar_core.config import Machine
from mvar_core.config.presets import load_config, read_preset
from mvar_core.data.images import ImageRows, ImageSource, open_images
from mvar_core.data.tokens import MANIFEST, TokenCache
from mvar_core.errors import ConfigError, DataError, one_line
from mvar_core.io.files import fingerprint, remove_leftovers, require_new_directory, write_json, write_text
from mvar_core.io.resumable import DirectoryLock, Resumable
from mvar_core.models import official
from mvar_core.models.directory import read_model_config
from mvar_core.models.micro_batches import TOKENS_AT_ONCE
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress, silent
from mvar_core.reports import attention as page
from mvar_core.reports.pages import TableRows
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes, resolve_device
from mvar_core.sampling.conditions import without_conditions
from mvar_core.sampling.sampler import sample_tokens
from mvar_core.untrusted import read_json, write_yaml

PAGE, REPORT = "report.html", "report.json"
Batch = Callable[[NDArray[np.int64]], tuple[Tensor, ...]]
"""Tokens and conditions of images, by their numbers."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class AttentionResult(Result):
    """Attention statistics, averaged over images, layers and heads unless stated otherwise.

    Mass is attention probability. Names that start with `even` are of attention that is spread evenly over all that a
    token sees.

    Attributes:
        scale_mass: Mass by query scale and key scale, S×S; rows sum to 1.
        window_mass: For each k, the mass within k×k of the query in its own scale, per scale.
        window_share: The same as a fraction of the mass in the own scale.
        window_mass_by_scale: For each k, the mass within k×k of the matching position, by query and key scale.
        last_scale: Maps of the last scale's attention, by position (`keys`) and by displacement (`displacements`).
        layers: Mass in the own scale and in the scale before, entropy and distance, by layer and head.
        recommended: Smallest `scale_prefixes` and `windows` that keep the requested fraction, and what they keep.
        notes: What is zero by construction.
        reading: What the statistics say about the papers' observations, also as `sentences`.
        sentences: What to tell a reader: findings, notes, recommendation.
    """

    model: str
    source: str
    patch_sizes: list[Any] = field(default_factory=list)
    scale_prefixes: Any = "all"
    model_windows: list[int] = field(default_factory=list)
    num_images: int = 0
    scale_mass: list[list[float]] = field(default_factory=list)
    even_scale_mass: list[list[float]] = field(default_factory=list)
    window_mass: dict[str, list[float]] = field(default_factory=dict)
    window_share: dict[str, list[float]] = field(default_factory=dict)
    window_mass_by_scale: dict[str, list[list[float]]] = field(default_factory=dict)
    even_window_mass_by_scale: dict[str, list[list[float]]] = field(default_factory=dict)
    last_scale: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    recommended: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reading: Mapping[str, Any] = field(default_factory=dict)
    savings: Mapping[str, Any] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)
    plots_svg: Mapping[str, str] = field(default_factory=dict)
    report: str
    preset: str | None = None
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    sentences: list[str] = field(default_factory=list, metadata={"hidden": True})
    tables: Mapping[str, TableRows] = field(default_factory=dict, metadata={"hidden": True})


def analyze_attention(
    checkpoint: Path | str,
    out: Path | str,
    *,
    tokens: Path | str | None = None,
    data: str | Path | None = None,
    num: int = 256,
    keep: float = 0.95,
    write_preset: Path | str | None = None,
    tokenizer: Path | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> AttentionResult:
    """Measure a model's attention per scale and neighbourhood, and which prefixes and windows keep most of it.

    Writes report.html, report.json, and the figures as PNG and SVG; where they are finished, the same call reads them.

        found = mvar.analyze_attention("runs/mvar", "attention", data="digits:test")
        print(found.recommended["scale_prefixes"], found.recommended["windows"])

    Measured on `num` images of a token cache, `tokens`, or of `data`, chosen by the seed; without either, on the
    model's own samples with that seed. The recommended settings keep the fraction `keep` of the attention;
    `write_preset` is where to write the model that has them as a preset (.yaml), which trains as the run in
    `checkpoint` did, if it is a run. Where that is a .pth file, `tokenizer` is its published tokenizer.

    `batch_size` is how many images go through in one pass; `overwrite` also replaces the preset. `progress` is called
    with the images sampled, and then with the layers measured.

    Raises:
        ConfigError: Arguments that contradict each other, or a run whose settings cannot be read.
        DataError: `out` is not empty, or the data do not fit the model.
        CheckpointError: Nothing there that can be loaded.
    """
    start = time.monotonic()
    checkpoint, out = Path(checkpoint), Path(out)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    preset = None if write_preset is None else Path(write_preset)
    if tokens is not None and data is not None:
        raise ConfigError(
            "Attention is measured on tokens or on images.",
            "Use --tokens or --data, or neither for the model's own samples.",
        )
    check_keep(keep)
    for name, value in (("num", num), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1.", f"Leave out --{name}, or use a larger number.")
    if preset is not None and preset.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--write-preset {preset} does not end in .yaml.", "Presets are YAML files.")
    files = [checkpoint, checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors")), tokenizer]
    files += [None if tokens is None else Path(tokens) / MANIFEST]
    record = {
        "inputs": fingerprint(path for path in files if path is not None and path.is_file()),
        "tokens": tokens,
        "data": data,
        "num": num,
        "keep": keep,
        "seed": seed,
        "device": machine.device,
        "dtype": machine.dtype,
        "attention": machine.attention,
        "write_preset": preset,
    }
    job = Resumable(out, record, 1, piece_name=REPORT)
    if overwrite or not job.begun:
        require_new_directory(out, overwrite)
        if preset is not None and preset.exists() and not overwrite:
            raise ConfigError(f"{preset} exists.", "Choose another name, or add --overwrite to replace it.")
    elif difference := job.difference():
        raise DataError(
            f"{out} holds a report that was made with other settings: {difference}.",
            "Choose another --out, or add --overwrite to replace it.",
        )
    if dry_run:
        if checkpoint.is_file():
            config = official.open_official(checkpoint, tokenizer or official.tokenizer_next_to(checkpoint)).config
        else:
            config = read_model_config(checkpoint)
        source = str(tokens or data or "its own samples")
        steps = [f"measure attention on {num} images of {source}", f"write report and figures to {out}"]
        steps += [] if preset is None else [f"write the recommended preset to {preset}"]
        configuration = config.model_dump(mode="json", exclude_none=True)
        planned = DryRun(configuration=configuration, steps=tuple(steps), cost=cost_of(config), facts={})
        return AttentionResult(model=config.name, source=source, report=str(out / PAGE), dry_run=planned)
    with DirectoryLock(out):
        if job.done() and not overwrite:
            logger.info("%s is finished: nothing is left to do.", out)
            values = read_json(job.piece(0), finite=False)
        else:
            run = checkpoint / "config.yaml"
            training = read_preset(str(run)) if preset is not None and run.is_file() else None
            if training is not None:
                load_config(None, base=training)
            pipeline = Pipeline.from_pretrained(
                checkpoint, tokenizer=tokenizer, device=machine.device, dtype=machine.dtype, attention=machine.attention
            )
            if tokens is not None:
                cache = TokenCache.open(Path(tokens))
                cache.check(official.tokenizer_hash_of(checkpoint, tokenizer), pipeline.config.pyramid)
                source, count = f"{tokens} ({cache.manifest.source})", len(cache)
                if pipeline.config.conditioning.dim is None:
                    cache.labels = _model_labels(pipeline, cache)
                batch: Batch = cache.conditioned(pipeline.config.conditioning).batch
            elif data is not None:
                opened = open_images(str(data), max_pixels=machine.max_pixels)
                opened.labels = _model_labels(pipeline, opened)
                images = ImageRows(opened, pipeline.config.image_shape)
                source, count, batch = f"images of {data}", len(images), partial(_encode, pipeline, images)
            else:
                logger.info("No --tokens and no --data: the model's own samples are measured.")
                samples = _own_samples(pipeline, num, seed, progress or silent)
                source, count, batch = f"the model's own samples (seed {seed})", num, samples.__getitem__
            if tokens is None and without_conditions(pipeline.config):
                source += ", without a condition: the vectors of the classes are not known"
            chosen = np.sort(np.random.default_rng(seed).permutation(count)[:num])
            report = _measured(pipeline, chosen, batch, batch_size, keep, progress or silent)
            remove_leftovers(out)
            job.piece(0).unlink(missing_ok=True)
            write_json(job.record_path, job.record)
            if preset is not None:
                _write_preset(preset, preset_values(pipeline.config, report.recommended, training))
            values = _write_report(out, pipeline, source, report, preset)
    try:
        return AttentionResult(
            **values,
            seconds=time.monotonic() - start,
            peak_memory_bytes=peak_memory_bytes(resolve_device(machine.device)),
            sentences=[*values["reading"]["sentences"], *values["notes"], page.recommendation_sentence(values)],
            tables={"scales": page.scale_rows(values), "savings": page.saving_rows(values["savings"])},
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:  # a file that somebody has changed
        raise DataError(f"{job.piece(0)} is damaged: {one_line(error)}.", "Add --overwrite to measure again.") from None


def _measured(
    pipeline: Pipeline, chosen: NDArray[np.int64], batch: Batch, batch_size: int | None, keep: float, progress: Progress
) -> AttentionReport:
    """The model's attention on the chosen images."""
    num, depth = len(chosen), len(pipeline.transformer.blocks)
    rows = TOKENS_AT_ONCE.get(pipeline.device.type, 2048) // pipeline.config.pyramid.num_tokens
    at_once = batch_size or max(1, rows)  # enough rows for fast products, and no more

    def layers_done(done: int) -> None:
        progress("attention", done, num * depth, unit="layers", note=f"image {done // depth} of {num}")

    return measure_attention(
        pipeline.transformer,
        pipeline.quantizer,
        (batch(chosen[first : first + at_once]) for first in range(0, num, at_once)),
        pipeline.config,
        keep=keep,
        attention=pipeline.attention,
        progress=layers_done,
    )


def _write_preset(path: Path, values: dict[str, Any]) -> None:
    load_config(None, base=values)  # raises where the recommended attention and the run's settings do not fit together
    head = f"# mvar train --preset {path.name} …, or mvar finetune-from-var --preset {path.name} …\n"
    write_text(path, head + write_yaml(values))


def _write_report(
    out: Path, pipeline: Pipeline, source: str, report: AttentionReport, preset: Path | None
) -> dict[str, Any]:
    """Write the figures, the page and report.json, whose content is returned."""
    plots = page.plot_attention_report(report, out)
    dtype_bytes = pipeline.transformer.input_projection.weight.element_size()
    values = {
        "model": pipeline.config.name,
        "source": source,
        **report.to_dict(),
        "reading": find(report),
        "savings": savings(pipeline.config, report.recommended, dtype_bytes=dtype_bytes, device=pipeline.device.type),
        "plots": {name: str(path) for name, path in plots.items()},
        "plots_svg": {name: str(path.with_suffix(".svg")) for name, path in plots.items()},
        "report": str(out / PAGE),
        "preset": None if preset is None else str(preset),
    }
    page.write_attention_page(out / PAGE, values)
    write_json(out / REPORT, values)
    return values


def _encode(pipeline: Pipeline, images: ImageRows, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Tokens and conditions of some images."""
    pixels, labels = images.batch(rows)
    return pipeline.encode_apart(pixels), pipeline.conditions_of(labels.tolist())


def _model_labels(pipeline: Pipeline, images: TokenCache | ImageSource) -> NDArray[np.int64]:
    """Labels in the model's numbering; images of a class that it does not have are measured under none."""
    positions, by = images.classes.match(pipeline.classes)
    source, lacking, null_label = images.classes.origin, positions.count(None), pipeline.classes.count
    if by == "order":
        logger.warning("%s: classes are matched with the model's by number, since one side has no names.", source)
    elif lacking:
        logger.info("%s: %d of %d classes are not the model's: under no class.", source, lacking, len(positions))
    return np.array([null_label if there is None else there for there in positions])[images.labels]


def _own_samples(pipeline: Pipeline, num: int, seed: int, progress: Progress) -> TensorDataset:
    """Tokens and conditions of the model's own samples, its classes evenly spread, with its recommended settings.

    Sample i is what `Pipeline.sample` generates with this seed, number and class.
    """
    transformer = pipeline.transformer
    conditions = pipeline.conditions_of(spread_classes(num, transformer.config.num_classes))
    settings = pipeline.sampling_settings()
    sizes = pipeline.micro_batches(num, settings)
    parts = []
    for start in range(0, num, sizes.images):
        progress("sampling", start, num)
        indices = range(start, min(start + sizes.images, num))
        samples = sample_tokens(
            transformer, pipeline.quantizer, conditions[start : indices.stop], indices, seed, settings,
            micro_batches=sizes.scales, attention=pipeline.attention,
        )  # fmt: skip
        parts.append(samples.tokens_NL)
    progress("sampling", num, num)
    return TensorDataset(torch.cat(parts), conditions)


def spread_classes(num: int, classes: int) -> list[int]:
    """`num` ascending labels: every class equally often, give or take one, or evenly spread where there are more."""
    return [index * classes // num for index in range(num)]
