"""The generated parts of docs/: `python docs/generate.py` writes them, as `make docs` does; tests say what is stale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_cli.app import COMMANDS, SUBCOMMANDS, CommandEntry, load_command
from mvar_core.analysis.cost import Plan, cost_of
from mvar_core.config import Machine, RunConfig
from mvar_core.config.machine import parse_bytes
from mvar_core.config.presets import load_config, preset_names
from mvar_core.formatting import format_bytes, format_count

DOCS = Path(__file__).parent

COMMANDS_INTRODUCTION = """# Commands

Made by `make docs` from the commands themselves; `mvar COMMAND --help` says the same.

Results go to stdout, progress and hints to stderr; `--json` prints exactly one JSON object on stdout. Exit codes:
0 done, 1 a problem that can be fixed (one line says how), 2 wrong usage, 130 interrupted. `MVAR_DEBUG=1` adds the
traceback.

A configuration is built from `--preset`, then any number of `--set key=value`, then named options: later wins.
"""


def commands() -> str:
    """docs/commands.md: every command and option."""
    return "\n".join([COMMANDS_INTRODUCTION, *map(_command, (*COMMANDS, *SUBCOMMANDS))]).rstrip() + "\n"


def _command(entry: CommandEntry) -> str:
    command = load_command(entry)
    lines = [f"## mvar {entry.name}", "", command.help or "", ""]
    lines += ["```bash", str(command.epilog).split("\n\n", 1)[1], "```", ""]
    lines += ["| option | meaning | default |", "|---|---|---|"]
    lines += [_option_row(parameter) for parameter in command.params if parameter.name != "help"]
    return "\n".join([*lines, ""])


def _option_row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    metavar = f" {parameter.metavar}" if parameter.metavar else ""
    default = parameter.default
    if parameter.required:
        shown = "required"
    elif default is None or default is False or default == ():
        shown = ""
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    cells = (f"{names}{metavar}", parameter.help or "", shown)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


RECIPE_DEVICES = ("24GB", "80GB", "141GB")
MACHINE = Machine(device="cpu", dtype="bfloat16")
RECIPES = """# Recipes

The published models and how they are trained, as presets. Written by `make docs` from the
presets and from what `mvar plan --preset NAME` predicts; a test keeps it true.

```bash
mvar plan --preset mvar-d16-256 --device-memory 24GB        # the whole prediction of one of them
mvar train --preset mvar-d16-256 --tokenizer TOKENIZER --tokens TOKENS --out runs/d16
mvar finetune-from-var --preset mvar-d16-256-ft --var-checkpoint var_d16.pth --tokens TOKENS --out runs/d16-ft
```

- *Attention* is the MVAR paper's count for one image without guidance: projections and products.
- *Images a step and device*: the largest batch whose training step is predicted to fit into a device of that memory in
  bfloat16, without activation checkpointing; weights, gradients and AdamW's state in float32 on every device. A larger
  batch than that is spread over devices or accumulated. "-" means that not even one image fits.
- *Reported*: FID and inception score as the source reports them for ImageNet, 50,000 samples; nothing here was trained
  by this project.

