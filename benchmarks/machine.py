"""What a result must say of where it was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Machine, versions and date."""
    from mvar_core.runtime import describe_machine

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip() or None, **describe_machine()}


def save(name: str, result: dict[str, Any]) -> None:
    """Write a result under benchmarks/results/ and show it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": describe(), **result}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    sys.stdout.write(text)
