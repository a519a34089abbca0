"""Evaluation of small images with demo features: time of 10,000 images, and memory of 2,000 against 20,000.

python benchmarks/evaluation.py writes benchmarks/results/evaluation.json. Each command runs in a process of its own,
Python, torch and start-up included. Precision, recall and KID keep every image's features, so that their memory grows;
it is reported next to that of FID and the inception score, which keep none.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

SECONDS = 60
GROWTH = 1.1
COUNTS = (20, 100, 200) if machine.SMOKE else (2_000, 10_000, 20_000)


def write_inputs(folder: Path) -> None:
    """A classifier of the bundled digits, and npz files of digits with noise, written by a process of their own.

    A child's peak memory includes what its parent held when it was started, so the measuring process must stay small.
    """
    import numpy as np

    from mvar_core.evaluation.demo import read_digits, train_digits_classifier

    train_digits_classifier(folder / "classifier.safetensors", (32, 32))
    digits, _ = read_digits("train", (32, 32))
    pixels = digits.permute(0, 2, 3, 1).numpy()
    random = np.random.default_rng(0)
    for count in COUNTS:
        noise = random.integers(0, 40, (count, 32, 32, 1), dtype=np.uint8)
        np.savez(folder / f"{count}.npz", arr_0=pixels[np.arange(count) % len(pixels)] // 2 + noise)


def measure(folder: Path, count: int, metrics: str) -> dict[str, Any]:
    """Seconds, peak resident bytes and figures of one evaluation."""
    command = [sys.executable, "-m", "mvar_cli", "evaluate", "--samples", str(folder / f"{count}.npz")]
    command += ["--reference", "digits", "--metrics", metrics, "--json"]
    command += ["--features", str(folder / "classifier.safetensors")]
    start = time.monotonic()
    with (folder / "result.json").open("w") as file:
        process = subprocess.Popen(command, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("mvar evaluate failed")
    found = json.loads((folder / "result.json").read_text())
    return {
        "images": count,
        "metrics": metrics,
        "seconds": round(time.monotonic() - start, 2),
        "peak_resident_bytes": usage.ru_maxrss * 1024,
        "demo_fid": found["fid"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = f"import pathlib, evaluation; evaluation.write_inputs(pathlib.Path({name!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        few, middle, many = COUNTS
        metrics = {"FID and IS": "fid,inception_score", "all metrics": "all"}
        rows = {
            f"{count:,} images, {name}": measure(folder, count, metrics[name])
            for count, name in (
                (middle, "all metrics"),
                (few, "FID and IS"),
                (many, "FID and IS"),
                (few, "all metrics"),
                (many, "all metrics"),
            )
        }
    peaks = {name: row["peak_resident_bytes"] for name, row in rows.items()}
    growth = {name: peaks[f"{many:,} images, {name}"] / peaks[f"{few:,} images, {name}"] for name in metrics}
    kept = {
        f"{middle:,} images within {SECONDS} s": rows[f"{middle:,} images, all metrics"]["seconds"] < SECONDS,
        f"peak of {many:,} images at most {GROWTH} times that of {few:,}, FID and IS": growth["FID and IS"] <= GROWTH,
    }
    machine.save("evaluation", {"image_shape": [32, 32], "rows": rows, "growth": growth, "kept": kept})
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    machine.parse_no_options(__doc__)
    main()
