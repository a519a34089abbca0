"""`mvar train-tokenizer`: a multi-scale residual VQVAE, from images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_seconds
from mvar_cli.old_groups import LoopOptions

if TYPE_CHECKING:
    from mvar_core.config import RunConfig
    from mvar_core.training.tokenizer import TokenizerTrainResult

EXAMPLE = "mvar train-tokenizer --preset digits --data digits --out runs/tokenizer"


def run(
    *,
    preset: options.RequiredPreset,
    data: options.Data,
    out: options.Out,
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps.")] = None,
    batch_size: options.BatchSize = None,
    seed: options.OptionalSeed = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--start", metavar="DIR|FILE.pth", help="Tokenizer to go on from, a model directory or published."
        ),
    ] = None,
    new_codebook: Annotated[
        bool, typer.Option("--new-codebook", help="With --start: start the codebook anew, in any size.")
    ] = False,
    vgg_weights: Annotated[
        Path | None, typer.Option("--vgg-weights", metavar="FILE", help="VGG16, for the perceptual loss.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option("--lpips-weights", metavar="FILE", help="LPIPS' weights, for the perceptual loss.")
    ] = None,
    loop: LoopOptions,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Train a multi-scale residual VQVAE on images.

    Running the same command again goes on where it stopped. The run directory is also a model directory. Under torchrun
    or --nproc the processes share every batch.
    """
    from mvar_core.config.presets import load_config
    from mvar_core.errors import ConfigError

    if new_codebook and start is None:
        raise ConfigError("--new-codebook goes with --start.", "Without --start the codebook is new anyway.")
    train = {"steps": steps, "batch_size": batch_size, **loop.keys}
    size = options.parse_size(image_size, "--image-size")
    config = load_config(preset, settings or [], {"seed": seed, "image_size": size, "train_tokenizer": train})
    config = config.model_copy(update={"transformer": None})

    from mvar_core.data.images import open_images

    source = open_images(data)
    if dry_run:
        from mvar_cli.costs import finish_dry_run

        chosen = config.train_tokenizer
        plan = [f"train {chosen.steps} steps of {chosen.batch_size} of {len(source)} images", f"write {out}"]
        if start is not None:
            plan.insert(0, f"start from the tokenizer of {start}{' with a new codebook' if new_codebook else ''}")
        finish_dry_run(Console(as_json), config, plan, images=len(source))
        return

    from mvar_cli.processes import processes
    from mvar_cli.tokenizer_training import TokenizerFiles, train_tokenizer_run
    from mvar_cli.training import prepare_run

    files = TokenizerFiles(start, new_codebook, vgg_weights, lpips_weights)
    with processes(device) as team:
        console, own = team.console(as_json), team.device(device)
        resume = team.from_first(lambda: prepare_run(out, resume, overwrite))
        source.check()
        result = train_tokenizer_run(console, config, data, out, device=own, dtype=dtype, resume=resume, files=files)
        _report(console, config, data, out, result, own, team.count)
    if result.interrupted:
        raise options.interrupted(console)


def _report(
    console: Console,
    config: RunConfig,
    data: str,
    out: Path,
    result: TokenizerTrainResult,
    device: str,
    processes: int,
) -> None:
    from mvar_core.runtime import peak_memory_bytes, resolve_device

    speed = result.steps * config.train_tokenizer.batch_size / max(result.seconds, 1e-9)
    memory = peak_memory_bytes(resolve_device(device))
    _show(console, config, result, speed, memory)
    if not result.interrupted:
        console.say(f"Written: {out}")
        console.say(f"Next: mvar tokenize --checkpoint {out} --data {data} --out {out.parent / 'tokens'}")
    console.finish(
        {
            "steps": result.steps,
            "loss": result.loss,
            "model": str(out),
            "seconds": result.seconds,
            "images_per_second": speed,
            "peak_memory_bytes": memory,
            "psnr": result.psnr,
            "code_usage": result.code_usage,
            "usage_per_scale": result.usage_per_scale,
            "interrupted": result.interrupted,
            "processes": processes,
        }
    )


def _show(console: Console, config: RunConfig, result: TokenizerTrainResult, speed: float, memory: int) -> None:
    if result.interrupted:
        console.table(config.name, ("steps", "time"), [(result.steps, format_seconds(result.seconds))])
        return
    console.table(
        config.name,
        ("steps", "loss", "PSNR (dB)", "codes used", "time", "images/s", "peak memory"),
        [
            (
                result.steps,
                result.loss,
                result.psnr,
                f"{result.code_usage:.1%}",
                format_seconds(result.seconds),
                speed,
                format_bytes(memory),
            )
        ],
    )
    usage = [f"{part:.1%}" for part in result.usage_per_scale]
    console.table("codes used, per scale", ("side", *config.pyramid.names), [("part of the codebook", *usage)])
