"""The command reference in Markdown, made from the commands themselves: `python -m mvar_cli.reference FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mvar_cli.app import COMMANDS, SUBCOMMANDS, CommandEntry, load_command

INTRODUCTION = """# Commands

Made by `make docs` from the commands themselves; `mvar COMMAND --help` says the same.

Results go to stdout, progress and hints to stderr; `--json` prints exactly one JSON object on stdout. Exit codes:
0 done, 1 a problem that can be mended (one line says how), 2 wrong usage, 130 interrupted. `MVAR_DEBUG=1` adds the
traceback.

A configuration is built from `--preset`, then any number of `--set key=value`, then named options: later wins.
"""


def reference() -> str:
    """The whole reference."""
    return "\n".join([INTRODUCTION, *map(_command, (*COMMANDS, *SUBCOMMANDS))]).rstrip() + "\n"


def _command(entry: CommandEntry) -> str:
    command = load_command(entry)
    lines = [f"## mvar {entry.name}", "", command.help or "", ""]
    lines += ["```bash", str(command.epilog).split("\n\n", 1)[1], "```", ""]
    lines += ["| option | what it says | default |", "|---|---|---|"]
    lines += [_row(parameter) for parameter in command.params if parameter.name != "help"]
    return "\n".join([*lines, ""])


def _row(parameter: Any) -> str:
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


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
