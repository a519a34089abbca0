"""The table of costs in docs/large-images.md, written from the cost model: python -m mvar_cli.large_images FILE."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvar_cli.old_console import format_bytes, format_count
from mvar_core.analysis.cost import plan
from mvar_core.config.presets import load_config

BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->\n"
VAR: Mapping[str, Any] = {"attention": {"scale_prefixes": "all", "windows": []}}
WHOLE: Mapping[str, Any] = {"attention": {"windows": []}}
LAST_TWO: Mapping[str, Any] = {"attention": {"windows": [0] * 8 + [7, 7]}}
LAST_TWO_OF_14: Mapping[str, Any] = {"attention": {"windows": [0] * 12 + [7, 7]}}
ROWS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
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


def costs() -> str:
    """The table, in Markdown."""
    columns = ["images", "d24 model", "parameters", "tokens", "attention", "everything", "KV cache", "sampling"]
    columns.append("a training step")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    preset = ""
    for size, name, changes in ROWS:
        side = size.split("×")[0]
        preset = f"mvar-d24-{side}" if size else preset
        config = load_config(preset, [], changes)
        cost = plan(config, device="cuda", train=config.train.model_copy(update={"batch_size": 1}))
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


def with_costs(page: str) -> str:
    """A page whose table, between the marks, is as the cost model has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{costs()}{END}{after}"


def main() -> None:
    """Renew the table in the file that is named."""
    path = Path(sys.argv[1])
    path.write_text(with_costs(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
