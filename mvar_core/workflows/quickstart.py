"""From images to a model, samples, metrics and a report: bundled digits in minutes on a CPU, or images of your own."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.config.training import DataConfig
from mvar_core.data.images import Views, open_images, pixel_batches
from mvar_core.data.sources import ImageSource, Subset, hold_out
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.demo import (
    CLASSIFIER_FILE,
    DemoClassifier,
    DemoScores,
    nearest_neighbours,
    pixel_diversity,
    read_digits,
    score_samples,
    train_digits_classifier,
)
from mvar_core.formatting import format_count, format_seconds
from mvar_core.io.files import require_new_directory, write_json
from mvar_core.io.pixels import from_uint8, make_grid, save_png, to_uint8
from mvar_core.io.resumable import DirectoryLock, differences
from mvar_core.models.directory import read_model_config
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.pyramid import PatchSize
from mvar_core.reports.pages import TableRows
from mvar_core.reports.quickstart_page import metric_rows, time_rows, write_quickstart_page
from mvar_core.results import DryRun, Result
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.untrusted import read_json
from mvar_core.workflows import recipes
from mvar_core.workflows.attention import analyze_attention
from mvar_core.workflows.runs import held_out
from mvar_core.workflows.sample import sample_to
from mvar_core.workflows.tokenize import tokenize
from mvar_core.workflows.train import sample_command, train
from mvar_core.workflows.train_tokenizer import train_tokenizer

PRESET = "digits"
PRESET_MINUTES, OWN_MINUTES = 2.0, 60.0
"""The steps of the preset fill its time on two CPU cores."""
FIXED_MINUTES = 0.25
"""The share of it that is not training: classifier, samples, metrics, report."""
LARGEST_MINUTES = 365 * 24 * 60
SHOWN = 16
"""Samples of each class in the picture, and pairs of neighbours in a row."""
PLAN = "plan.json"
HELD_OUT, MOST_HELD_OUT = 0.1, 500
"""Share and number of your own images that are not trained on."""
VIEWS = "data.crops=4"
"""What tokens are made of where the data section is not set: a few crops of each image, so that fewer are memorised."""
TOKENIZER_SHARE = 0.35
"""Of the time for training."""
REHEARSED_STEPS, REHEARSED_IMAGES = 4, 8
MOST_CLASSES, SAMPLES = 16, 64
"""Classes that samples are made of, the largest ones, and about how many samples."""
REFERENCE_BYTES = 2**28
"""Views of training images among which the nearest is looked for."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(DemoScores, Result):
    """What the quickstart trained, and the scores of its samples; those that need the digits' classifier are null else.

    Attributes:
        reconstruction_psnr: Of the tokenizer on test images, in dB.
        code_usage: Fraction of the codebook that some scale uses.
        loss: Training loss of the MVAR at its last logged step.
        validation_loss: The same on held-out images, of your own images.
        memorised: Fraction of the samples that are nearer to a training image than half the median distance of a
            held-out image to the nearest one.
        images_per_second: Of sampling.
        model: The model directory.
        report: The page.
        grid: The samples as one picture.
        interrupted: Whether Ctrl-C or SIGTERM ended it early; the same call resumes it.
        tables: For a console: "metrics" and "time".
        commands: What to type next.
    """

    seconds: float = 0.0
    reconstruction_psnr: float | None = None
    code_usage: float | None = None
    loss: float | None = None
    validation_loss: float | None = None
    memorised: float = math.nan
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    model: str
    report: str
    grid: str
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    interrupted: bool = False
    tables: Mapping[str, TableRows] = field(default_factory=dict, metadata={"hidden": True})
    commands: str = field(default="", metadata={"hidden": True})


