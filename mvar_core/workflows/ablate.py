"""The two ablations of the MVAR paper on any data: what scale prefixes and windows cost in quality, and save.

A row is one setting (which token sees which) trained on one seed. It is done once its row.json is there. Costs are
measured per setting after all rows, in processes of their own and in rounds over the settings, so that what else the
machine does affects all alike.
"""

from __future__ import annotations

import gc
import logging
import math
import shlex
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar_core.analysis.ablation import (
    PLANNED,
    Ablation,
    Setting,
    WindowEntry,
    aggregate,
    plan_ablations,
    settings_of,
    summarize,
)
from mvar_core.analysis.cost import Plan, cost_of
from mvar_core.config import Machine, RunConfig, recorded
from mvar_core.config.presets import load_config
from mvar_core.config.training import DataConfig
from mvar_core.data.images import open_images, split_name
from mvar_core.data.tokens import MANIFEST, TokenCache, split_off
from mvar_core.data.vectors import ENCODER
from mvar_core.errors import CheckpointError, ConfigError, DataError, MvarError
from mvar_core.evaluation.demo import DemoExtractor, read_digits
from mvar_core.evaluation.demo_scores import score_samples
from mvar_core.evaluation.extractors import ExtractorChoice
from mvar_core.evaluation.measure import DEFAULT_BATCH, Measurer, Reference
from mvar_core.evaluation.scores import METRICS, evaluate_features
from mvar_core.evaluation.statistics import FeatureSet, collect
from mvar_core.formatting import format_number, format_seconds
from mvar_core.io.files import read_json, sha256_of_file, write_json, write_text
from mvar_core.io.pictures import save_grid
from mvar_core.io.resumable import Resumable, differences
from mvar_core.kernels import check_backend
from mvar_core.models.directory import read_model_config, tokenizer_hash
from mvar_core.progress import Progress, silent
from mvar_core.pyramid import PatchSize, ScalePrefixes
from mvar_core.reports.ablation import FIGURES, Section, ablation_markdown, ablation_sections, plot_ablation
from mvar_core.results import DryRun, Result
from mvar_core.runtime import describe_machine, resolve_device, resolve_dtype
from mvar_core.training.checkpoints import remove_checkpoints
from mvar_core.training.curriculum import scales_alone
from mvar_core.training.metrics import read_metrics
from mvar_core.training.order import planned_steps
from mvar_core.workflows.bench_row import Request, measure_alone
from mvar_core.workflows.evaluate import SampledImages, classifier_accuracy, load_pipeline
from mvar_core.workflows.runs import held_out
from mvar_core.workflows.tokenize import write_tokens
from mvar_core.workflows.train import fit_to_tokens, train_on_tokens
from mvar_core.workflows.train_tokenizer import train_on_images

