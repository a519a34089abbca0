"""`mvar quickstart`: the whole story on bundled images, from nothing to a page that shows it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from mvar_cli.story import Results
    from mvar_core.config import RunConfig
    from mvar_core.pipeline import Pipeline

EXAMPLE = "mvar quickstart --out runs/quickstart"

PRESET = "digits"
PRESET_MINUTES = 2.0
"""The steps of the preset fill this time on two CPU cores."""
FIXED_MINUTES = 0.25
"""Part of it that does not train: classifier, samples, measures, report."""


def run(
    out: options.Out = Path("runs/quickstart"),
    minutes: Annotated[
        float, typer.Option("--minutes", metavar="N", help="Time to spend on two CPU cores.")
    ] = PRESET_MINUTES,
    num: Annotated[int, typer.Option("--num", min=2, metavar="N", help="Samples per class to measure.")] = 100,
    seed: options.Seed = 0,
    settings: options.Settings = None,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """From bundled images to samples, measures and a report, in minutes on a CPU.

    Trains a tokenizer and an MVAR on handwritten digits, draws samples, measures them, and writes index.html. Running
    the same command again goes on where it stopped.
    """
    console = Console(as_json)
    config = configuration(minutes, seed, settings or [])
    if dry_run:
        _show_plan(console, config, out, num)
        return
    story = Story(console, config, out, device, overwrite)
    story.prepare()
    start = time.monotonic()
    results = story.tell(num)
    seconds = time.monotonic() - start
    _report(console, out, results, seconds, device)


def configuration(minutes: float, seed: int, settings: list[str]) -> RunConfig:
    """The preset with its steps scaled to the time.

    Raises:
        ConfigError: No time, or settings that cannot be used.
    """
    from mvar_core.config.presets import load_config

    if minutes <= 0:
        raise ConfigError(f"--minutes is {minutes:g}; expected a time above 0, for example 2.")
    preset = load_config(PRESET)
    scale = max(0.02, (minutes - FIXED_MINUTES) / (PRESET_MINUTES - FIXED_MINUTES))
    steps = {
        "train": max(1, round(scale * (preset.train.steps or 1))),
        "train_tokenizer": max(1, round(scale * preset.train_tokenizer.steps)),
    }
    scaled = [f"{section}.steps={count}" for section, count in steps.items()]
    return load_config(PRESET, [*scaled, *settings], {"seed": seed})


class Story:
    """The stages, one after the other; each leaves its files in the output directory and can be resumed.

    Args:
        console: Where to report.
        config: From `configuration`.
        out: Where everything goes.
        device: Where to compute.
        overwrite: Start over.
    """

    def __init__(self, console: Console, config: RunConfig, out: Path, device: str, overwrite: bool):
        self.console = console
        self.config = config
        self.out = out
        self.device = device
        self.overwrite = overwrite
        self.seconds: dict[str, float] = {}

    def prepare(self) -> None:
        """Refuse a directory that holds something else.

        Raises:
            DataError: `out` is neither empty nor a quickstart's.
        """
        from mvar_core.io.files import require_new_directory

        if not self.overwrite and not (self.out / "classifier.safetensors").is_file():
            require_new_directory(self.out, overwrite=False)
        elif self.out.is_file():
            raise DataError(f"{self.out} is a file; expected a directory.", "Choose another --out.")

    def tell(self, num: int) -> Results:
        """Train, draw, measure, write the page."""
        from mvar_cli.story import Results
        from mvar_cli.tokenization import tokenize_run
        from mvar_cli.training import fit_to_tokens, train_run, train_tokenizer_run
        from mvar_core.data.tokens import TokenCache
        from mvar_core.evaluation.demo import CLASSIFIER_FILE, DemoClassifier, read_digits, train_digits_classifier
        from mvar_core.evaluation.demo_scores import score_samples as measure_samples
        from mvar_core.models.directory import read_model_config
        from mvar_core.pipeline import Pipeline

        config, shape = self.config, self.config.image_shape
        tokenizer_dir, model_dir = self.out / "tokenizer", self.out / "mvar"
        machine: dict[str, Any] = {"device": self.device, "dtype": "float32"}
        resume = not self.overwrite

        def classify() -> Any:
            path = self.out / CLASSIFIER_FILE
            if path.is_file() and resume:
                return DemoClassifier.load(path)
            return train_digits_classifier(path, shape, config.seed)

        def tokenize(split: str) -> TokenCache:
            path = self.out / f"tokens-{split}"
            views = config.data if split == "train" else type(config.data)()
            settings = {"views": views, "seed": config.seed, "overwrite": self.overwrite, **machine}
            tokenize_run(self.console, tokenizer_dir, config, f"digits:{split}", path, **settings)
            return TokenCache.open(path)

        classifier = self.stage("classifier", classify)
        tokenizer = self.stage(
            "tokenizer",
            lambda: train_tokenizer_run(self.console, config, "digits", tokenizer_dir, resume=resume, **machine),
        )
        _stop_if(tokenizer.interrupted, self.console)
        tokens, held_out = self.stage("tokens", lambda: (tokenize("train"), tokenize("test")))
        model = fit_to_tokens(config, read_model_config(tokenizer_dir), tokens.class_names)
        trained = self.stage(
            "MVAR",
            lambda: train_run(
                self.console,
                model,
                tokens,
                tokenizer_dir,
                model_dir,
                resume=resume,
                validation=held_out,
                attention="auto",
                **machine,
            ),
        )
        _stop_if(trained.interrupted, self.console)
        pipeline = Pipeline.from_pretrained(model_dir, **machine)
        samples = self.stage("samples", lambda: self.draw(pipeline, num))
        train, test = read_digits("train", shape), read_digits("test", shape)
        measures = self.stage("measures", lambda: measure_samples(classifier, samples, train, test))
        report = self.out / "index.html"
        results = Results(
            tokenizer, measures, model, self.seconds, _parameters(model), trained.loss, len(samples[0]), report
        )
        self.stage("report", lambda: self.write_report(pipeline, samples, test[0], results))
        return results

    def stage(self, name: str, work: Any) -> Any:
        """Do a part of the work and keep its time."""
        self.console.note(f"{name} …")
        start = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - start
        return result

    def draw(self, pipeline: Pipeline, num: int) -> tuple[Tensor, Tensor]:
        """`num` samples of each class, as `mvar sample --class all` draws them; also grid.png and samples.npz."""
        import numpy as np
        import torch

        from mvar_core.io.files import atomic_path
        from mvar_core.io.pictures import save_grid

        labels = [label for label in range(pipeline.transformer.no_class) for _ in range(num)]
        with self.console.progress("sampling") as progress:
            drawn = pipeline.sample(labels, seed=self.config.seed, batch_size=100, progress=progress)
        with atomic_path(self.out / "samples.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=drawn.images.numpy(), labels=np.asarray(labels, np.int64))
        shown = min(num, 16)
        first = drawn.images.unflatten(0, (-1, num))[:, :shown].flatten(0, 1)
        save_grid(first, self.out / "grid.png", shown)
        return drawn.images.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)

    def write_report(self, pipeline: Pipeline, samples: tuple[Tensor, Tensor], test: Tensor, results: Results) -> None:
        """Attention report, curves, and the page."""
        from mvar_cli.story_page import write_page
        from mvar_core.workflows.attention import _measure, tokens_of_images, write_attention_report

        source = tokens_of_images(pipeline, "digits:test", num=128, batch_size=32, seed=0)
        attention = _measure(pipeline, source, 0.95, None)
        write_attention_report(attention, self.out / "attention", pipeline, source.name)
        write_page(self.out, pipeline, test, results, attention)


def _stop_if(interrupted: bool, console: Console) -> None:
    if interrupted:
        raise options.interrupted(console)


def _parameters(config: RunConfig) -> int:
    from mvar_cli.costs import cost_of

    return cost_of(config).parameters


def _report(console: Console, out: Path, results: Results, seconds: float, device: str) -> None:
    from mvar_cli.story import next_commands
    from mvar_cli.story_page import measure_rows
    from mvar_core.runtime import peak_memory_bytes, resolve_device

    heading, *rows = measure_rows(results)
    console.table("measures", heading, rows)
    console.table(
        "time", ("stage", "time"), [(name, format_seconds(spent)) for name, spent in results.stage_seconds.items()]
    )
    drawn = results.num_samples / results.stage_seconds["samples"]
    memory = peak_memory_bytes(resolve_device(device))
    console.table(
        "throughput and memory",
        ("what", "how much"),
        [("sampling", f"{drawn:.0f} images/s"), ("peak memory", format_bytes(memory))],
    )
    console.say(f"Look at {results.report} and {out / 'grid.png'}.")
    console.say()
    console.say(next_commands(out))
    console.finish(
        {
            "seconds": seconds,
            **vars(results.measures),
            "reconstruction_psnr": results.tokenizer.psnr,
            "code_usage": results.tokenizer.code_usage,
            "loss": results.loss,
            "images_per_second": drawn,
            "peak_memory_bytes": memory,
            "model": str(out / "mvar"),
            "report": str(results.report),
            "grid": str(out / "grid.png"),
            "stage_seconds": results.stage_seconds,
        }
    )


def _show_plan(console: Console, config: RunConfig, out: Path, num: int) -> None:
    from mvar_cli.costs import finish_dry_run

    plan = [
        "train a classifier on the bundled digits",
        f"train a tokenizer for {config.train_tokenizer.steps} steps",
        "turn the digits into tokens",
        f"train an MVAR for {config.train.steps} steps",
        f"draw {num} samples per class and measure them",
        f"write {out / 'index.html'}",
    ]
    finish_dry_run(console, config, plan)
