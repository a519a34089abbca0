"""What all benchmarks share: where a result was measured, where it is kept, and `--smoke`.

With `--smoke` a script runs its whole course in seconds, on sizes that mean nothing; it prints its result, writes
nothing under results/, and does not judge the figures. Processes that it starts inherit this.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

if "--smoke" in sys.argv:
    sys.argv.remove("--smoke")
    os.environ["MVAR_BENCHMARK_SMOKE"] = "1"
SMOKE = os.environ.get("MVAR_BENCHMARK_SMOKE") == "1"


def parse_no_options(description: str | None) -> None:
    """Answer --help, and refuse what a script without options of its own does not know."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds; writes no results")
    parser.parse_args()


def describe() -> dict[str, Any]:
    """Machine, versions and date."""
    from mvar_core.runtime import describe_machine

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip() or None, **describe_machine()}


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result under benchmarks/results/, unless this is a smoke run, and show it."""
    text = json.dumps({"machine": describe(), **result}, indent=2) + "\n"
    if not SMOKE:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text)
    sys.stdout.write(text)


def exit_code(kept: Iterable[bool]) -> int:
    """0 where all promises are kept, otherwise 1; a smoke run judges nothing."""
    return 0 if SMOKE or all(kept) else 1