MVAR was published with the interleaved curriculum (`train.curriculum=interleaved`, `train.ratio_k=8`). The presets use
`joint`, which has the exact gradient of all scales in every step; see [how it works](how-it-works.md#training). Its
steps train 680 tokens per image; the published ones train 246.5 on average.
"""


TOKENIZERS = """## Tokenizers

```bash
mvar train-tokenizer --preset tokenizer-256 --data IMAGES --out runs/tokenizer
```

*Operations* are those of quantizing and decoding one image.
"""


def recipes() -> str:
    """docs/recipes.md: published models and how they are trained."""
    configs = [load_config(name) for name in preset_names() if not name.startswith("digits")]
    models = [config for config in configs if config.transformer is not None]
    tokenizers = [config for config in configs if config.transformer is None]
    columns = [
        "preset",
        "parameters",
        "attention",
        "batch",
        "epochs",
        *(f"on {name}" for name in RECIPE_DEVICES),
        "reported",
    ]
    parts = ["preset", "parameters", "codes", "tokens", "operations", "batch", "steps"]
    return "\n".join(
        [
            RECIPES,
            *_table(columns, [_row(config) for config in models]),
            "",
            TOKENIZERS,
            *_table(parts, [_tokenizer_row(config) for config in tokenizers]),
            "",
            "## Each of them",
            "",
            *(_note(config) for config in configs),
            "",
        ]
    )


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = (" | ".join(cells) for cells in (columns, *rows))
    head, *body = (f"| {line} |" for line in lines)
    return [head, "|" + "---|" * len(columns), *body]


def _row(config: RunConfig) -> list[str]:
    costs = [_cost(config, parse_bytes(device)) for device in RECIPE_DEVICES]
    result = config.result
    reported = "-"
    if result is not None and result.fid is not None:
        score = f", IS {result.inception_score:g}" if result.inception_score is not None else ""
        reported = f"FID {result.fid:g}{score}"
    return [
        f"`{config.name}`",
        format_count(costs[0].parameters),
        f"{costs[0].attention_gmacs:.4g} GMACs",
        str(config.train.batch_size),
        f"{config.train.epochs:g}" if config.train.epochs else "-",
        *(str(cost.largest_train_batch or "-") for cost in costs),
        reported,
    ]


def _tokenizer_row(config: RunConfig) -> list[str]:
    train, cost = config.train_tokenizer, cost_of(config)
    return [
        f"`{config.name}`",
        format_count(cost.tokenizer_parameters),
        str(config.tokenizer.codebook_size),
        f"{config.pyramid.num_tokens} of {config.tokenizer.latent_channels} channels",
        f"{cost.decoder_gmacs:.4g} GMACs",
        str(train.batch_size),
        str(train.steps),
    ]


def _cost(config: RunConfig, device_memory: int) -> Plan:
    return cost_of(config, MACHINE, device_memory=device_memory)


def _note(config: RunConfig) -> str:
    """What a preset is, where it comes from, what it needs at least and what was reported of it."""
    sentences = [config.description.rstrip("."), f"Source: {config.source.rstrip('.')}"]
    if config.transformer is not None:
        smallest = cost_of(config, MACHINE, batch_size=1).train_peak_bytes
        assert smallest is not None
        sentences.append(f"A step on one image is predicted to take {format_bytes(smallest)}")
    if config.result is not None and config.result.note:
        sentences.append(f"Reported: {config.result.note.rstrip('.')}")
    return f"- `{config.name}`: {'. '.join(sentences)}."


BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->\n"
VAR: Mapping[str, Any] = {"attention": {"scale_prefixes": "all", "windows": []}}
WHOLE: Mapping[str, Any] = {"attention": {"windows": []}}
LAST_TWO: Mapping[str, Any] = {"attention": {"windows": [0] * 8 + [7, 7]}}
LAST_TWO_OF_14: Mapping[str, Any] = {"attention": {"windows": [0] * 12 + [7, 7]}}
LARGE_MODELS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("256×256", "`mvar-d24-256`", {}),
    ("", "VAR", VAR),
    ("256×384", "`mvar-d24-256 --image-size 256x384`", {"image_size": (256, 384)}),
    ("", "VAR", {"image_size": (256, 384), **VAR}),
    ("512×512", "`mvar-d24-512`", {}),
    ("", "windows on the last two scales alone", LAST_TWO),
    ("", "no windows", WHOLE),
    ("", "VAR", VAR),
    ("1024×1024", "`mvar-d24-1024`", {}),
    ("", "windows on the last two scales alone", LAST_TWO_OF_14),
    ("", "no windows", WHOLE),
    ("", "VAR", VAR),
)
"""Size of the images (empty: as above), what is said of the model, and what it changes of the size's preset."""


def large_image_costs() -> str:
    """The table, in Markdown."""
    columns = ["images", "d24 model", "parameters", "tokens", "attention", "everything", "KV cache", "sampling"]
    columns.append("a training step")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    preset = ""
    for size, name, changes in LARGE_MODELS:
        side = size.split("×")[0]
        preset = f"mvar-d24-{side}" if size else preset
        config = load_config(preset, [], changes)
        cost = cost_of(config, Machine(device="cuda", dtype="bfloat16"), batch_size=1)
        cells = [
            size,
            name,
            format_count(cost.parameters),
            f"{cost.tokens:,}",
            f"{cost.attention_gmacs:,.0f}",
            f"{cost.total_gmacs:,.0f}",
            format_bytes(cost.kv_cache_bytes),
            format_bytes(cost.sample_peak_bytes),
            format_bytes(cost.train_peak_bytes or 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def with_large_image_costs(page: str) -> str:
    """A page whose table, between the marks, is as the cost model has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{large_image_costs()}{END}{after}"


def pages() -> dict[Path, str]:
    """What every generated page should contain."""
    large_images = DOCS / "large-images.md"
    return {
        DOCS / "commands.md": commands(),
        DOCS / "recipes.md": recipes(),
        large_images: with_large_image_costs(large_images.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