EXPERIMENT, SCORING, ROW = "experiment.json", "scoring.json", "row.json"
JSON_FILE, MARKDOWN_FILE = "ablation.json", "ablation.md"
TOKENIZER, TOKENS, HELD_OUT_TOKENS = "tokenizer", "tokens", "tokens-held-out"
HELD_OUT = 0.1
"""Fraction of the images that is held out where no others are."""
BENCH_BATCH, ROUNDS, REPEATS, PICTURED = 8, 3, 3, 80
FREE_SETTINGS = {
    "accumulate", "micro_batch", "max_skipped", "log_every", "checkpoint_every", "keep", "sample_every", "tensorboard",
    "wandb", "activation_checkpointing", "compile",
}  # fmt: skip
"""Training settings that may differ from row to row: they change no result beyond rounding."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class AblationResult(Result):
    """What an ablation found.

    Attributes:
        model: Name of the configuration that all rows share.
        command: What made it.
        steps: Optimizer steps of each row.
        batch_size: Of training.
        data: Names the images.
        images: How many are trained on.
        held_out: Images that the validation loss is measured on.
        num_samples: Samples that each row is scored on.
        features: What scores are computed from; None, like the next two, where there are none.
        reference: Names the images that samples are compared with.
        weights_hash: Of the network behind the features.
        machine: Where it ran.
        scales: Sides of the scales.
        seeds: The seeds.
        rows: One mapping for each setting and seed; after an interruption those that are done.
        aggregate: One mapping for each setting: its rows over seeds, and its cost.
        ablations: The tables: which settings they compare, and what the differences mean.
        outputs: Files that were written.
        seconds: What this call took.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the same call resumes it.
    """

    model: str
    command: str = "mvar ablate"
    steps: int = 0
    batch_size: int = 0
    data: str = ""
    images: int = 0
    held_out: int = 0
    num_samples: int = 0
    features: str | None = None
    reference: str | None = None
    weights_hash: str | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    scales: tuple[str, ...] = ()
    seeds: tuple[int, ...]
    rows: Sequence[Mapping[str, Any]] = ()
    aggregate: Sequence[Mapping[str, Any]] = ()
    ablations: Sequence[Mapping[str, Any]] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    def sections(self) -> list[Section]:
        """The report: tables and sentences; none of an ablation that is not finished."""
        return ablation_sections(self.to_dict()) if self.aggregate else []


@dataclass(frozen=True)
class Row:
    """One setting on one seed, which decides first weights, order, everything dropped, and the samples."""

    setting: Setting
    seed: int
    directory: Path


class Rows(Resumable):
    """The rows as pieces of resumable work: each is done once its row.json is there."""

    def __init__(self, out: Path, record: Mapping[str, Any], rows: Sequence[Row]):
        super().__init__(out, record, len(rows), record_file=EXPERIMENT)
        self.rows = rows

    def piece(self, number: int) -> Path:
        """The row's results."""
        return self.rows[number].directory / ROW


