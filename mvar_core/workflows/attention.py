"""Where a model's attention goes, measured on tokens, images or its own samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from mvar_core.analysis.attention import AttentionReport, images_at_once, measure_attention
from mvar_core.analysis.cost import cost_of
from mvar_core.analysis.findings import find
from mvar_core.analysis.recommendation import check_keep, preset_values, savings
from mvar_core.config import Machine, ModelConfig
from mvar_core.config.presets import load_config, read_preset
from mvar_core.data.images import ImageRows, open_images
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import ConfigError
from mvar_core.io.files import require_new_directory, write_json, write_text
from mvar_core.models import official
from mvar_core.models.directory import read_model_config
from mvar_core.models.micro_batches import DECODED_AT_ONCE
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.reports import attention_page as page
from mvar_core.reports.attention_figures import plot_attention_report
from mvar_core.reports.pages import TableRows
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes
from mvar_core.sampling.conditions import without_conditions
from mvar_core.sampling.images import ImageSampler
from mvar_core.sampling.sampler import sample_tokens

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class AttentionResult(Result):
    """Attention statistics, averaged over images, layers and heads unless stated otherwise.

    Scales are the token maps of the pyramid, S of them; mass is attention probability.

    Attributes:
        patch_sizes: The model's scales.
        scale_prefixes: How many scales a token of the model sees.
        model_windows: The model's own windows.
        scale_mass: Mass by query scale and key scale, S×S; rows sum to 1.
        even_scale_mass: The same for attention that is spread evenly over all that a token sees.
        window_mass: For each k, the mass within k×k of the query in its own scale, per scale.
        window_share: The same as a fraction of the mass in the own scale.
        window_mass_by_scale: For each k, the mass within k×k of the matching position, by query and key scale.
        even_window_mass_by_scale: The same for an even spread.
        last_scale: Maps of the last scale's attention, by position (`keys`) and by displacement (`displacements`).
        layers: Mass in the own scale and in the scale before, entropy and distance, by layer and head.
        recommended: Smallest `scale_prefixes` and `windows` that keep the requested fraction, and what they keep.
        notes: What is zero by construction.
        reading: What the numbers say about the papers' observations, also as `sentences`.
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


