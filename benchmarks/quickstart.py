"""The quickstart on several seeds: its time and its measures, each beside what it is promised to reach.

python benchmarks/quickstart.py [--seeds 0 1 2] writes benchmarks/results/quickstart.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

PROMISES = {
    "seconds": ("at most", 180),
    "classifier_accuracy": ("at least", 0.97),
    "demo_fid_of_class_means": ("at most", 0.12),
    "diversity_of_real": ("at least", 0.70),
    "nearest_neighbour_of_real": ("at least", 0.90),
    "reconstruction_psnr": ("at least", 25),
    "code_usage": ("at least", 0.90),
}


def run(seed: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "mvar_cli", "quickstart", "--json", "--seed", str(seed), "--out", str(folder)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found["demo_fid_of_class_means"] = found["demo_fid"] / found["demo_fid_class_means"]
    found["diversity_of_real"] = found["pixel_diversity"] / found["pixel_diversity_real"]
    found["nearest_neighbour_of_real"] = found["nearest_distance"] / found["nearest_distance_real"]
    return {key: value for key, value in found.items() if isinstance(value, int | float | dict)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            rows[seed] = run(seed, Path(folder) / str(seed))
    kept = {
        name: all(row[name] <= bound if side == "at most" else row[name] >= bound for row in rows.values())
        for name, (side, bound) in PROMISES.items()
    }
    machine.save("quickstart", {"promises": PROMISES, "kept": kept, "seeds": rows})
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