def ablate(
    *,
    preset: str,
    out: Path | str,
    tokens: Path | str | None = None,
    data: Path | str | None = None,
    tokenizer: Path | str | None = None,
    validation: Path | str | None = None,
    prefixes: Sequence[ScalePrefixes] = ("all", 3, 2, 1),
    windows: Sequence[WindowEntry] = (3, 5, 7, 9, "whole"),
    seeds: int | Sequence[int] = 3,
    settings: Sequence[str] = (),
    image_size: PatchSize | str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    num: int = 100,
    reference: str | None = None,
    features: str = "auto",
    inception_weights: Path | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> AblationResult:
    """Train every setting on every seed with equal steps, data and order; score samples, measure costs, report.

    Settings that both tables share are trained once. The same call resumes where it was interrupted, within a row too;
    more seeds, prefixes or windows add rows. Writes ablation.json, ablation.md, ablation.png and ablation.svg.

        mvar.ablate(preset="digits", data="digits", windows=(3, 5, "whole"), out="runs/ablation")

    Args:
        preset: Name of a preset or a YAML file.
        out: The ablation's directory.
        tokens: Token cache to train on.
        data: Images, where there is no cache; they are tokenized first.
        tokenizer: Model directory with the tokenizer that made `tokens`; without it, one is trained on `data`.
        validation: Token cache of held-out images; by default the test images of `data`, or a tenth of the images.
        prefixes: Scale prefixes to compare, with whole scales.
        windows: Windows to compare, with one scale prefix: a number for all windowed scales, "whole", "auto",
            "auto:K", or a tuple with one window per scale.
        seeds: How many, counted from the preset's seed, or which.
        settings: Changes to the preset, as "train.optimizer.lr=1e-3".
        image_size: Side, or (height, width), also as "256x384"; pyramid and windows follow.
        steps: Optimizer steps of each row; by default the preset's.
        batch_size: Images per step; by default the preset's.
        num: Samples of each class.
        reference: What samples are compared with, as for `evaluate`; by default the training images.
        features: As for `evaluate`; auto is demo for digits, otherwise inception.
        inception_weights: File of the Inception network.
        overwrite: Start over where an ablation is in `out`.
        dry_run: Only report rows, costs, and what is done already.
        machine: Device, dtype and attention backend.
        progress: Called with the steps of all rows, then with the measurements of cost.

    Raises:
        MvarError: Arguments that contradict each other, something that cannot be used, or another ablation in `out`.
    """
    start = time.monotonic()
    train = {"steps": steps, "batch_size": batch_size, "compile": machine.compile or None}
    config = load_config(preset, settings, {"image_size": image_size, "train": train})
    tables = plan_ablations(config, prefixes, windows)
    chosen = tuple(range(config.seed, config.seed + seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"--seeds {seeds}: expected at least one seed, and none twice.", "Use for example 3, or 0,7.")
    experiment = Experiment(
        config=config,
        tables=tables,
        seeds=chosen,
        out=Path(out),
        tokens=None if tokens is None else Path(tokens),
        data=None if data is None else str(data),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        validation=None if validation is None else Path(validation),
        reference=reference,
        features=features,
        inception_weights=None if inception_weights is None else Path(inception_weights),
        num=num,
        machine=machine,
        progress=progress or silent,
    )
    experiment.check()
    if dry_run:
        return experiment.plan(overwrite)
    return experiment.execute(overwrite, start)


@dataclass(frozen=True)
class Experiment:
    """What was asked of `ablate`; the configuration's attention says which scales a single number windows."""

    config: RunConfig
    tables: tuple[Ablation, ...]
    seeds: tuple[int, ...]
    out: Path
    tokens: Path | None
    data: str | None
    tokenizer: Path | None
    validation: Path | None
    reference: str | None
    features: str
    inception_weights: Path | None
    num: int
    machine: Machine
    progress: Progress

    def check(self) -> None:
        """Refuse, before anything slow, what cannot work."""
        config = self.config
        if (self.tokens is None) == (self.data is None):
            raise ConfigError(
                "An ablation needs tokens or images, not both.", "Add --tokens CACHE or --data IMAGES, one of them."
            )
        if self.tokens is not None and self.tokenizer is None:
            raise ConfigError("--tokens needs the tokenizer that made them.", "Add --tokenizer DIR.")
        if config.transformer is None:
            raise ConfigError(f"{config.name} is a tokenizer's preset; an ablation needs a transformer section.")
        if config.conditioning.dim is not None and config.conditioning.encoder != ENCODER:
            raise ConfigError(
                "An ablation samples classes, whose vectors are not known here.",
                f"Only with conditioning.encoder={ENCODER} do they follow from the classes' names.",
            )
        if self.tokenizer is not None:
            if self.out.resolve() == self.tokenizer.resolve():
                raise DataError(f"--out {self.out} is the tokenizer's directory.", "Choose another --out.")
            read_model_config(self.tokenizer)
        if self.data is not None:
            open_images(self.data)
        for cache in (self.tokens, self.validation):
            if cache is not None:
                TokenCache.open(cache)

    @property
    def job(self) -> Rows:
        """All rows, seed by seed, so that whole tables are done as early as possible."""
        rows = [self.row(setting, seed) for seed in self.seeds for setting in settings_of(self.tables)]
        return Rows(self.out, self.record(), rows)

    def row(self, setting: Setting, seed: int) -> Row:
        """The row of a setting and a seed."""
        return Row(setting, seed, self.out / "rows" / setting.name / f"seed-{seed}")

    def record(self) -> dict[str, Any]:
        """Everything that all rows share, and that results depend on."""
        config = self.config
        sections = {"image_size", "patch_sizes", "tokenizer", "transformer", "sampling", "data", "seed"}
        record = config.model_dump(mode="json", include=sections)
        record["sampling"] = recorded(record["sampling"])
        record["train"] = config.train.model_dump(mode="json", exclude=FREE_SETTINGS)
        if self.tokenizer is None:
            record["train_tokenizer"] = config.train_tokenizer.model_dump(mode="json", exclude=FREE_SETTINGS)
        else:
            record["checkpoint"] = tokenizer_hash(self.tokenizer)[:16]
        for name, path in (("tokens", self.tokens), ("validation", self.validation)):
            record[name] = None if path is None else sha256_of_file(path / MANIFEST)[:16]
        return {
            **record,
            "images": self.data,
            "reference": self.reference,
            "features": self.features,
            "num": self.num,
            "bench_batch": BENCH_BATCH,
            "device": self.machine.device,
            "dtype": self.machine.dtype,
            "attention": self.machine.attention,
        }

    def cost(self, config: RunConfig) -> Plan:
        """The predicted cost of one image."""
        device = resolve_device(self.machine.device)
        dtype = str(resolve_dtype(self.machine.dtype, device)).removeprefix("torch.")
        return cost_of(config, Machine(device=device.type, dtype=dtype), guided=config.sampling.guided)

    def plan(self, overwrite: bool) -> AblationResult:
        """What would be done."""
        job, settings = self.job, settings_of(self.tables)
        done = set() if overwrite else job.done()
        costs = {setting: self.cost(setting.apply(self.config, self.seeds[0])) for setting in settings}
        labels = {setting: label for table in self.tables for setting, label in table.labels.items()}
        rows = [
            {
                "setting": row.setting.name,
                "label": labels[row.setting],
                "scale_prefixes": row.setting.scale_prefixes,
                "windows": list(row.setting.windows),
                "seed": row.seed,
                "done": number in done,
                **{name: getattr(costs[row.setting], name) for name in PLANNED},
            }
            for number, row in enumerate(job.rows)
        ]
        size = f"{len(settings)} settings × {len(self.seeds)} seeds"
        todo = [
            f"train a tokenizer for {self.config.train_tokenizer.steps} steps" if self.tokenizer is None else "",
            f"encode the images of {self.data}" if self.tokens is None else "",
            f"train and score {len(rows) - len(done)} rows ({size}, {len(done)} done)",
            f"time {len(settings)} settings, each in processes of their own",
            f"write tables and figures to {self.out}",
        ]
        dry_run = DryRun(
            configuration=self.config.model_dump(mode="json", exclude_none=True),
            steps=tuple(filter(None, todo)),
            cost=self.cost(self.config),
            facts={"rows": rows, "refused": (not overwrite and job.difference()) or None},
        )
        return AblationResult(model=self.config.name, seeds=self.seeds, rows=rows, dry_run=dry_run)

    def execute(self, overwrite: bool, start: float) -> AblationResult:
        """Make what is missing, and report."""
        job, settings = self.job, settings_of(self.tables)
        device = resolve_device(self.machine.device)
        dtype = resolve_dtype(self.machine.dtype, device)
        for setting in settings:
            patterns = setting.apply(self.config, 0).patterns
            check_backend(self.machine.attention, patterns, device, dtype, needs_grad=True)
        if not job.begun and self.out.exists() and (self.out.is_file() or any(self.out.iterdir())):
            raise DataError(f"{self.out} is not empty, and holds no ablation.", "Choose another --out.")
        if overwrite and job.begun:
            job.record_path.unlink()  # so that `begin` removes the rest
        job.require_same("Use those settings to resume it, choose another --out, or add --overwrite to start over.")
        done = job.begin()
        try:
            return self._resume(job, done, start)
        finally:
            job.release()

    def _resume(self, job: Rows, done: set[int], start: float) -> AblationResult:
        known = AblationResult(model=self.config.name, seeds=self.seeds)
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return replace(known, interrupted=True)
        tokens, validation = self._tokens(tokenizer)
        config = _same_turns(fit_to_tokens(self.config, read_model_config(tokenizer), tokens.class_names))
        scorer = Scorer(self, config, self.data or tokens.manifest.source)
        scoring = self.out / SCORING
        if scoring.is_file() and (different := differences(read_json(scoring), scorer.identity)):
            raise CheckpointError(
                f"The rows in {self.out} were scored with something else: {different}.",
                "Score with the same, choose another --out, or add --overwrite to start over.",
            )
        write_json(scoring, scorer.identity)
        steps = planned_steps(config.train, len(tokens))
        if done:
            logger.info("%d of %d rows are done already.", len(done), len(job.rows))
        for number, row in enumerate(job.rows):
            title = f"row {number + 1} of {len(job.rows)}: {row.setting.name}, seed {row.seed}"
            if number not in done:
                report = _steps_of_all(self.progress, number * steps, len(job.rows) * steps, title)
                found = self._row(row, config, tokens, validation, tokenizer, scorer, report)
                if found is None:
                    rows = [read_json(job.piece(piece)) for piece in sorted(job.present())]
                    return replace(known, rows=rows, interrupted=True)
                logger.info("%s: %s.", title, _brief(found))
            # A finished row keeps its model, not the state from which its training would resume.
            remove_checkpoints(row.directory)
            shutil.rmtree(row.directory / "checkpoints", ignore_errors=True)
        costs = self._costs(config, settings_of(self.tables))
        rows = [{**read_json(row.directory / ROW), "cost": costs[row.setting.name]} for row in job.rows]
        settings = aggregate(rows)
        identity = scorer.identity
        result = replace(
            known,
            command=shlex.join(["mvar", *sys.argv[1:]]) if sys.argv[1:2] == ["ablate"] else known.command,
            steps=steps,
            batch_size=config.train.batch_size,
            data=tokens.manifest.source,
            images=tokens.num_images,
            held_out=len(validation),
            num_samples=self.num * len(tokens.class_names),
            **identity,
            machine=describe_machine(),
            scales=tuple(str(grid) for grid in config.pyramid),
            rows=rows,
            aggregate=settings,
            ablations=[summarize(table, settings, identity["features"]) for table in self.tables],
        )
        values = result.to_dict()
        for key in ("outputs", "seconds", "interrupted"):
            del values[key]
        plot_ablation(values, [self.out / name for name in FIGURES])
        write_text(self.out / MARKDOWN_FILE, ablation_markdown(values))
        write_json(self.out / JSON_FILE, values)
        written = {"json": JSON_FILE, "markdown": MARKDOWN_FILE, "plot": FIGURES[0]}
        outputs = {kind: str(self.out / name) for kind, name in written.items()}
        return replace(result, outputs=outputs, seconds=time.monotonic() - start)

    def _tokenizer(self) -> Path | None:
        """The tokenizer's directory: as given, or trained here; None where that training is interrupted."""
        directory = self.tokenizer or self.out / TOKENIZER
        if self.tokenizer is None and not (directory / "config.json").is_file():
            assert self.data is not None
            trained = train_on_images(self.config, self.data, directory, machine=self.machine, progress=self.progress)
            if trained.interrupted:
                return None
        return directory

    def _tokens(self, tokenizer: Path) -> tuple[TokenCache, TokenCache]:
        """Tokens to train on and held-out ones: caches that were given, or made here."""
        cache, held = self.tokens or self.out / TOKENS, self.validation or self.out / HELD_OUT_TOKENS
        if self.tokens is None:
            assert self.data is not None
            config = fit_to_tokens(self.config, read_model_config(tokenizer), open_images(self.data).class_names)
            machine = self.machine.model_copy(update={"dtype": "auto"})
            write = partial(write_tokens, tokenizer=tokenizer, machine=machine, progress=self.progress)
            write(cache, data=self.data, config=config)
            if self.validation is None and held_out(self.data) is not None:
                plain = config.model_copy(update={"data": DataConfig()})
                write(held, data=f"{split_name(self.data)[0]}:test", config=plain)
        tokens: TokenCache = TokenCache.open(cache)
        if held.is_dir():
            return tokens, TokenCache.open(held)
        train, validation = split_off(tokens, HELD_OUT, self.config.seed)
        logger.info("Held out: %d of %d images.", validation.num_images, tokens.num_images)
        return train, validation

    def _row(
        self,
        row: Row,
        config: RunConfig,
        tokens: TokenCache,
        validation: TokenCache,
        tokenizer: Path,
        scorer: Scorer,
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Train, sample and score; None where the training is interrupted."""
        config = row.setting.apply(config, row.seed)
        outcome = train_on_tokens(
            config, tokens, tokenizer, row.directory, machine=self.machine, validation=validation, progress=progress
        )
        if outcome.interrupted:
            return None
        begun = time.monotonic()
        pipeline = load_pipeline(row.directory, None, self.machine)
        count = self.num * len(tokens.class_names)
        images = SampledImages(row.setting.name, pipeline, count, seed=row.seed)
        scores = scorer.score(images, row.directory / "samples.png")
        lines = reversed(read_metrics(row.directory / "metrics.jsonl"))
        measured = next(line for line in lines if "val_loss" in line)
        cost = self.cost(config)
        found = finite(
            {
                "setting": row.setting.name,
                "scale_prefixes": row.setting.scale_prefixes,
                "windows": list(row.setting.windows),
                "seed": row.seed,
                "steps": outcome.steps,
                "skipped": outcome.skipped,
                "training_seconds": outcome.seconds,
                "scoring_seconds": time.monotonic() - begun,
                "loss": outcome.loss,
                "validation_loss": measured["val_loss"],
                "validation_scale_loss": measured["val_scale_loss"],
                "validation_scale_accuracy": measured["val_scale_accuracy"],
                **{name: getattr(cost, name) for name in PLANNED},
                "num_samples": count,
                "scores": scores,
                "model": str(row.directory.relative_to(self.out)),
            }
        )
        write_json(row.directory / ROW, found)
        # The next row must not start next to what is left of this one.
        del pipeline, images
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    def _costs(self, config: RunConfig, settings: Sequence[Setting]) -> dict[str, dict[str, Any]]:
        """Time and memory of sampling, by setting's name: medians over rounds, each in a process of its own.

        A round measures every setting once; a measurement that is there already is not repeated.
        """
        work = [(setting, "sample", f"round-{number}") for number in range(ROUNDS) for setting in settings]
        work += [(setting, "sample-memory", "allocated") for setting in settings]
        for number, (setting, what, name) in enumerate(work):
            self.progress("measuring", number, len(work), unit="measurements", note=setting.name)
            path = self._cost_file(setting, name)
            if not path.is_file():
                row = self.row(setting, self.seeds[0])
                request = Request(
                    what=what,
                    config=setting.apply(config, row.seed),
                    checkpoint=row.directory,
                    batch_size=BENCH_BATCH,
                    repeats=REPEATS,
                    machine=self.machine,
                    seed=row.seed,
                    breakdown=False,
                )
                write_json(path, finite(measure_alone(request)))
        return {setting.name: self._cost(setting) for setting in settings}

    def _cost(self, setting: Setting) -> dict[str, Any]:
        rounds = [read_json(self._cost_file(setting, f"round-{number}")) for number in range(ROUNDS)]
        allocated = read_json(self._cost_file(setting, "allocated"))
        measured = [found for found in rounds if found.get("seconds") is not None]
        each = [found["seconds"] / BENCH_BATCH for found in measured]
        return {
            "batch_size": BENCH_BATCH,
            "seconds_per_image": statistics.median(each) if each else None,
            "rounds": each,
            "peak_memory_bytes": statistics.median(found["peak_memory_bytes"] for found in measured) if each else None,
            "measured_kv_cache_bytes": measured[0]["kv_cache_bytes"] if each else None,
            "allocated_bytes": allocated.get("measured_bytes"),
            "weight_bytes": allocated.get("weight_bytes"),
            "memory_is": measured[0]["memory_is"] if each else None,
            "reason": next((found["reason"] for found in [*rounds, allocated] if "reason" in found), None),
        }

    def _cost_file(self, setting: Setting, name: str) -> Path:
        return self.out / "costs" / setting.name / f"{name}.json"


def _same_turns(config: RunConfig) -> RunConfig:
    """The run with the interleaved curriculum's turns written down, which would otherwise follow each row's windows."""
    train = config.train
    if train.curriculum != "interleaved" or train.scales_alone is not None:
        return config
    alone = min(scales_alone(config.patterns), config.pyramid.num_scales - 1)
    return config.model_copy(update={"train": train.model_copy(update={"scales_alone": alone})})


def _steps_of_all(progress: Progress, before: int, all_steps: int, title: str) -> Progress:
    """Progress of one row as steps of all rows."""

    def report(stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
        progress("ablation", before + done, all_steps, unit="steps", note=title)

    return report


def _brief(found: Mapping[str, Any]) -> str:
    fid = found["scores"].get("fid")
    fid = "" if fid is None else f", FID {format_number(fid)}"
    seconds = format_seconds(found["training_seconds"] + found["scoring_seconds"])
    return f"validation loss {format_number(found['validation_loss'])}{fid}, {seconds}"


def finite(value: Any) -> Any:
    """A JSON value whose numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Scorer:
    """Scores samples of one model after another against one reference: the metrics of `evaluate`.

    On bundled digits the measures of the quickstart are added. What the user named and cannot be used raises MvarError;
    what was not named is left out, with the reason.
    """

    def __init__(self, experiment: Experiment, config: RunConfig, training_images: str):
        self.why_not: str | None = None
        self.identity: dict[str, Any] = {"features": None, "reference": None, "weights_hash": None}
        self._digits: list[tuple[Tensor, Tensor]] = []
        name, shape, tokenizer = experiment.reference or training_images, config.image_shape, experiment.tokenizer
        nearby = [experiment.out, *([tokenizer, tokenizer.parent] if tokenizer is not None else [])]
        try:
            choice = ExtractorChoice(experiment.features, name, inception_weights=experiment.inception_weights)
            self._reference = Reference.open(name, shape, choice.name)
            extractor = choice.load(shape, resolve_device(experiment.machine.device), nearby)
            self._reference.check(extractor)
        except MvarError as error:
            if experiment.features != "auto" or experiment.reference or experiment.inception_weights:
                raise
            self.why_not = str(error)
            logger.info("No FID: %s", error)
            return
        self._measurer = Measurer(extractor)
        self._expected: FeatureSet | None = None
        self.identity = {"features": extractor.name, "reference": name, "weights_hash": extractor.weights_hash}
        if isinstance(extractor, DemoExtractor) and split_name(name) == ("digits", "train"):
            self._digits = [read_digits(split, shape) for split in ("train", "test")]

    def score(self, images: SampledImages, figure: Path) -> dict[str, Any]:
        """Generate samples and score them as `evaluate` does; a grid of the first is left in `figure`.

        A score is None, with a reason, where there is none.
        """
        kept: list[Tensor] = []

        def samples(count: int) -> Iterator[Tensor]:
            for batch in images.batches(DEFAULT_BATCH, 0, count):
                if self._digits or len(kept) * DEFAULT_BATCH < PICTURED:
                    kept.append(batch)
                yield batch

        if self.why_not is not None:
            deque(samples(min(PICTURED, images.count)), maxlen=0)
            reasons = dict.fromkeys(METRICS, self.why_not)
            scores: dict[str, Any] = {**dict.fromkeys(METRICS), "classifier_accuracy": None, "reasons": reasons}
        else:
            if self._expected is None:
                self._expected = self._reference.measure(self._measurer)
            extractor = self._measurer.extractor
            found = collect(extractor, samples(images.count), images.count)
            scores = evaluate_features(found, self._expected)
            scores["classifier_accuracy"] = classifier_accuracy(found, images.labels)
            if self._digits and isinstance(extractor, DemoExtractor) and images.labels is not None:
                labelled = torch.cat(kept), torch.from_numpy(images.labels)
                scores.update(asdict(score_samples(extractor.classifier, labelled, *self._digits)))
        first = torch.cat(kept)[:PICTURED].permute(0, 2, 3, 1).contiguous()
        save_grid(first, figure, images.num_classes if 2 <= images.num_classes <= 16 else 8)
        return scores
