"""`mvar convert`: published .pth files to a model directory, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_count
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_core.config import ModelConfig

EXAMPLE = "mvar convert --model var_d16.pth --tokenizer vae.pth --out var-d16"

DTYPES = ("float32", "bfloat16", "float16")


def run(
    out: options.Out,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="PATH", help="Published transformer; or a model directory.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Published VQVAE. Default: the one beside it.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", metavar="var|mvar", help="Default: as the file says.")] = None,
    pyramid: Annotated[
        str | None, typer.Option("--pyramid", metavar="1,2,3x4…", help="Sides of the scales, or height x width.")
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(
            "--windows",
            metavar="K|K,K,…|auto",
            help="Window of the last two scales, of each, or of those where it pays.",
        ),
    ] = None,
    scale_prefixes: Annotated[
        str | None, typer.Option("--scale-prefixes", metavar="1|2|3|all", help="Scales that a token sees.")
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="directory|official", help="What to write.")] = "directory",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help=f"Of the weights: {', '.join(DTYPES)}.")
    ] = "float32",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """Turn published .pth files into a model directory, or with --to official a model directory into such files.

    Sizes are read off the file. Attention masks in it are never used: which token sees which follows from kind,
    windows and scale prefixes.
    """
    console = Console(as_json)
    if to not in ("directory", "official"):
        raise ConfigError(f"--to {to!r} is not known.", "Use directory or official.")
    if kind not in (None, "var", "mvar"):
        raise ConfigError(f"--kind {kind!r} is not known.", "Use var or mvar.")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not known.", f"Use {', '.join(DTYPES)}.")
    if model is None and tokenizer is None:
        raise ConfigError("There is nothing to convert.", "Give --model and --tokenizer, or --tokenizer alone.")
    if to == "official":
        if pyramid or windows or scale_prefixes or tokenizer:
            raise ConfigError("--to official writes a model directory as it is.", "Give it as --model, with --out.")
        _export(console, model, kind, out, overwrite, dry_run)
        return
    choices = {
        "patch_sizes": options.parse_sizes(pyramid, "--pyramid"),
        "windows": options.parse_windows(windows),
        "scale_prefixes": options.parse_prefixes(scale_prefixes),
    }
    _import(console, model, tokenizer, kind, choices, out, dtype, overwrite, dry_run)


def _import(
    console: Console,
    model: Path | None,
    tokenizer: Path | None,
    kind: Any,
    choices: dict[str, Any],
    out: Path,
    dtype: str,
    overwrite: bool,
    dry_run: bool,
) -> None:
    from mvar_core.io.files import atomic_directory, require_new_directory
    from mvar_core.models import official
    from mvar_core.models.conversion import import_official
    from mvar_core.runtime import DTYPES as TORCH_DTYPES

    require_new_directory(out, overwrite)
    if tokenizer is None:
        assert model is not None
        tokenizer = official.tokenizer_beside(model)
    if dry_run:
        from mvar_cli.costs import finish_dry_run

        config = official.convert(model, tokenizer, kind=kind, **choices).config
        finish_dry_run(console, config, [f"read {model or tokenizer}", f"write {out} in {dtype}"])
        return
    with atomic_directory(out) as temporary:
        config = import_official(model, tokenizer, temporary, kind=kind, dtype=TORCH_DTYPES[dtype], **choices)
    _report(console, config, out)


def _export(console: Console, model: Path | None, kind: Any, out: Path, overwrite: bool, dry_run: bool) -> None:
    from mvar_core.io.files import atomic_directory, require_new_directory
    from mvar_core.models.conversion import export_official
    from mvar_core.models.directory import read_model_config

    assert model is not None
    config = read_model_config(model)
    require_new_directory(out, overwrite)
    if dry_run:
        from mvar_cli.costs import finish_dry_run

        finish_dry_run(console, config, [f"write published files to {out}"])
        return
    with atomic_directory(out) as temporary:
        written = [out / path.name for path in export_official(model, temporary, kind=kind)]
    for path in written:
        console.say(f"Written: {path}")
    console.finish({"outputs": [str(path) for path in written], **_facts(config)})


def _report(console: Console, config: ModelConfig, out: Path) -> None:
    prefixes = config.attention.scale_prefixes
    rows = [
        ("pyramid", str(config.pyramid)),
        ("scales that a token sees", "all earlier ones" if prefixes == "all" else str(prefixes)),
        ("windows", ", ".join(str(window) if window else "whole" for window in config.windows)),
        ("codebook", f"{config.tokenizer.codebook_size} × {config.tokenizer.latent_channels}"),
    ]
    if config.transformer is not None:
        facts = _facts(config)
        rows.insert(0, ("transformer", f"depth {config.transformer.depth}, {format_count(facts['parameters'])}"))
        sampling = config.sampling
        advice = f"cfg {sampling.cfg}, top-k {sampling.top_k}, top-p {sampling.top_p}"
        rows.append(("recommended sampling", advice))
    console.table(config.name, ("what", "as read from the file"), rows)
    console.say(f"Written: {out}")
    if config.transformer is not None:
        label = min(207, config.transformer.num_classes - 1)
        console.say(f"Next: mvar sample --checkpoint {out} --class {label} --num 4 --out grid.png")
    console.finish({"model": str(out), **_facts(config)})


def _facts(config: ModelConfig) -> dict[str, Any]:
    from mvar_cli.costs import cost_of

    values = config.model_dump(mode="json", exclude_none=True, exclude={"class_names"})
    return {"parameters": cost_of(config).parameters, "configuration": values}
