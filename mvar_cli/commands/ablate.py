"""`mvar ablate`: the two ablations of the MVAR paper on the user's data, over seeds."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

import mvar_core as mvar
from mvar_cli import console, options

NONE, WHOLE = "none", "whole"


@options.command(example="mvar ablate --preset digits --data digits --windows 3,5,whole --out ablation")
def ablate(
    preset: options.RequiredPreset,
    out: options.Out,
    machine: options.Machine,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    tokenizer: options.OptionalTokenizer = None,
    validation: options.Validation = None,
    prefixes: Annotated[
        str, options.option("--prefixes", "LIST", "Scale prefixes to compare, with whole scales, as in all,2; or none.")
    ] = "all,3,2,1",
    windows: Annotated[
        list[str] | None,
        options.option("--windows", "LIST",
                       "Windows to compare, with one scale prefix; repeatable. In a list, each number is a model with"
                       " that window on all windowed scales, auto:5 one with 5 on every scale where that pays. A list"
                       " with a 0 is one model, with one window per scale (0 = whole): --windows 3,5,whole --windows"
                       " 0,0,3,5. Default: 3,5,7,9,whole; or none."),
    ] = None,
    seeds: Annotated[str, options.option("--seeds", "N|LIST", "How many seeds, or which: 0,7 (one: 7,).")] = "3",
    settings: options.Settings = None,
    image_size: options.ImageSize = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    num: Annotated[int, options.option("--num", "N", "Samples of each class.", min=2)] = 100,
    reference: Annotated[
        str | None,
        options.option("--reference", "PATH|digits", "What samples are compared with. Default: the training images."),
    ] = None,
    features: options.Features = "auto",
    inception_weights: options.InceptionWeights = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """What scale prefixes and windows cost in quality, and save: the paper's two tables on your data, over seeds.

    Trains every setting on every seed with equal steps, data and order, then samples, scores and times it. The
    tables share models: each is trained once. Without --tokenizer the tokenizer is trained first, without --tokens
    the images are tokenized; without --validation the test images are held out, or a tenth of the tokens' images.

    Running the same command again resumes where it stopped, within a row too; more seeds, prefixes or windows add
    rows. Writes ablation.json, ablation.md, ablation.png and .svg.
    """
    given = locals() | {
        "prefixes": parse_prefixes(prefixes),
        "windows": parse_windows(windows) if windows else (3, 5, 7, 9, WHOLE),
        "seeds": parse_seeds(seeds),
        "settings": settings or (),
    }
    result = mvar.ablate(**given, progress=console.progress)
    if result.dry_run is not None:
        columns = ("label", "scale_prefixes", "windows", "seed", "done", "attention_gmacs", "kv_cache_bytes")
        console.table(
            "rows", columns, [[console.format_field(key, row[key]) for key in columns] for row in result.rows]
        )
    for section in result.sections():
        for table in section.tables:
            console.table(*table)
        console.say("\n".join([*section.sentences, ""]))
    if result.outputs:
        console.say(f"Written: {', '.join(result.outputs.values())}; {console.format_seconds(result.seconds)}.")
    console.show(result)


def parse_prefixes(text: str) -> list[Any]:
    """Scale prefixes from `all,3,1`; none of `none`."""
    words = [] if text == NONE else _words(text)
    if not all(word == "all" or word.isdecimal() for word in words):
        raise mvar.ConfigError(f"--prefixes {text!r} holds something other than numbers and all.", "Use all,2,1.")
    return [int(word) if word.isdecimal() else word for word in words]


def parse_windows(texts: Sequence[str]) -> list[Any]:
    """Windows of each text, or each piece between semicolons: one per number, or with a 0 one tuple for all scales."""
    found: list[Any] = []
    for text in [] if list(texts) == [NONE] else ";".join(texts).split(";"):
        words = _words(text)
        if "0" in words and len(words) > 1:
            if not all(map(str.isdecimal, words)):
                raise mvar.ConfigError(
                    f"--windows {text!r} holds a 0, so it is one model with one window for each scale.",
                    "For a list of models use whole in place of 0.",
                )
            found.append(tuple(map(int, words)))
        elif all(re.fullmatch(r"\d+|whole|auto(:\d+)?", word) for word in words):
            found += [WHOLE if word == "0" else int(word) if word.isdecimal() else word for word in words]
        else:
            raise mvar.ConfigError(f"--windows {text!r} is not a list of numbers, whole, auto, auto:K.", "Use 3,whole.")
    return found


def parse_seeds(text: str) -> int | tuple[int, ...]:
    """`3` is how many, `0,7` which, `7,` this one."""
    words = _words(text.rstrip().removesuffix(","))
    if not all(map(str.isdecimal, words)):
        raise mvar.ConfigError(f"--seeds {text!r} is neither a number of seeds nor a comma list of them.", "Use 0,7.")
    return tuple(map(int, words)) if "," in text else int(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]
