"""From bundled images to a model, samples, metrics and a report, in minutes on a CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError
from mvar_core.evaluation.demo import CLASSIFIER_FILE, DemoClassifier, read_digits, train_digits_classifier
from mvar_core.evaluation.demo_scores import DemoScores, score_samples
from mvar_core.formatting import format_count
from mvar_core.io.files import require_new_directory
from mvar_core.io.pixels import from_uint8, make_grid, save_png, to_uint8
from mvar_core.io.resumable import DirectoryLock
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.reports.pages import TableRows
from mvar_core.reports.quickstart_page import metric_rows, time_rows, write_quickstart_page
from mvar_core.results import DryRun, Result
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.workflows.attention import analyze_attention
from mvar_core.workflows.sample import sample_to
from mvar_core.workflows.tokenize import tokenize
from mvar_core.workflows.train import train
from mvar_core.workflows.train_tokenizer import train_tokenizer

PRESET = "digits"
PRESET_MINUTES = 2.0
"""The steps of the preset fill this time on two CPU cores."""
FIXED_MINUTES = 0.25
"""The share of it that is not training: classifier, samples, metrics, report."""
LARGEST_MINUTES = 365 * 24 * 60
SHOWN = 16
"""Samples of each class in the picture."""

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(DemoScores, Result):
    """What the quickstart trained, and the scores of its samples.

    Attributes:
        reconstruction_psnr: Of the tokenizer on test images, in dB.
        code_usage: Fraction of the codebook that some scale uses.
        loss: Training loss of the MVAR at its last logged step.
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
    minutes: float = PRESET_MINUTES,
    num: Annotated[int, Field(ge=2)] = 100,
    seed: int = 0,
    settings: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> QuickstartResult:
    """Train a tokenizer and an MVAR on handwritten digits, generate samples, score them, and write a report.

    The same call again resumes where it was interrupted. Each stage leaves its files in `out`.

        result = mvar.quickstart("runs/quickstart", minutes=2)
        print(result.classifier_accuracy, result.report)

    Args:
        out: Directory for everything.
        minutes: Time to spend on two CPU cores; the preset's training steps are scaled to it.
        num: Samples per class to score.
        seed: Of everything random.
        settings: Changes to the preset `digits`, as "transformer.depth=4".
        overwrite: Start over.
        dry_run: Only report what would be done.
        machine: Device, dtype (auto is float32) and attention backend.
        progress: Called while training, tokenizing, sampling and measuring.

    Raises:
        ConfigError: No time, or settings that cannot be used.
        DataError: `out` is neither empty nor a quickstart's.
    """
    start, seconds, out = time.monotonic(), dict[str, float](), Path(out)
    settings = [*_scaled_steps(minutes), *settings]
    config = load_config(PRESET, settings, {"seed": seed})
    page, grid, model, samples = out / "index.html", out / "grid.png", out / "mvar", out / "samples.npz"
    names: dict[str, Any] = {"model": str(model), "report": str(page), "grid": str(grid)}
    resolve_dtype(machine.dtype, resolve_device(machine.device))
    if dry_run:
        steps = (
            "train a classifier on the bundled digits",
            f"train a tokenizer for {config.train_tokenizer.steps} steps",
            "turn the digits into tokens",
            f"train an MVAR for {config.train.steps} steps",
            f"generate {num} samples per class and score them",
            f"write {page}",
        )
        configuration = config.model_dump(mode="json", exclude_none=True)
        return QuickstartResult(
            **names, dry_run=DryRun(configuration=configuration, steps=steps, cost=cost_of(config), facts={})
        )
    if machine.dtype == "auto":
        machine = machine.model_copy(update={"dtype": "float32"})
    computing: dict[str, Any] = {"machine": machine, "progress": progress}
    common = {"preset": PRESET, "settings": settings, "seed": seed, "overwrite": overwrite, **computing}
    if out.exists() and not out.is_dir():
        require_new_directory(out, overwrite)
    out.mkdir(parents=True, exist_ok=True)  # fails before anything slow where nothing can be written
    with DirectoryLock(out):
        if not (out / CLASSIFIER_FILE).is_file():
            require_new_directory(out, overwrite)
        elif page.is_file() and not overwrite:
            logger.info("%s is finished: nothing is left to train, and the report is made again.", out)
        with _timed("classifier", seconds):
            path = out / CLASSIFIER_FILE
            known = path.is_file() and not overwrite
            classifier = DemoClassifier.load(path) if known else train_digits_classifier(path, config.image_shape, seed)
        with _timed("tokenizer", seconds):
            tokenizer = train_tokenizer(data="digits", out=out / "tokenizer", **common)
        if tokenizer.interrupted:
            return QuickstartResult(**names, interrupted=True)
        with _timed("tokens", seconds):
            tokens = tokenize(tokenizer=tokenizer.model, data="digits:train", out=out / "tokens-train", **common)
            held_out = tokenize(
                tokenizer=tokenizer.model, data="digits:test", out=out / "tokens-test", seed=seed, overwrite=overwrite,
                **computing,
            )  # fmt: skip
        with _timed("MVAR", seconds):
            trained = train(
                tokens=tokens.path, validation=held_out.path, tokenizer=tokenizer.model, out=model, **common
            )  # fmt: skip
        if trained.interrupted:
            return QuickstartResult(**names, interrupted=True)
        with _timed("samples", seconds):
            sampled = sample_to(
                samples,
                checkpoint=model,
                classes="all",
                num=num,
                seed=seed,
                batch_size=100,
                overwrite=True,
                **computing,
            )
        if sampled.interrupted:
            return QuickstartResult(**names, interrupted=True)
        with _timed("metrics", seconds):
            with np.load(samples) as file:
                images, labels = torch.from_numpy(file["arr_0"]), torch.from_numpy(file["labels"])
            columns = min(num, SHOWN)
            picture = make_grid(images.unflatten(0, (-1, num))[:, :columns].flatten(0, 1), columns)
            save_png(picture, grid)
            real, test = (read_digits(split, config.image_shape) for split in ("train", "test"))
            scores = score_samples(classifier, (images.permute(0, 3, 1, 2).contiguous(), labels), real, test)
        with _timed("report", seconds):
            attention = analyze_attention(
                model, out / "attention", data="digits:test", num=128, overwrite=True, **computing
            )
            tables = {"metrics": metric_rows(scores, tokenizer.psnr, tokenizer.code_usage), "time": time_rows(seconds)}
            pipeline = Pipeline.from_pretrained(model, machine=machine)
            originals = test[0][:SHOWN].permute(0, 2, 3, 1)
            stages = pipeline.sample(range(classifier.num_classes), seed=0, stages=True).stages
            assert stages is not None
            write_quickstart_page(
                page,
                grid=picture,
                stages=stages,
                originals=originals,
                reconstructions=to_uint8(pipeline.decode(pipeline.encode(from_uint8(originals)))).cpu(),
                attention=attention.plots_svg,
                parameters=format_count(cost_of(pipeline.config).parameters),
                seed=seed,
                sides=str(config.pyramid),
                metrics=tables["metrics"],
                recommendation=attention.sentences[-1],
                seconds=tables["time"],
                commands=next_commands(out),
            )
        return QuickstartResult(
            **names,
            **asdict(scores),
            seconds=time.monotonic() - start,
            reconstruction_psnr=tokenizer.psnr,
            code_usage=tokenizer.code_usage,
            loss=trained.loss,
            images_per_second=sampled.images_per_second,
            peak_memory_bytes=sampled.peak_memory_bytes,
            stage_seconds=seconds,
            tables={**tables, "time": time_rows(seconds)},
            commands=next_commands(out),
        )


def next_commands(out: Path) -> str:
    """What to type next: more samples, own images, published weights."""
    return f"""# more samples
mvar sample --checkpoint {out / "mvar"} --class 3,7 --num 16 --out digits.png

# your own images: a folder with one sub-folder per class
mvar train-tokenizer --preset digits --data IMAGES --out runs/tokenizer
mvar tokenize --tokenizer runs/tokenizer --preset digits --data IMAGES --out runs/tokens
mvar train --preset digits --tokens runs/tokens --out runs/mvar

# published weights
mvar convert --model var_d16.pth --tokenizer vae_ch160v4096z32.pth --out var-d16
mvar sample --checkpoint var-d16 --class 207 --num 4 --out retriever.png"""


def _scaled_steps(minutes: float) -> list[str]:
    """Settings that scale the preset's steps to the time."""
    if not 0 < minutes <= LARGEST_MINUTES:
        raise ConfigError(f"--minutes is {minutes:g}; expected a time above 0 and below a year, for example 2.")
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
