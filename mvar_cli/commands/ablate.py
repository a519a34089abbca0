"""`mvar ablate`: the two ablations of the MVAR paper on the user's data, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes, format_number
from mvar_core.errors import ConfigError

if TYPE_CHECKING:
    from mvar_cli.ablation_request import AblationRequest
    from mvar_core.analysis.ablation import WindowEntry
    from mvar_core.pyramid import ScalePrefixes

EXAMPLE = "mvar ablate --preset digits --data digits --windows 3,5,whole --out ablation"

WINDOWS = "3,5,7,9,whole"
NONE = "none"
_EVALUATE = "Scores"


def run(
    preset: options.RequiredPreset,
    out: options.Out,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    checkpoint: options.OptionalTokenizerCheckpoint = None,
    validation: options.Validation = None,
    prefixes: Annotated[
        str,
        typer.Option(
            "--prefixes", metavar="LIST", help="Scale prefixes to compare, with whole scales, as in all,2; or none."
        ),
    ] = "all,3,2,1",
    windows: Annotated[
        list[str] | None,
        typer.Option(
            "--windows",
            metavar="LIST",
            help="Windows to compare, with one scale prefix; repeatable. In a list, each number is a model with that"
            " window on all windowed scales, auto:5 one with 5 on every scale where that pays. A list with a 0 is one"
            " model, with one window per scale (0 = whole):"
            " --windows 3,5,whole --windows 0,0,3,5. Default: 3,5,7,9,whole; or none.",
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N|LIST", help="How many seeds, or which, as in 0,7 (one seed: 7,).")
    ] = "3",
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    num: Annotated[
        int, typer.Option("--num", min=2, metavar="N", help="Samples of each class.", rich_help_panel=_EVALUATE)
    ] = 100,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="PATH|digits", rich_help_panel=_EVALUATE,
                     help="What samples are compared with, as for `mvar evaluate`. Default: the training images."),
    ] = None,
    features: Annotated[
        str,
        typer.Option("--features", metavar="NAME|FILE.pt2", rich_help_panel=_EVALUATE,
                     help="As for `mvar evaluate`; auto is demo for digits, else inception."),
    ] = "auto",
    inception_weights: Annotated[
        Path | None,
        typer.Option("--inception-weights", metavar="FILE", rich_help_panel=_EVALUATE,
                     help="The network that FID is defined by."),
    ] = None,
    demo_classifier: Annotated[
        Path | None,
        typer.Option("--demo-classifier", metavar="FILE", rich_help_panel=_EVALUATE,
                     help="The classifier behind demo features."),
    ] = None,
    bench_batch: Annotated[
        int,
        typer.Option("--bench-batch", min=1, metavar="N", rich_help_panel=_EVALUATE,
                     help="Images together where sampling is timed."),
    ] = 8,
    overwrite: options.Overwrite = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """What scale prefixes and windows cost in quality, and save: the paper's two tables on your data, over seeds.

    Trains every setting on every seed with equal steps, data and order, draws samples, scores and times them. The
    tables share models: each is trained once. Without --checkpoint the tokenizer is trained first, without --tokens
    the images are tokenized; without --validation the test images are held out, or a tenth of the tokens' images.

    Running the same command again goes on where it stopped, within a row too; more seeds, prefixes or windows add
    rows. Writes ablation.json, ablation.md, ablation.png and .svg.
    """
    from mvar_cli.ablation_request import AblationRequest, Scoring
    from mvar_core.analysis.ablation import plan_ablations
    from mvar_core.config.presets import load_config

    if steps is not None and epochs is not None:
        raise ConfigError("--steps and --epochs both say how long to train.", "Give one of them.")
    given = [*(settings or ()), "train.steps=null"] if epochs is not None else settings or []
    train = {"steps": steps, "epochs": epochs, "batch_size": batch_size}
    size = options.parse_size(image_size, "--image-size")
    config = load_config(preset, given, {"image_size": size, "train": train})
    scales = config.pyramid.num_scales
    request = AblationRequest(
        config=config,
        ablations=plan_ablations(config, parse_prefixes(prefixes), parse_windows(windows or [WINDOWS], scales)),
        seeds=parse_seeds(seeds, config.seed),
        out=out,
        tokens=tokens,
        data=data,
        checkpoint=checkpoint,
        validation=validation,
        scoring=Scoring(reference, features, inception_weights, demo_classifier, num),
        bench_batch=bench_batch,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        attention=attention,
    )
    request.check()
    if dry_run:
        _show_plan(Console(as_json), request)
        return
    from mvar_cli.ablation_run import execute

    execute(Console(as_json), request)


def parse_prefixes(text: str) -> list[ScalePrefixes]:
    """Scale prefixes from `all,3,1`; none of `none`.

    Raises:
        ConfigError: Something else than numbers and "all".
    """
    if text == NONE:
        return []
    found: list[ScalePrefixes] = []
    for part in (part.strip() for part in text.split(",")):
        if part != "all" and not part.isdecimal():
            raise ConfigError(
                f"--prefixes {text!r}: {part!r} is neither a number nor all.", "Write for example all,2,1."
            )
        found.append("all" if part == "all" else int(part))
    return found


def parse_windows(texts: Sequence[str], scales: int) -> list[WindowEntry]:
    """Windows to compare: of each text, or each part between semicolons, one per number, or one setting per scale.

    Args:
        texts: What was typed, one for each time that the option was given.
        scales: How many scales there are, S.

    Raises:
        ConfigError: Not windows, or a setting that has not one window per scale.
    """
    if list(texts) == [NONE]:
        return []
    found: list[WindowEntry] = []
    for text in (part.strip() for whole in texts for part in whole.split(";")):
        words = [word.strip() for word in text.split(",")]
        if text == NONE:
            raise ConfigError("--windows none stands alone.", "Leave it out, or leave out the others.")
        for word in words:
            if word not in ("whole", "auto") and not word.removeprefix("auto:").isdecimal():
                raise ConfigError(
                    f"--windows {text!r}: {word!r} is neither a number nor whole, auto or auto:K.", "Write 3,5,whole."
                )
        if "0" in words and len(words) > 1:
            if not all(word.isdecimal() for word in words) or len(words) != scales:
                raise ConfigError(
                    f"--windows {text!r} holds a 0, so it is one model with one window for each of {scales} scales;"
                    f" found {len(words)} entries.",
                    "For a list of models write whole in place of 0.",
                )
            found.append(tuple(map(int, words)))
        else:
            found += ["whole" if word == "0" else int(word) if word.isdecimal() else word for word in words]
    return found


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """`3` is three seeds from the first one on, `0,7` these two, `7,` this one.

    Raises:
        ConfigError: Not whole numbers, none at all, or one twice.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:
        words.pop()
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds {text!r} is neither a number of seeds nor a comma list of them.")
    numbers = [int(word) for word in words]
    if "," not in text:
        if numbers[0] < 1:
            raise ConfigError("--seeds is 0; at least one seed is needed.")
        return tuple(range(first, first + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text!r} names a seed twice.")
    return tuple(numbers)


def _show_plan(console: Console, request: AblationRequest) -> None:
    """Rows, cost, and what is there already."""
    from mvar_cli.costs import cost_of, finish_dry_run
    from mvar_core.analysis.ablation import settings_of

    settings = settings_of(request.ablations)
    costs = {}
    for setting in settings:
        config = setting.apply(request.config, request.seeds[0])
        costs[setting] = cost_of(config, dtype=request.dtype, guided=config.sampling.guided, device=request.device)
    rows = request.rows
    missing = request.difference()
    for ablation in request.ablations:
        console.table(
            ablation.title,
            ("entry", "scale prefixes", "windows", "attention GMACs", "KV cache", "seeds done"),
            [
                (
                    entry.label,
                    str(entry.setting.scale_prefixes),
                    ",".join(map(str, entry.setting.windows)),
                    format_number(costs[entry.setting].attention_gmacs),
                    format_bytes(costs[entry.setting].kv_cache_bytes),
                    f"{sum(row.done for row in rows if row.setting == entry.setting)} of {len(request.seeds)}",
                )
                for entry in ablation.entries
            ],
        )
    done = sum(row.done for row in rows)
    plan = [
        *request.preparations(),
        f"train and score {len(rows) - done} rows ({len(settings)} settings × {len(request.seeds)} seeds, {done} done)",
        f"time {len(settings)} settings, each in processes of their own",
        f"write tables and pictures to {request.out}",
    ]
    if missing:
        console.note(f"warning: {missing}")
    finish_dry_run(
        console,
        request.config,
        plan,
        rows=[
            {
                "setting": row.setting.name,
                "scale_prefixes": row.setting.scale_prefixes,
                "windows": row.setting.windows,
                "seed": row.seed,
                "done": row.done,
                "parameters": costs[row.setting].parameters,
                "attention_gmacs": costs[row.setting].attention_gmacs,
                "kv_cache_bytes": costs[row.setting].kv_cache_bytes,
            }
            for row in rows
        ],
        refused=missing or None,
    )
