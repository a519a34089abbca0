"""The table of recipes in docs/, written from the presets and the cost model: python -m mvar_cli.recipes FILE."""

from __future__ import annotations

import sys
from pathlib import Path

from mvar_cli.old_console import format_bytes, format_count
from mvar_core.analysis.cost import Plan, plan
from mvar_core.analysis.counts import decoder_macs, quantizer_macs, tokenizer_parameters
from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config, preset_names

DEVICES = ("24GB", "80GB", "141GB")
DTYPE_BYTES = 2
HEAD = """# Recipes

The published models and how they are trained, as presets. Written by `python -m mvar_cli.recipes docs/recipes.md` from
the presets and from what `mvar plan --preset NAME` predicts; a test keeps it true.

```bash
mvar plan --preset mvar-d16-256 --device-memory 24GB        # the whole prediction of one of them
mvar train --preset mvar-d16-256 --checkpoint TOKENIZER --tokens TOKENS --out runs/d16
mvar finetune-from-var --preset mvar-d16-256-ft --var-checkpoint var_d16.pth --tokens TOKENS --out runs/d16-ft
```

- *Attention* is the MVAR paper's count for one image without guidance: projections and products.
- *Images a step and device*: the largest batch whose training step is predicted to fit into a device of that memory in
  bfloat16, without activation checkpointing; weights, gradients and AdamW's state in float32 on every device. A larger
  batch than that is spread over devices or accumulated. "-": not even one image.
- *Reported*: FID and inception score as the source reports them for ImageNet, 50,000 samples; nothing here was trained
  by this project.

MVAR was published with the interleaved curriculum (`train.curriculum=interleaved`, `train.ratio_k=8`). The presets take
`joint`, which has the exact gradient of all scales in every step; see [how it works](how-it-works.md#training). A step
of it trains 680 tokens an image where the published one trains 246.5 on average.
"""


TOKENIZERS = """## Tokenizers

```bash
mvar train-tokenizer --preset tokenizer-256 --data IMAGES --out runs/tokenizer
```

*Operations* are those of quantizing and decoding one image.
"""


def recipes() -> str:
    """The page, in Markdown."""
    configs = [load_config(name) for name in preset_names() if not name.startswith("digits")]
    models = [config for config in configs if config.transformer is not None]
    tokenizers = [config for config in configs if config.transformer is None]
    columns = ["preset", "parameters", "attention", "batch", "epochs", *(f"on {name}" for name in DEVICES), "reported"]
    parts = ["preset", "parameters", "codes", "tokens", "operations", "batch", "steps"]
    return "\n".join(
        [
            HEAD,
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
    from mvar_cli.old_options import parse_bytes

    costs = [_cost(config, parse_bytes(device)) for device in DEVICES]
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
    train = config.train_tokenizer
    return [
        f"`{config.name}`",
        format_count(tokenizer_parameters(config)),
        str(config.tokenizer.codebook_size),
        f"{config.pyramid.num_tokens} of {config.tokenizer.latent_channels} channels",
        f"{(quantizer_macs(config) + decoder_macs(config)) / 1e9:.4g} GMACs",
        str(train.batch_size),
        str(train.steps),
    ]


def _cost(config: RunConfig, device_memory: int) -> Plan:
    return plan(config, dtype_bytes=DTYPE_BYTES, device_memory=device_memory, train=config.train)


def _note(config: RunConfig) -> str:
    """What a preset is, where it comes from, what it needs at least and what was reported of it."""
    sentences = [config.description.rstrip("."), f"Source: {config.source.rstrip('.')}"]
    if config.transformer is not None:
        one = config.train.model_copy(update={"batch_size": 1})
        smallest = plan(config, dtype_bytes=DTYPE_BYTES, train=one).train_peak_bytes
        assert smallest is not None
        sentences.append(f"A step on one image is predicted to take {format_bytes(smallest)}")
    if config.result is not None and config.result.note:
        sentences.append(f"Reported: {config.result.note.rstrip('.')}")
    return f"- `{config.name}`: {'. '.join(sentences)}."


def main() -> None:
    """Write the page to the file that is named."""
    Path(sys.argv[1]).write_text(recipes(), encoding="utf-8")


if __name__ == "__main__":
    main()