def quickstart(
    out: Path | str = "runs/quickstart",
    *,
    data: Path | str = "digits",
    image_size: PatchSize | str | None = None,
    depth: int | None = None,
    minutes: float | None = None,
    num: Annotated[int | None, Field(ge=2)] = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> QuickstartResult:
    """Train a tokenizer and an MVAR, generate samples, score them, and write a report.

    By default on bundled handwritten digits; or on images of your own, a tenth of which is held out. The same call
    again resumes where it was interrupted. Each stage leaves its files in `out`.

        result = mvar.quickstart("runs/quickstart", minutes=2)
        print(result.classifier_accuracy, result.report)
        mvar.quickstart("runs/animals", data="animals", image_size=64, minutes=60)

    Args:
        out: Directory for everything.
        data: `digits`, or images as of `train_tokenizer`.
        image_size: Side, or (height, width), also as "96x64"; by default as of `train_tokenizer`.
        depth: Of the MVAR; by default as of `train`.
        minutes: Time to spend on everything, by default 2, or 60 on your own images: steps are measured first, and
            their number fills it. The digits' steps are those that fill it on two CPU cores.
        num: Samples per class to score; by default 100 of digits, or 64 in all.
        seed: Of everything random.
        settings: Changes to the configuration, as "transformer.drop_path=0.2".
        overwrite: Start over.
        dry_run: Only report what would be done; on your own images after a few steps that are measured.
        machine: Device, dtype (auto is float32) and attention backend.
        progress: Called while training, tokenizing, sampling and measuring.

    Raises:
        ConfigError: No time, or settings that cannot be used.
        DataError: `out` is neither empty nor a quickstart's of the same images and settings.
    """
    start, seconds, out = time.monotonic(), dict[str, float](), Path(out)
    digits = (str(data), image_size, depth) == ("digits", None, None)
    minutes = (PRESET_MINUTES if digits else OWN_MINUTES) if minutes is None else minutes
    if not 0 < minutes <= LARGEST_MINUTES:
        raise ConfigError(f"--minutes is {minutes:g}; expected a time above 0 and below a year, for example 2.")
    page, grid, model, samples = out / "index.html", out / "grid.png", out / "mvar", out / "samples.npz"
    names: dict[str, Any] = {"model": str(model), "report": str(page), "grid": str(grid)}
    resolve_dtype(machine.dtype, resolve_device(machine.device))
    if machine.dtype == "auto":
        machine = machine.model_copy(update={"dtype": "float32"})
    computing: dict[str, Any] = {"machine": machine, "progress": progress}
    own, settings = None, list(settings)
    common = {"seed": seed, "overwrite": overwrite, **computing}
    if digits:
        settings = [*_scaled_steps(minutes), *settings]
        common["preset"] = PRESET
        config = load_config(PRESET, settings, {"seed": seed})
    else:
        source = open_images(str(data), max_pixels=machine.max_pixels)
        own = OwnImages(source, image_size, depth, minutes, num, seed, settings)
    common["settings"] = settings
    if dry_run:
        config = config if own is None else own.rehearse(common)
        counts = (10, num or 100) if own is None else (len(own.classes), own.num)
        steps = (
            "train a classifier on the bundled digits" if own is None else f"hold out {len(own.held_out)} images",
            f"train a tokenizer for {config.train_tokenizer.steps} steps{own.size if own is not None else ''}",
            f"turn the images into tokens, scales {config.pyramid}",
            f"train an MVAR for {config.train.steps} steps",
            f"generate {counts[1]} samples of each of {counts[0]} classes, and score them",
            f"write {page}",
        )
        configuration = config.model_dump(mode="json", exclude_none=True)
        planned = DryRun(configuration=configuration, steps=steps, cost=cost_of(config), facts={})
        return QuickstartResult(**names, dry_run=planned)
    if out.exists() and not out.is_dir():
        require_new_directory(out, overwrite)
    out.mkdir(parents=True, exist_ok=True)  # fails before anything slow where nothing can be written
    begun = out / (CLASSIFIER_FILE if own is None else PLAN)
    with DirectoryLock(out):
        if not begun.is_file():
            require_new_directory(out, overwrite)
        elif page.is_file() and not overwrite:
            logger.info("%s is finished: nothing is left to train, and the report is made again.", out)
        if own is None:
            with _timed("classifier", seconds):
                known = begun.is_file() and not overwrite
                classifier = (
                    DemoClassifier.load(begun) if known else train_digits_classifier(begun, config.image_shape, seed)
                )
            images: Any = "digits:train"
            test: Any = "digits:test"
        else:
            with _timed("estimate", seconds):
                own.plan(begun, common, overwrite)
            images, test = own.images, own.held_out

        def options(stage: str) -> dict[str, Any]:
            return common if own is None else common | own.options(stage)

        with _timed("tokenizer", seconds):
            tokenizer = train_tokenizer(data=images if own else "digits", out=out / "tokenizer", **options("tokenizer"))
        if tokenizer.interrupted:
            return QuickstartResult(**names, interrupted=True)
        with _timed("tokens", seconds):
            tokens = tokenize(tokenizer=tokenizer.model, data=images, out=out / "tokens-train", **options("tokens"))
            held = tokenize(
                tokenizer=tokenizer.model, data=test, out=out / "tokens-test", seed=seed, overwrite=overwrite,
                **computing,
            )  # fmt: skip
        if own is not None:
            own.plan_again(begun, tokenizer.seconds, tokenizer.steps)
        with _timed("MVAR", seconds):
            trained = train(
                tokens=tokens.path, validation=held.path, tokenizer=tokenizer.model, out=model, **options("MVAR")
            )  # fmt: skip
        if trained.interrupted:
            return QuickstartResult(**names, interrupted=True)
        classes, num = (["all"], num or 100) if own is None else (own.classes, own.num)
        with _timed("samples", seconds):
            sampled = sample_to(
                samples, checkpoint=model, classes=classes, num=num, seed=seed, batch_size=100, overwrite=True,
                **computing,
            )  # fmt: skip
        if sampled.interrupted:
            return QuickstartResult(**names, interrupted=True)
        with _timed("metrics", seconds):
            with np.load(samples) as file:
                made, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["labels"])
            columns = min(num, SHOWN)
            picture = make_grid(made.unflatten(0, (-1, num))[:, :columns].flatten(0, 1), columns)
            save_png(picture, grid)
            made = made.permute(0, 3, 1, 2).contiguous()
            memorised, neighbours = math.nan, list[Any]()
            if own is None:
                real, tested = (read_digits(split, config.image_shape) for split in ("train", "test"))
                scores = score_samples(classifier, (made, labels), real, tested)
                shown = tested[0]
            else:
                scores, memorised, neighbours, shown = _score_own(tokens.path, own.images, (made, labels))
        with _timed("report", seconds):
            measured: dict[str, Any] = {"data": test, "num": 128} if own is None else {"tokens": held.path, "num": 32}
            attention = analyze_attention(model, out / "attention", overwrite=True, **measured, **computing)
            held_out_loss = math.nan if trained.validation_loss is None else trained.validation_loss
            quality = (tokenizer.psnr, tokenizer.code_usage, memorised, trained.loss, held_out_loss)
            tables = {"metrics": metric_rows(scores, *quality), "time": time_rows(seconds)}
            pipeline = Pipeline.from_pretrained(model, machine=machine)
            originals = shown[:SHOWN].permute(0, 2, 3, 1)
            staged = range(classifier.num_classes) if own is None else sorted(set(labels.tolist()))
            stages = pipeline.sample(staged, seed=0, stages=True).stages
            assert stages is not None
            write_quickstart_page(
                page,
                grid=picture,
                stages=stages,
                originals=originals,
                reconstructions=to_uint8(pipeline.decode(pipeline.encode(from_uint8(originals)))).cpu(),
                attention=attention.plots_svg,
                title=str(data) if own else "handwritten digits",
                classes=", ".join((pipeline.config.class_names or ())[label] for label in staged),
                images="the bundled handwritten digits" if own is None else f"{len(own.images)} images of {data}",
                parameters=format_count(cost_of(pipeline.config).parameters),
                seed=seed,
                sides=str(pipeline.config.pyramid),
                metrics=tables["metrics"],
                recommendation=attention.sentences[-1],
                seconds=tables["time"],
                commands=(commands := next_commands(out, own)),
                neighbours=neighbours,
                memorised=memorised,
                best_step=trained.best_step,
                steps=trained.steps,
            )
        return QuickstartResult(
            **names,
            **asdict(scores),
            seconds=time.monotonic() - start,
            reconstruction_psnr=tokenizer.psnr,
            code_usage=tokenizer.code_usage,
            loss=trained.loss,
            validation_loss=trained.validation_loss,
            memorised=memorised,
            images_per_second=sampled.images_per_second,
            peak_memory_bytes=sampled.peak_memory_bytes,
            stage_seconds=seconds,
            tables={**tables, "time": time_rows(seconds)},
            commands=commands,
        )


