"""`mvar analyze-attention` on models of the published d16 shape at 256 px, random weights: time and memory.

python benchmarks/attention_report.py [--models var mvar] [--num 4 8] merges its rows into
benchmarks/results/attention_report.json. Each row is a command in a process of its own, in float32 on the CPU; its
memory is the largest resident memory of that process, Python and torch included. Images are the bundled photographs, so
the tokenizer's encoder runs too. `growth` compares more images with fewer: 1.0 times the memory would not depend on
their number.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

PRESETS = {"mvar": "digits"} if machine.SMOKE else {"var": "var-d16-256", "mvar": "mvar-d16-256"}
DATA, NUM = ("digits", [1]) if machine.SMOKE else ("photographs", [4, 8])
PEAK_BYTES, GROWTH = 3e9, 1.10
"""The same command's peak differs by about 5 % from run to run, with what the allocator keeps."""
RESULT = machine.RESULTS / "attention_report.json"


def write_model(preset: str, directory: Path) -> None:
    """A model directory of a preset with random weights, in float32."""
    from mvar_core.analysis.random_models import random_tokenizer, random_transformer
    from mvar_core.config.presets import load_config
    from mvar_core.models.directory import save_model

    config = load_config(preset).model
    tokenizer = random_tokenizer(config).state_dict()
    save_model(directory, config, tokenizer=tokenizer, transformer=random_transformer(config).state_dict())


def measure(model: Path, num: int, out: Path) -> dict[str, Any]:
    """Seconds and peak resident bytes of the command."""
    command = [sys.executable, "-m", "mvar_cli", "analyze-attention", "--checkpoint", str(model), "--out", str(out)]
    command += ["--data", DATA, "--num", str(num), "--device", "cpu", "--dtype", "float32", "--json"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    report = json.loads(process.stdout.read().splitlines()[-1])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("mvar analyze-attention failed")
    seconds = time.monotonic() - start
    assert report["num_images"] == num
    return {
        "images": num,
        "seconds": round(seconds, 1),
        "seconds_per_image": round(seconds / num, 2),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--num", nargs="+", type=int, default=NUM)
    arguments = parser.parse_args()
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() and not machine.SMOKE else {}
    with tempfile.TemporaryDirectory() as name:
        for model in arguments.models:
            directory = Path(name) / model
            target = f"{PRESETS[model]!r}, pathlib.Path({str(directory)!r})"
            code = f"import pathlib, attention_report as a; a.write_model({target})"
            # A child's peak counts what its parent held when it was started, so this process stays small.
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
            rows[model] = [measure(directory, num, Path(name) / f"{model}-{num}") for num in arguments.num]
    peaks = [row["peak_resident_bytes"] for found in rows.values() for row in found]
    growth = {
        model: round(found[-1]["peak_resident_bytes"] / found[0]["peak_resident_bytes"], 4)
        for model, found in rows.items()
        if len(found) > 1
    }
    kept = {
        "peak below 3 GB": max(peaks) < PEAK_BYTES,
        "more images take no more memory": max(growth.values(), default=1) <= GROWTH,
    }
    machine.save(
        "attention_report", {"shape": "d16, 256 px, random weights", "rows": rows, "growth": growth, "kept": kept}
    )
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
