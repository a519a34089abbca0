"""The two ablations of the MVAR paper on any data: what scale prefixes and windows cost in quality, and save.

A row is one setting (which token sees which) trained on one seed. It is done once its row.json is there. Costs are
measured per setting after all rows, in processes of their own and in rounds over the settings, so that what else the
machine does affects all alike.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvar_core.analysis.ablation import PLANNED, Setting, WindowEntry, aggregate, plan_ablations, settings_of, summarize
from mvar_core.analysis.cost import Plan, cost_of
from mvar_core.config import Machine, RunConfig, recorded
from mvar_core.config.presets import load_config
from mvar_core.config.training import DataConfig
from mvar_core.data.images import open_images, split_name
from mvar_core.data.tokens import MANIFEST, TokenCache, split_off
from mvar_core.data.vectors import ENCODER
from mvar_core.errors import CheckpointError, ConfigError, DataError, MvarError
from mvar_core.evaluation.demo import DemoExtractor, read_digits, score_samples
from mvar_core.evaluation.extractors import ExtractorChoice
from mvar_core.evaluation.measure import DEFAULT_BATCH, Measurer, Reference
from mvar_core.evaluation.scores import METRICS, evaluate_features
from mvar_core.evaluation.statistics import FeatureSet, collect
from mvar_core.formatting import format_number, format_seconds
from mvar_core.io.files import require_new_directory, sha256_of_file, write_json
from mvar_core.io.pixels import make_grid, save_png
from mvar_core.io.resumable import Resumable, differences
from mvar_core.kernels import check_backend
from mvar_core.models.directory import read_model_config, tokenizer_hash
from mvar_core.progress import Progress, silent
from mvar_core.pyramid import PatchSize, ScalePrefixes
from mvar_core.reports.ablation import Section, ablation_sections, write_ablation
from mvar_core.results import DryRun, Result, plain
from mvar_core.runtime import describe_machine, resolve_device, resolve_dtype
from mvar_core.training.checkpoints import remove_checkpoints
from mvar_core.training.metrics import read_metrics
from mvar_core.training.trainer import Outcome, planned_steps
from mvar_core.training.transformer import scales_alone
from mvar_core.untrusted import read_json
from mvar_core.workflows.bench_row import Request, measure_alone
from mvar_core.workflows.evaluate import SampledImages, classifier_accuracy, digits_of, load_pipeline
from mvar_core.workflows.runs import held_out
from mvar_core.workflows.tokenize import write_tokens
from mvar_core.workflows.train import fit_to_tokens, train_on_tokens
from mvar_core.workflows.train_tokenizer import train_on_images

EXPERIMENT, SCORING, ROW = "experiment.json", "scoring.json", "row.json"
OUTPUTS = {"json": "ablation.json", "markdown": "ablation.md", "plot": "ablation.png"}
HELD_OUT = 0.1
"""Fraction of the images that is held out where no others are."""
MOST_SEEDS = 1000
BENCH_BATCH, ROUNDS, REPEATS, PICTURED = 8, 3, 3, 80
FREE_SETTINGS = {
    "accumulate", "micro_batch", "max_skipped", "max_loss_ratio", "log_every",
    "checkpoint_every", "keep", "sample_every", "tensorboard", "wandb", "activation_checkpointing", "compile",
}  # fmt: skip
"""Training settings that may differ from row to row: they change no result beyond rounding."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class AblationResult(Result):
    """What an ablation found.

    Attributes:
        features: What scores are computed from; None, like `reference` and `weights_hash`, where there are none.
        rows: One mapping for each setting and seed; after an interruption those that are done.
        aggregate: One mapping for each setting: its rows over seeds, and its cost.
        ablations: The tables: which settings they compare, and what the differences mean.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the same call resumes it.
    """

    model: str
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