@dataclass(frozen=True)
class TokenSource:
    """What is measured: its name in the report, the number of images, and tokens (B, L) with conditions."""

    name: str
    total: int
    batches: Iterator[tuple[Tensor, Any]]


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

    Writes report.html, report.json, and the figures as PNG and SVG.

        found = mvar.analyze_attention("runs/mvar", "attention", data="digits:test")
        print(found.recommended["scale_prefixes"], found.recommended["windows"])

    Args:
        checkpoint: A model directory, a run, or a published .pth file.
        out: Directory of the report.
        tokens: A token cache to measure on.
        data: Images to measure on. Without either, samples of the model itself are measured.
        num: Images.
        keep: Fraction of the attention that the recommended settings must keep.
        write_preset: Where to write the model with the recommended attention as a preset (.yaml); it trains as the run
            in `checkpoint` did, if it is a run.
        tokenizer: The published tokenizer, where `checkpoint` is a .pth file.
        batch_size: Images in one pass; by default as many as are fast.
        seed: Chooses among tokens or images, or is the samples' seed.
        overwrite: Write to a directory that is not empty, and replace the preset.
        dry_run: Only report what would be done.
        machine: Device, dtype and attention backend.
        progress: Called with the layers measured, and with the tokens sampled before.

    Raises:
        ConfigError: Arguments that contradict each other, or a run whose settings cannot be read.
        DataError: `out` is not empty, or the data do not fit the model.
        CheckpointError: Nothing there that can be loaded.
    """
    start = time.monotonic()
    checkpoint, out = Path(checkpoint), Path(out)
    tokenizer = Path(tokenizer) if tokenizer is not None else None
    preset = Path(write_preset) if write_preset is not None else None
    if tokens is not None and data is not None:
        raise ConfigError(
            "Attention is measured on tokens or on images.",
            "Use --tokens or --data, or neither for the model's own samples.",
        )
    check_keep(keep)
    _check_preset_path(preset, overwrite)
    require_new_directory(out, overwrite)
    if dry_run:
        source_name = str(tokens or data or "its own samples")
        if checkpoint.is_file():
            config = official.convert(checkpoint, tokenizer or official.tokenizer_next_to(checkpoint)).config
        else:
            config = read_model_config(checkpoint)
        return _planned(config, source_name, num, out, preset)
    training = _run_settings(checkpoint) if preset is not None else None
    pipeline = Pipeline.from_pretrained(
        checkpoint, tokenizer=tokenizer, device=machine.device, dtype=machine.dtype, attention=machine.attention
    )
    at_once = batch_size or images_at_once(pipeline.config, pipeline.device)
    if tokens is not None:
        digest = official.tokenizer_hash_of(checkpoint, tokenizer)
        source = tokens_of_cache(pipeline, Path(tokens), digest, num=num, batch_size=at_once, seed=seed)
    elif data is not None:
        source = tokens_of_images(pipeline, str(data), num=num, batch_size=at_once, seed=seed)
    else:
        source = tokens_of_model(pipeline, num=num, batch_size=at_once, seed=seed, progress=progress)
    depth = len(pipeline.transformer.blocks)

    def layers_done(done: int) -> None:
        if progress is not None:
            note = f"image {done // depth} of {source.total}"
            progress("attention", done, source.total * depth, unit="layers", note=note)

    report = measure_attention(
        pipeline.transformer,
        pipeline.quantizer,
        source.batches,
        pipeline.config,
        keep=keep,
        attention=pipeline.attention,
        progress=layers_done,
    )
    if preset is not None:
        _write_preset(preset, pipeline.config, report, training)
    values = write_attention_report(report, out, pipeline, source.name, preset)
    return AttentionResult(
        **values,
        seconds=time.monotonic() - start,
        peak_memory_bytes=peak_memory_bytes(pipeline.device),
        sentences=[*values["reading"]["sentences"], *report.notes, page.recommendation_sentence(report)],
        tables={"scales": page.scale_rows(report), "savings": page.saving_rows(values["savings"])},
    )


def write_attention_report(
    report: AttentionReport, out: Path, pipeline: Pipeline, source: str, preset: Path | None = None
) -> dict[str, Any]:
    """Write report.json, the figures and the page; returns the content of report.json."""
    plots = plot_attention_report(report, out)
    dtype_bytes = pipeline.transformer.input_projection.weight.element_size()
    values = {
        "model": pipeline.config.name,
        "source": source,
        **report.to_dict(),
        "reading": asdict(find(report)),
        "savings": savings(pipeline.config, report.recommended, dtype_bytes=dtype_bytes, device=pipeline.device.type),
        "plots": {name: str(path) for name, path in plots.items()},
        "plots_svg": {name: str(path.with_suffix(".svg")) for name, path in plots.items()},
        "report": str(out / PAGE),
        "preset": str(preset) if preset else None,
    }
    page.write_attention_page(out / PAGE, report, values)
    write_json(out / "report.json", values)
    return values


def tokens_of_cache(
    pipeline: Pipeline, tokens: Path, tokenizer_hash: str, *, num: int, batch_size: int, seed: int
) -> TokenSource:
    """Rows of a token cache, chosen at random."""
    cache = TokenCache.open(tokens)
    cache.check(tokenizer_hash, pipeline.config.pyramid)
    rows = cache.conditioned(pipeline.config.conditioning)
    chosen = _chosen(len(rows), num, seed)
    return TokenSource(f"{tokens} ({cache.manifest.source})", len(chosen), map(rows.batch, _split(chosen, batch_size)))


def tokens_of_images(pipeline: Pipeline, data: str, *, num: int, batch_size: int, seed: int) -> TokenSource:
    """Images, chosen at random, encoded a few at a time."""
    images = ImageRows(open_images(data), pipeline.config.image_shape)
    chosen = _chosen(len(images), num, seed)
    encoded_at_once = DECODED_AT_ONCE.get(pipeline.device.type, 1)

    def batches() -> Iterator[tuple[Tensor, Any]]:
        for rows in _split(chosen, batch_size):
            pixels, labels = images.batch(rows)
            # The encoder works at full resolution, where an image takes more memory than all of its attention.
            tokens_BL = torch.cat([pipeline.encode(some) for some in pixels.split(encoded_at_once)])
            yield tokens_BL, pipeline.conditions_of(labels.tolist())

    return TokenSource(f"images of {data}{_note(pipeline.config)}", len(chosen), batches())


def tokens_of_model(
    pipeline: Pipeline, *, num: int, batch_size: int, seed: int, progress: Progress | None = None
) -> TokenSource:
    """Samples of the model itself, its classes evenly spread, with its recommended settings.

    The images are never decoded. Sample i is what `Pipeline.sample` generates with this seed, number and class.
    """
    logging.getLogger("mvar").info("No --tokens and no --data: the model's own samples are measured.")
    config, transformer = pipeline.config, pipeline.transformer
    assert config.transformer is not None
    conditions = pipeline.conditions_of(spread_classes(num, config.transformer.num_classes))
    sampler = ImageSampler(config, transformer, pipeline._tokenizer, pipeline.attention)
    settings = pipeline.sampling_settings()
    sizes = sampler.micro_batches(num, settings)
    sampled = 0

    def count(tokens: int) -> None:
        nonlocal sampled
        sampled += tokens
        if progress is not None:
            progress("sampling", sampled, num * config.pyramid.num_tokens, unit="tokens")

    parts = []
    for start in range(0, num, sizes.images):
        indices = range(start, min(start + sizes.images, num))
        samples = sample_tokens(
            transformer,
            pipeline.quantizer,
            conditions[indices.start : indices.stop],
            indices,
            seed,
            settings,
            micro_batches=sizes.scales,
            attention=pipeline.attention,
            on_tokens=count,
        )
        parts.append(samples.tokens_NL)
    batches = zip(torch.cat(parts).split(batch_size), conditions.split(batch_size), strict=True)
    name = f"the model's own samples (seed {seed}, cfg {settings.cfg:g}){_note(config)}"
    return TokenSource(name, num, batches)


def spread_classes(num: int, classes: int) -> list[int]:
    """`num` ascending labels: every class equally often, give or take one, or evenly spread where there are more."""
    return [index * classes // num for index in range(num)]


def _note(config: ModelConfig) -> str:
    """What a reader must know if there are no conditions."""
    return ", without a condition: the vectors of the classes are not known" if without_conditions(config) else ""


def _chosen(rows: int, num: int, seed: int) -> np.ndarray:
    chosen: np.ndarray = np.sort(np.random.default_rng(seed).permutation(rows)[:num])
    return chosen


def _split(chosen: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (chosen[start : start + size] for start in range(0, len(chosen), size))


def _check_preset_path(path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path} is no name of a preset.", "Let --write-preset end in .yaml, as --preset needs it.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists.", "Choose another name, or add --overwrite to replace it.")


def _run_settings(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration of a run; None for a model without its run."""
    recorded = checkpoint / "config.yaml"
    if not recorded.is_file():
        return None
    values = read_preset(str(recorded))
    load_config(None, base=values)
    return values


def _write_preset(path: Path, config: ModelConfig, report: AttentionReport, training: dict[str, Any] | None) -> None:
    values = preset_values(config, report.recommended, training)
    load_config(None, base=values)  # raises where the recommended attention and the run's settings do not fit together
    head = f"# mvar train --preset {path.name} …, or mvar finetune-from-var --preset {path.name} …\n"
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None))


def _planned(config: ModelConfig, source: str, num: int, out: Path, preset: Path | None) -> AttentionResult:
    steps = [f"measure attention on {num} images of {source}", f"write report and figures to {out}"]
    if preset is not None:
        steps.append(f"write the recommended preset to {preset}")
    configuration = config.model_dump(mode="json", exclude_none=True)
    dry_run = DryRun(configuration=configuration, steps=tuple(steps), cost=cost_of(config), facts={})
    return AttentionResult(model=config.name, source=source, report=str(out / PAGE), dry_run=dry_run)
