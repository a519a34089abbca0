"""From bundled images to a model, samples, metrics and a report, in minutes on a CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.config.training import DataConfig
from mvar_core.data.tokens import TokenCache
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.demo import DemoClassifier, read_digits, train_digits_classifier
from mvar_core.evaluation.demo_scores import DemoScores, score_samples
from mvar_core.formatting import format_count
from mvar_core.io.files import atomic_path, require_new_directory
from mvar_core.io.pictures import make_grid, save_png
from mvar_core.io.pixels import from_uint8, to_uint8
from mvar_core.models.directory import read_model_config
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress, stage
from mvar_core.reports.pages import TableRows
from mvar_core.reports.quickstart_page import metric_rows, time_rows, write_quickstart_page
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes
from mvar_core.workflows.attention import analyze_attention
from mvar_core.workflows.tokenize import write_tokens
from mvar_core.workflows.train import fit_to_tokens, train_on_tokens
from mvar_core.workflows.train_tokenizer import train_on_images

PRESET = "digits"
PRESET_MINUTES = 2.0
"""The steps of the preset fill this time on two CPU cores."""
FIXED_MINUTES = 0.25
"""The share of it that is not training: classifier, samples, metrics, report."""
CLASSIFIER = "classifier.safetensors"

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class QuickstartResult(DemoScores, Result):
    """What the quickstart trained, and the scores of its samples.

    Attributes:
        seconds: What this call took.
        reconstruction_psnr: Of the tokenizer on test images, in dB.
        code_usage: Fraction of the codebook that some scale uses.
        loss: Training loss of the MVAR at its last logged step.
        images_per_second: Of sampling.
        peak_memory_bytes: The most memory that this process used.
        model: The model directory.
        report: The page.
        grid: The samples as one picture.
        stage_seconds: Time of each stage.
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
    num: int = 100,
    seed: int = 0,
    settings: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> QuickstartResult:
    """Train a tokenizer and an MVAR on handwritten digits, generate samples, score them, and write a report.

    The same call again resumes where it was interrupted. Stages: classifier, tokenizer, tokens, MVAR, samples, metrics,
    report; each leaves its files in `out`.

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
    start = time.monotonic()
    out = Path(out)
    config = _configuration(minutes, seed, settings)
    model_dir, page = out / "mvar", out / "index.html"
    names: dict[str, Any] = {"model": str(model_dir), "report": str(page), "grid": str(out / "grid.png")}
    if dry_run:
        return QuickstartResult(**names, dry_run=_planned(config, out, num))
    _check_directory(out, overwrite)
    if machine.dtype == "auto":
        machine = machine.model_copy(update={"dtype": "float32"})
    resume, seconds = not overwrite, dict[str, float]()

    with _timed("classifier", seconds):
        known = resume and (out / CLASSIFIER).is_file()
        classifier = (
            DemoClassifier.load(out / CLASSIFIER)
            if known
            else train_digits_classifier(out / CLASSIFIER, config.image_shape, config.seed)
        )
    with _timed("tokenizer", seconds):
        tokenizer_dir = out / "tokenizer"
        tokenizer = train_on_images(config, "digits", tokenizer_dir, machine=machine, resume=resume, progress=progress)
    if tokenizer.interrupted:
        return QuickstartResult(**names, interrupted=True)
    with _timed("tokens", seconds):
        tokens, held_out = (
            _tokenized(
                config.model_copy(update={"data": views}), split, out, tokenizer_dir, overwrite, machine, progress
            )
            for split, views in (("train", config.data), ("test", DataConfig()))
        )
    with _timed("MVAR", seconds):
        model = fit_to_tokens(config, read_model_config(tokenizer_dir), tokens.class_names)
        trained = train_on_tokens(
            model, tokens, tokenizer_dir, model_dir, machine=machine, resume=resume, validation=held_out,
            progress=progress,
        )  # fmt: skip
    if trained.interrupted:
        return QuickstartResult(**names, interrupted=True)
    pipeline = Pipeline.from_pretrained(
        model_dir, device=machine.device, dtype=machine.dtype, attention=machine.attention
    )
    with _timed("samples", seconds):
        images, labels = _samples(pipeline, num, config.seed, out, progress)
    with _timed("metrics", seconds):
        train, test = (read_digits(split, config.image_shape) for split in ("train", "test"))
        samples = (images.permute(0, 3, 1, 2).contiguous(), labels)
        scores = score_samples(classifier, samples, train, test)
    with _timed("report", seconds):
        attention = analyze_attention(
            model_dir, out / "attention", data="digits:test", num=128, overwrite=True, machine=machine,
            progress=progress,
        )  # fmt: skip
        metrics = metric_rows(scores, tokenizer.psnr, tokenizer.code_usage)
        originals = test[0][:16].permute(0, 2, 3, 1)
        decoded = pipeline.decode(pipeline.encode(from_uint8(originals)))
        stages = pipeline.sample(range(len(tokens.class_names)), seed=0, stages=True).stages
        assert stages is not None
        write_quickstart_page(
            page,
            grid=_grid(images, num),
            stages=stages,
            originals=originals,
            reconstructions=to_uint8(decoded).cpu(),
            attention=attention.plots_svg,
            parameters=format_count(cost_of(model).parameters),
            seed=config.seed,
            sides=str(config.pyramid),
            metrics=metrics,
            recommendation=attention.sentences[-1],
            seconds=time_rows(seconds),
            commands=next_commands(out),
        )
    return QuickstartResult(
        **names,
        **asdict(scores),
        seconds=time.monotonic() - start,
        reconstruction_psnr=tokenizer.psnr,
        code_usage=tokenizer.code_usage,
        loss=trained.loss,
        images_per_second=len(images) / seconds["samples"],
        peak_memory_bytes=peak_memory_bytes(pipeline.device),
        stage_seconds=seconds,
        tables={"metrics": metrics, "time": time_rows(seconds)},
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


def _configuration(minutes: float, seed: int, settings: Sequence[str]) -> RunConfig:
    """The preset with its steps scaled to the time."""
    if minutes <= 0:
        raise ConfigError(f"--minutes is {minutes:g}; expected a time above 0, for example 2.")
    preset = load_config(PRESET)
    scale = max(0.02, (minutes - FIXED_MINUTES) / (PRESET_MINUTES - FIXED_MINUTES))
    steps = {"train": preset.train.steps or 1, "train_tokenizer": preset.train_tokenizer.steps}
    scaled = [f"{section}.steps={max(1, round(scale * count))}" for section, count in steps.items()]
    return load_config(PRESET, [*scaled, *settings], {"seed": seed})


def _check_directory(out: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something else than a quickstart."""
    if out.is_file():
        raise DataError(f"{out} is a file; expected a directory.", "Choose another --out.")
    if not (out / CLASSIFIER).is_file():
        require_new_directory(out, overwrite)