class OwnImages:
    """The quickstart's stages on images of your own: a recipe that suits them, and steps that fill the time."""

    def __init__(
        self, source: ImageSource, image_size: PatchSize | str | None, depth: int | None, minutes: float,
        num: int | None, seed: int, settings: list[str],
    ):  # fmt: skip
        test = held_out(source)
        if test is None:
            self.images = hold_out(source, HELD_OUT, MOST_HELD_OUT, seed)
        else:
            self.images = Subset(source, range(len(source)), Subset(test, range(min(len(test), MOST_HELD_OUT))))
        self.recipe = recipes.recipe_for(len(self.images))
        assert self.images.held_out is not None
        self.held_out = self.images.held_out
        suited, why = recipes.tokenizer_settings(self.images, image_size, settings)
        self.size = f" on {len(self.images)} images ({why})"
        self.depth, self.minutes, self.settings = depth or self.recipe.depth, minutes, settings
        counts = np.bincount(self.images.labels, minlength=len(source.class_names))
        largest = sorted(np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist())
        self.classes = [f"#{label}" for label in largest]
        self.num = num or max(2, SAMPLES // len(largest))
        self.tokenizer = {"preset": "tokenizer-64", "settings": [*suited, *settings]}
        self.record: dict[str, Any] = {}
        self.asked = {
            "images": self.images.fingerprint(), "image_size": image_size, "depth": self.depth, "minutes": minutes,
            "seed": seed, "settings": settings,
        }  # fmt: skip

    def options(self, stage: str, rehearsing: bool = False) -> dict[str, Any]:
        """Arguments of `train_tokenizer`, `tokenize` and `train`."""
        if stage == "tokens":
            return {"settings": [VIEWS, *self.settings]}
        steps = REHEARSED_STEPS if rehearsing else self.record["steps"][stage]
        loop = {"steps": steps, "checkpoint_every": max(REHEARSED_STEPS, steps // 10)}
        if stage == "tokenizer":
            return {**self.tokenizer, **loop}
        return {"depth": self.depth, "batch_size": self.recipe.batch, **loop}

    def rehearse(self, common: Mapping[str, Any]) -> RunConfig:
        """Take a few steps of every stage, elsewhere, plan as many as fill the time, and return the configuration."""
        began, times = time.monotonic(), dict[str, list[float]]()

        def clock(stage: str, *_: Any, **__: Any) -> None:
            times.setdefault(stage, []).append(time.monotonic())

        common = {**common, "overwrite": False, "progress": clock}
        few = Subset(self.images, range(min(REHEARSED_IMAGES, len(self.images))))
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            with TemporaryDirectory() as folder:
                tokenizer, tokens, model = (Path(folder) / name for name in ("tokenizer", "tokens", "mvar"))
                train_tokenizer(data=self.images, out=tokenizer, **common | self.options("tokenizer", True))
                encoded = tokenize(tokenizer=tokenizer, data=few, out=tokens, **common | self.options("tokens"))
                train(tokens=tokens, out=model, **common | self.options("MVAR", True))
                machine = common["machine"]
                one = sample_to(model / "one.npz", checkpoint=model, classes=self.classes[:1], num=4, machine=machine)
                analyze_attention(model, model / "attention", tokens=tokens, num=4, machine=machine)
                config, tokenized = (load_config(str(path / "config.yaml")) for path in (model, tokenizer))
        finally:
            logger.setLevel(level)
        per_step = {
            stage: median(after - before for before, after in pairwise(times[name]))
            for stage, name in (("tokenizer", "tokenizer"), ("MVAR", "training"))
        }
        # The rest takes as long as here once more, and longer for more images.
        spent, count = time.monotonic() - began, self.num * len(self.classes)
        rest = spent + one.seconds / 4 * count + encoded.seconds / len(few) * len(self.images)
        left = 60 * self.minutes - spent - rest
        steps = {
            stage: max(REHEARSED_STEPS, int(share * left / per_step[stage]))
            for stage, share in (("tokenizer", TOKENIZER_SHARE), ("MVAR", 1 - TOKENIZER_SHARE))
        }
        self.record = {"asked": self.asked, "spent": spent, "rest": rest, "per_step": per_step, "steps": steps}
        logger.info(
            "On this machine a step of the tokenizer takes %.3g s, one of the MVAR %.3g s, all else about %s: %d and %d"
            " steps fill %g min.%s",
            *per_step.values(), format_seconds(spent + rest), *steps.values(), self.minutes,
            "" if left > 12 * self.minutes else " Little of it is training: use more --minutes.",
        )  # fmt: skip
        lengths = {"train": (config, steps["MVAR"]), "train_tokenizer": (tokenized, steps["tokenizer"])}
        return config.model_copy(
            update={
                name: getattr(of, name).model_copy(update={"steps": count}) for name, (of, count) in lengths.items()
            }
        )

    def plan(self, path: Path, common: Mapping[str, Any], overwrite: bool) -> None:
        """Read the plan of a quickstart that was begun, or rehearse and write one."""
        if path.is_file() and not overwrite:
            self.record = read_json(path)
            if different := differences(self.record["asked"], self.asked):
                raise DataError(
                    f"{path.parent} holds a quickstart with other images or settings: {different}.",
                    "Use the same to resume it, choose another --out, or add --overwrite to start over.",
                )
            return
        self.rehearse(common)
        write_json(path, self.record)

    def plan_again(self, path: Path, seconds: float, steps: int) -> None:
        """Plan the MVAR's steps for what the tokenizer's `steps`, which took `seconds`, have left of the time."""
        if "slower" not in self.record:
            per_step = self.record["per_step"]
            slower = min(3.0, max(0.3, seconds / steps / per_step["tokenizer"]))  # than in the rehearsal
            left = 60 * self.minutes - self.record["spent"] - seconds - self.record["rest"]
            self.record["slower"] = slower
            self.record["steps"]["MVAR"] = max(REHEARSED_STEPS, int(left / slower / per_step["MVAR"]))
            write_json(path, self.record)


def _score_own(
    cache: Path, images: Subset, samples: tuple[Tensor, Tensor]
) -> tuple[DemoScores, float, list[tuple[Tensor, Tensor, str]], Tensor]:
    """Scores of samples (N, 3, H, W) and labels (N,) that need no classifier.

    Returns them, the fraction that is memorised, for the page rows of images with the training views nearest to them,
    and the held-out images uint8 (M, 3, H, W).
    """
    manifest, (height, width) = TokenCache.open(cache).manifest, samples[0].shape[2:]

    def read(source: ImageSource | None, data: DataConfig) -> tuple[Tensor, Tensor]:
        assert source is not None
        views = Views(data, manifest.seed)
        rows, most = len(source) * len(views), max(1, REFERENCE_BYTES // (3 * height * width))
        chosen = np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64))
        batches = pixel_batches(source, (height, width), chosen, views=views)
        pixels, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True))
        return pixels.permute(0, 3, 1, 2).contiguous(), labels

    plain = DataConfig()
    reference, real, test = read(images, manifest.data)[0], read(images, plain), read(images.held_out, plain)[0]
    diversity = [math.nan, math.nan]
    with suppress(DataError):  # no class with two images
        diversity = [pixel_diversity(*samples), pixel_diversity(*real)]
    neighbours, nearest = [], []
    for name, found in (("Samples", samples[0]), ("Held-out images", test)):
        distances, places = nearest_neighbours(found, reference)
        first = distances.argsort()[:SHOWN]
        shown = (found[first].permute(0, 2, 3, 1), reference[places[first]].permute(0, 2, 3, 1))
        neighbours.append((*shown, f"{name} above, what they were nearest to below: at {distances[first[0]]:.3g}, …"))
        nearest.append(distances)
    scores = DemoScores(
        pixel_diversity=diversity[0],
        pixel_diversity_real=diversity[1],
        nearest_distance=float(nearest[0].mean()),
        nearest_distance_real=float(nearest[1].mean()),
    )
    return scores, float((nearest[0] < nearest[1].median() / 2).double().mean()), neighbours, test


