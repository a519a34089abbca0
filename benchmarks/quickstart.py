"""The quickstart on several seeds: its time and its measures, each next to what it is promised to reach.

python benchmarks/quickstart.py [--seeds 0 1 2] writes benchmarks/results/quickstart.json.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

import mvar_core as mvar

PROMISES = {
    "seconds": ("at most", 180),
    "classifier_accuracy": ("at least", 0.97),
    "demo_fid_of_class_means": ("at most", 0.12),
    "diversity_of_real": ("at least", 0.70),
    "nearest_neighbour_of_real": ("at least", 0.90),
    "reconstruction_psnr": ("at least", 25),
    "code_usage": ("at least", 0.90),
}


SMOKE = ("image_size=8", "patch_sizes=[1,2]", "attention.windows=[0,0]", "data.augmented_views=0", "train.steps=2",
         "transformer.embed_dim=16", "transformer.depth=1", "train_tokenizer.steps=2",
         "train_tokenizer.kmeans_batches=1")  # fmt: skip


def run(seed: int, folder: Path) -> dict[str, Any]:
    tiny: dict[str, Any] = {"num": 2, "settings": SMOKE} if machine.SMOKE else {}
    began = time.monotonic()
    found = mvar.quickstart(folder, seed=seed, machine=mvar.Machine(device="cpu"), **tiny).to_dict()
    found["seconds"] = time.monotonic() - began
    found["demo_fid_of_class_means"] = found["demo_fid"] / found["demo_fid_class_means"]
    found["diversity_of_real"] = found["pixel_diversity"] / found["pixel_diversity_real"]
    found["nearest_neighbour_of_real"] = found["nearest_distance"] / found["nearest_distance_real"]
    return {key: value for key, value in found.items() if isinstance(value, int | float | dict)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0] if machine.SMOKE else [0, 1, 2])
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