class Row(NamedTuple):
    """One setting on one seed, which decides first weights, order, everything dropped, and the samples."""

    setting: Setting
    seed: int
    directory: Path

    def described(self, cost: Plan) -> dict[str, Any]:
        """Which row it is, and its predicted cost, as row.json has them."""
        prefixes, windows = self.setting.scale_prefixes, list(self.setting.windows)
        names = {"setting": self.setting.name, "scale_prefixes": prefixes, "windows": windows, "seed": self.seed}
        return names | {name: getattr(cost, name) for name in PLANNED}


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

    `preset`, `settings`, `image_size`, `steps` and `batch_size` are as of `train`; `reference`, by default the training
    images, `features` and `inception_weights` as of `evaluate`, for `num` samples of each class. Without a cache,
    `tokens`, the images `data` are tokenized first, without the `tokenizer` of the cache one is trained on them.
    `validation` is a cache of held-out images; by default the test images of `data`, or a tenth of the images.

    `prefixes` are compared with whole scales, `windows` (see `WindowEntry`) with one scale prefix; `seeds` is how many,
    counted from the preset's, or which. `progress` is called with the steps of all rows, then with the measurements of
    cost. `overwrite` starts over where an ablation is in `out`; `dry_run` only reports rows, costs, and what is done.

    Raises:
        MvarError: Arguments that contradict each other, something that cannot be used, or another ablation in `out`.
    """
    start = time.monotonic()
    out, data, progress = Path(out), None if data is None else str(data), progress or silent
    tokens, tokenizer, validation = (None if path is None else Path(path) for path in (tokens, tokenizer, validation))
    train = {"steps": steps, "batch_size": batch_size, "compile": machine.compile or None}
    config = load_config(preset, settings, {"image_size": image_size, "train": train})
    tables = plan_ablations(config, prefixes, windows)
    count = min(seeds, MOST_SEEDS + 1) if isinstance(seeds, int) else 0
    chosen = tuple(range(config.seed, config.seed + count)) if isinstance(seeds, int) else tuple(seeds)
    if not 0 < len(chosen) <= MOST_SEEDS or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ConfigError(
            f"--seeds {seeds}: expected 1 … {MOST_SEEDS} seeds, none twice and none below 0.",
            "Use for example 3, or 0,7.",
        )
    if num < 1:
        raise ConfigError(f"--num {num}: expected at least one sample of each class.", "Use for example 100.")
    if (tokens is None) == (data is None):
        raise ConfigError("An ablation needs tokens or images.", "Add --tokens CACHE or --data IMAGES, one of them.")
    if tokens is not None and tokenizer is None:
        raise ConfigError("--tokens needs the tokenizer that made them.", "Add --tokenizer DIR.")
    if config.transformer is None:
        raise ConfigError(f"{config.name} is a tokenizer's preset; an ablation needs a transformer section.")
    if config.conditioning.dim is not None and config.conditioning.encoder != ENCODER:
        raise ConfigError(
            "An ablation samples classes, whose vectors are not known here.",
            f"Only with conditioning.encoder={ENCODER} do they follow from the classes' names.",
        )
    if tokenizer is not None and os.path.realpath(out) == os.path.realpath(tokenizer):
        raise DataError(f"--out {out} is the tokenizer's directory.", "Choose another --out.")
    if data is not None:
        open_images(data)
    caches = {name: path and TokenCache.open(path) for name, path in (("tokens", tokens), ("validation", validation))}
    rows = [  # seed by seed, so that whole tables are done as early as possible
        Row(setting, seed, out / "rows" / setting.name / f"seed-{seed}")
        for seed in chosen
        for setting in settings_of(tables)
    ]
    sections = {"image_size", "patch_sizes", "tokenizer", "transformer", "sampling", "data", "seed"}
    record = config.model_dump(mode="json", include=sections)
    record |= {
        "sampling": recorded(record["sampling"]),
        "train": config.train.model_dump(mode="json", exclude=FREE_SETTINGS),
        **{name: sha256_of_file(cache.path / MANIFEST)[:16] if cache else None for name, cache in caches.items()},
        "images": data,
        "reference": reference,
        "features": features,
        "num": num,
        "bench_batch": BENCH_BATCH,
        "device": machine.device,
        "dtype": machine.dtype,
        "attention": machine.attention,
    }
    if tokenizer is None:
        record["train_tokenizer"] = config.train_tokenizer.model_dump(mode="json", exclude=FREE_SETTINGS)
    else:
        record["checkpoint"] = tokenizer_hash(tokenizer)[:16]
    job = AblationJob(out, record, rows, config, machine, progress)
    known = AblationResult(model=config.name, seeds=chosen)
    if dry_run:
        labels = {setting: label for table in tables for setting, label in table.labels.items()}
        steps_before = [
            f"train a tokenizer for {config.train_tokenizer.steps} steps" if tokenizer is None else "",
            f"encode the images of {data}" if tokens is None else "",
        ]
        return replace(known, **job.planned(labels, steps_before, overwrite))

    device = resolve_device(machine.device)
    for row in rows:
        patterns, dtype = row.setting.apply(config, 0).patterns, resolve_dtype(machine.dtype, device)
        check_backend(machine.attention, patterns, device, dtype, needs_grad=True)
    if not job.begun:
        require_new_directory(out, overwrite=False)  # only another ablation may be overwritten
    job.acquire()
    try:
        if overwrite:
            job.record_path.unlink(missing_ok=True)  # so that `begin` removes the rest
        job.require_same("Use those settings to resume it, choose another --out, or add --overwrite to start over.")
        done = job.begin()
        if tokenizer is None:
            tokenizer = out / "tokenizer"
            if not (tokenizer / "config.json").is_file():
                assert data is not None
                if train_on_images(config, data, tokenizer, machine=machine, progress=progress).interrupted:
                    return replace(known, interrupted=True)
        cache, held = job.token_caches(tokens, data, tokenizer, validation)
        config = job.config = _same_turns(fit_to_tokens(config, read_model_config(tokenizer), cache.class_names))
        scorer = Scorer(
            features, reference, inception_weights, data or cache.manifest.source, config.image_shape, machine,
            [out, tokenizer, tokenizer.parent],
        )  # fmt: skip
        scoring = out / SCORING
        if scoring.is_file() and (different := differences(read_json(scoring), scorer.identity)):
            raise CheckpointError(
                f"The rows in {out} were scored with something else: {different}.",
                "Score with the same, choose another --out, or add --overwrite to start over.",
            )
        write_json(scoring, scorer.identity)
        num_samples = num * len(cache.class_names)
        if done:
            logger.info("%d of %d rows are done already.", len(done), len(rows))
        for number, row in enumerate(rows):
            if number not in done:
                title = f"row {number + 1} of {len(rows)}: {row.setting.name}, seed {row.seed}"
                outcome = train_on_tokens(
                    row.setting.apply(config, row.seed), cache, tokenizer, row.directory, machine=machine,
                    validation=held, progress=_row_progress(progress, number, len(rows), title),
                )  # fmt: skip
                if outcome.interrupted:
                    finished = [read_json(job.piece(piece), finite=False) for piece in sorted(job.present())]
                    return replace(known, rows=finished, interrupted=True)
                found = job.results(row, outcome, scorer, num_samples)
                write_json(job.piece(number), found)
                loss = format_number(found["validation_loss"])
                logger.info("%s: validation loss %s, %s.", title, loss, format_seconds(found["training_seconds"]))
            # A finished row keeps its model, not the state from which its training would resume.
            remove_checkpoints(row.directory)
            shutil.rmtree(row.directory / "checkpoints", ignore_errors=True)
        costs = job.costs([row for row in rows if row.seed == chosen[0]])
        finished = [{**read_json(row.directory / ROW, finite=False), "cost": costs[row.setting.name]} for row in rows]
        compared = aggregate(finished)
        result = replace(
            known,
            steps=planned_steps(config.train, len(cache)),
            batch_size=config.train.batch_size,
            data=cache.manifest.source,
            images=cache.num_images,
            held_out=len(held),
            num_samples=num_samples,
            **scorer.identity,
            machine=describe_machine(),
            scales=tuple(str(grid) for grid in config.pyramid),
            rows=finished,
            aggregate=compared,
            ablations=[summarize(table, compared, scorer.identity["features"]) for table in tables],
        )
        values = result.to_dict()
        values = {key: values[key] for key in values if key not in ("outputs", "seconds", "interrupted")}
        write_ablation(values, out)
        write_json(out / OUTPUTS["json"], values)
        outputs = {kind: str(out / name) for kind, name in OUTPUTS.items()}
        return replace(result, outputs=outputs, seconds=time.monotonic() - start)
    finally:
        job.release()


def _same_turns(config: RunConfig) -> RunConfig:
    """The run with the interleaved curriculum's turns written down, which would otherwise follow each row's windows."""
    train = config.train
    if train.curriculum != "interleaved" or train.scales_alone is not None:
        return config
    alone = min(scales_alone(config.patterns), config.pyramid.num_scales - 1)
    return config.model_copy(update={"train": train.model_copy(update={"scales_alone": alone})})


def _row_progress(progress: Progress, number: int, rows: int, title: str) -> Progress:
    """Reports the steps of one row as steps of all rows."""

    def report(stage: str, done: int, total: int, *, unit: str = "images", note: str = "") -> None:
        progress("ablation", number * total + done, rows * total, unit="steps", note=title)

    return report


class AblationJob(Resumable):
    """An ablation as resumable work, whose pieces are its rows."""

    def __init__(
        self, out: Path, record: Mapping[str, Any], rows: Sequence[Row], config: RunConfig, machine: Machine,
        progress: Progress,
    ):  # fmt: skip
        super().__init__(out, record, len(rows), record_file=EXPERIMENT)
        self.rows, self.config, self.machine, self.progress = rows, config, machine, progress

    def piece(self, number: int) -> Path:
        """The row's results."""
        return self.rows[number].directory / ROW

    def predicted(self, config: RunConfig) -> Plan:
        """The predicted cost of one image."""
        device = resolve_device(self.machine.device)
        dtype = str(resolve_dtype(self.machine.dtype, device)).removeprefix("torch.")
        return cost_of(config, Machine(device=device.type, dtype=dtype), guided=config.sampling.guided)

    def planned(self, labels: Mapping[Setting, str], steps_before: Sequence[str], overwrite: bool) -> dict[str, Any]:
        """What would be done: fields of the result."""
        done = set() if overwrite else self.done()
        costs = {setting: self.predicted(setting.apply(self.config, self.config.seed)) for setting in labels}
        rows = [
            {**row.described(costs[row.setting]), "label": labels[row.setting], "done": number in done}
            for number, row in enumerate(self.rows)
        ]
        seeds = len(rows) // len(labels)
        steps = [
            *steps_before,
            f"train and score {len(rows) - len(done)} rows ({len(labels)} settings × {seeds} seeds, {len(done)} done)",
            f"time {len(labels)} settings, each in processes of their own",
            f"write tables and figures to {self.directory}",
        ]
        dry_run = DryRun(
            configuration=self.config.model_dump(mode="json", exclude_none=True),
            steps=tuple(filter(None, steps)),
            cost=self.predicted(self.config),
            facts={"rows": rows, "refused": (not overwrite and self.difference()) or None},
        )
        return {"rows": rows, "dry_run": dry_run}

    def token_caches(
        self, tokens: Path | None, data: str | None, tokenizer: Path, validation: Path | None
    ) -> tuple[TokenCache, TokenCache]:
        """Tokens to train on and held-out ones: caches that were given, or made here."""
        cache, held = tokens or self.directory / "tokens", validation or self.directory / "tokens-held-out"
        if tokens is None:
            assert data is not None
            source = open_images(data, max_pixels=self.machine.max_pixels)
            config = fit_to_tokens(self.config, read_model_config(tokenizer), source.class_names)
            machine = self.machine.model_copy(update={"dtype": "auto"})
            write = partial(write_tokens, tokenizer=tokenizer, machine=machine, progress=self.progress)
            write(cache, data=data, config=config)
            if validation is None and (rest := held_out(source)) is not None:
                unaugmented = config.model_copy(update={"data": DataConfig()})
                write(held, data=f"{rest.name}:{rest.split}", config=unaugmented)
        if held.is_dir():
            return TokenCache.open(cache), TokenCache.open(held)
        train, kept = split_off(TokenCache.open(cache), HELD_OUT, self.config.seed)
        logger.info("Held out: %d of %d images.", kept.num_images, kept.num_images + train.num_images)
        return train, kept

    def results(self, row: Row, outcome: Outcome, scorer: Scorer, count: int) -> dict[str, Any]:
        """Sample from a trained row and score it: the content of its row.json."""
        begun = time.monotonic()
        images = SampledImages(row.setting.name, load_pipeline(row.directory, None, self.machine), count, seed=row.seed)
        scores = scorer.score(images, row.directory / "samples.png")
        # The next row must not start next to what is left of this one.
        del images
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        lines = reversed(read_metrics(row.directory / "metrics.jsonl"))
        measured = next(line for line in lines if "val_loss" in line)
        return plain(
            {
                **row.described(self.predicted(row.setting.apply(self.config, row.seed))),
                "steps": outcome.steps,
                "skipped": outcome.skipped,
                "training_seconds": outcome.seconds,
                "scoring_seconds": time.monotonic() - begun,
                "loss": outcome.loss,
                "validation_loss": measured["val_loss"],
                "validation_scale_loss": measured["val_scale_loss"],
                "validation_scale_accuracy": measured["val_scale_accuracy"],
                "num_samples": count,
                "scores": scores,
                "model": "/".join(row.directory.parts[-3:]),
            }
        )

    def costs(self, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Time and memory of sampling, by setting's name: medians over rounds that measure every setting once.

        A measurement that is there already is not repeated.
        """
        found: dict[str, list[dict[str, Any]]] = {row.setting.name: [] for row in rows}
        names = [*(f"round-{number}" for number in range(ROUNDS)), "allocated"]
        work = list(itertools.product(names, rows))
        for number, (name, row) in enumerate(work):
            self.progress("measuring", number, len(work), unit="measurements", note=row.setting.name)
            path = self.directory / "costs" / row.setting.name / f"{name}.json"
            if not path.is_file():
                request = Request(
                    what="sample-memory" if name == "allocated" else "sample",
                    config=row.setting.apply(self.config, row.seed),
                    checkpoint=row.directory,
                    batch_size=BENCH_BATCH,
                    repeats=REPEATS,
                    machine=self.machine,
                    seed=row.seed,
                    breakdown=False,
                )
                write_json(path, plain(measure_alone(request)))
            found[row.setting.name].append(read_json(path, finite=False))
        costs = {}
        for setting, (*rounds, allocated) in found.items():
            measured = [each for each in rounds if each.get("seconds") is not None]
            seconds = [each["seconds"] / BENCH_BATCH for each in measured]
            memory = [each["peak_memory_bytes"] for each in measured]
            first = measured[0] if measured else {}
            costs[setting] = {
                "batch_size": BENCH_BATCH,
                "seconds_per_image": statistics.median(seconds) if seconds else None,
                "rounds": seconds,
                "peak_memory_bytes": statistics.median(memory) if memory else None,
                "measured_kv_cache_bytes": first.get("kv_cache_bytes"),
                "allocated_bytes": allocated.get("measured_bytes"),
                "weight_bytes": allocated.get("weight_bytes"),
                "memory_is": first.get("memory_is"),
                "reason": next((each["reason"] for each in [*rounds, allocated] if "reason" in each), None),
            }
        return costs


class Scorer:
    """Scores samples of models against one reference, as `evaluate` does; on bundled digits as the quickstart does too.

    What the user named and cannot be used raises MvarError; what was not named is left out, with the reason.
    """

    def __init__(
        self,
        features: str,
        reference: str | None,
        inception_weights: Path | str | None,
        training_images: str,
        shape: tuple[int, int],
        machine: Machine,
        nearby: Sequence[Path],
    ):
        self.why_not: str | None = None
        self.identity: dict[str, Any] = {"features": None, "reference": None, "weights_hash": None}
        name = reference or training_images
        try:
            choice = ExtractorChoice(features, name, inception_weights)
            self._reference = Reference.open(name, shape, choice.name, machine.max_pixels)
            extractor = choice.load(shape, resolve_device(machine.device), nearby)
            self._reference.check(extractor)
        except MvarError as error:
            if features != "auto" or reference or inception_weights:
                raise
            self.why_not = str(error)
            logger.info("No FID: %s", error)
            return
        self._measurer = Measurer(extractor)
        self._expected: FeatureSet | None = None
        self.identity = {"features": extractor.name, "reference": name, "weights_hash": extractor.weights_hash}
        self._digits: list[tuple[Tensor, Tensor]] = []
        if isinstance(extractor, DemoExtractor) and split_name(name) == ("digits", "train"):
            self._digits = [read_digits(split, shape) for split in ("train", "test")]

    def score(self, images: SampledImages, figure: Path) -> dict[str, Any]:
        """Generate samples and score them; a grid of the first is left in `figure`. What has no score has a reason."""
        batches = images.batches(DEFAULT_BATCH, 0, images.count)
        kept = list(itertools.islice(batches, math.ceil(PICTURED / DEFAULT_BATCH)))
        first = torch.cat(kept)[:PICTURED].permute(0, 2, 3, 1).contiguous()
        save_png(make_grid(first, images.num_classes if 2 <= images.num_classes <= 16 else 8), figure)
        if self.why_not is not None:
            reasons = dict.fromkeys(METRICS, self.why_not)
            return {**dict.fromkeys(METRICS), "classifier_accuracy": None, "reasons": reasons}
        if self._digits:
            kept += batches
        self._expected = self._expected or self._reference.measure(self._measurer)
        extractor = self._measurer.extractor
        found = collect(extractor, itertools.chain(kept, batches), images.count)
        scores = evaluate_features(found, self._expected)
        scores["classifier_accuracy"] = classifier_accuracy(found, images)
        digits = digits_of(images)
        if self._digits and isinstance(extractor, DemoExtractor) and digits is not None:
            labelled = torch.cat(kept), torch.from_numpy(digits)
            scores.update(asdict(score_samples(extractor.classifier, labelled, *self._digits)))
        return scores