def next_commands(out: Path, own: OwnImages | None) -> str:
    """What to type next: more samples, own images or a larger model, published weights."""
    if own is None:
        return f"""# more samples
mvar sample --checkpoint {shlex.quote(str(out / "mvar"))} --class 3,7 --num 16 --out digits.png

# your own images: a folder with one sub-folder per class, or all in one
mvar quickstart --data IMAGES --out runs/own

# published weights
mvar convert --model var_d16.pth --tokenizer vae_ch160v4096z32.pth --out var-d16
mvar sample --checkpoint var-d16 --class 207 --num 4 --out retriever.png"""
    tokens = ["--tokens", str(out / "tokens-train"), "--validation", str(out / "tokens-test")]
    deeper = ["--depth", str(2 * own.depth), "--out", str(out / f"mvar-d{2 * own.depth}")]
    return f"""# more samples
{sample_command(out / "mvar", read_model_config(out / "mvar"))}

# a larger model on the same tokens
{shlex.join(["mvar", "train", *tokens, *deeper])}"""


def _scaled_steps(minutes: float) -> list[str]:
    """Settings that scale the digits' steps to the time."""
    preset = load_config(PRESET)
    scale = max(0.02, (minutes - FIXED_MINUTES) / (PRESET_MINUTES - FIXED_MINUTES))
    steps = {"train": preset.train.steps or 1, "train_tokenizer": preset.train_tokenizer.steps}
    return [f"{section}.steps={max(1, round(scale * count))}" for section, count in steps.items()]


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and keep its time."""
    logger.info("%s …", name)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