def _tokenized(
    config: RunConfig, split: str, out: Path, tokenizer: Path, overwrite: bool, machine: Machine,
    progress: Progress | None,
) -> TokenCache:  # fmt: skip
    cache = out / f"tokens-{split}"
    write_tokens(
        cache, data=f"digits:{split}", tokenizer=tokenizer, config=config, overwrite=overwrite, machine=machine,
        progress=progress,
    )  # fmt: skip
    return TokenCache.open(cache)


def _samples(pipeline: Pipeline, num: int, seed: int, out: Path, progress: Progress | None) -> tuple[Tensor, Tensor]:
    """`num` samples of each class, as `mvar sample --class all` generates them; also grid.png and samples.npz."""
    assert pipeline.config.transformer is not None
    labels = [label for label in range(pipeline.config.transformer.num_classes) for _ in range(num)]
    images = pipeline.sample(labels, seed=seed, batch_size=100, progress=stage(progress, "sampling")).images
    with atomic_path(out / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images.numpy(), labels=np.asarray(labels, np.int64))
    save_png(_grid(images, num), out / "grid.png")
    return images, torch.tensor(labels)


def _grid(images: Tensor, num: int) -> np.ndarray:
    """Up to 16 samples of each class, one row per class."""
    shown = min(num, 16)
    return make_grid(images.unflatten(0, (-1, num))[:, :shown].flatten(0, 1), shown)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and keep its time."""
    logger.info("%s …", name)
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def _planned(config: RunConfig, out: Path, num: int) -> DryRun:
    return DryRun(
        configuration=config.model_dump(mode="json", exclude_none=True),
        steps=(
            "train a classifier on the bundled digits",
            f"train a tokenizer for {config.train_tokenizer.steps} steps",
            "turn the digits into tokens",
            f"train an MVAR for {config.train.steps} steps",
            f"generate {num} samples per class and score them",
            f"write {out / 'index.html'}",
        ),
        cost=cost_of(config),
        facts={},
    )
