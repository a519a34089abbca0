"""The two ablations on the bundled digits, over three seeds, by one call; and their place in docs/ablations.md.

python benchmarks/ablation.py [--out runs/ablation] runs `mvar.ablate` (what is there already is not made again), writes
benchmarks/results/ablation.json and docs/images/ablation.png and .svg, and puts the tables into docs/ablations.md.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np
import torch
from PIL import Image

import mvar_core as mvar
from mvar_core.evaluation.demo import DemoClassifier

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ablations.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
PROMISED_MINUTES = 60
WHAT = {"windows": (3, 5, 7, 9, "whole", (0, 0, 3, 3)), "seeds": 3}


def embed(page: str, tables: str) -> str:
    """The page with the tables between its marks, and the picture where the docs have it."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables.strip().replace('](ablation.png)', '](images/ablation.png)')}\n{END}{after}"


def smoke() -> None:
    """One row of two steps on a few random images, scored by a classifier that knows nothing."""
    with tempfile.TemporaryDirectory() as name:
        data, out, features = Path(name) / "images", Path(name) / "ablation", Path(name) / "classifier.safetensors"
        for label, number in itertools.product("ab", range(3)):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            (data / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(data / label / f"{number}.png")
        classifier = DemoClassifier(2, (32, 32))
        classifier.initialise(torch.Generator())
        classifier.save(features)
        found = mvar.ablate(
            preset="digits", data=data, out=out, features=str(features), windows=("whole",), prefixes=(), seeds=1,
            num=2, steps=2, batch_size=2, settings=["train_tokenizer.steps=2", "train_tokenizer.batch_size=2"],
        )  # fmt: skip
        machine.save("ablation", found.to_dict())
        embed(PAGE.read_text(), (out / "ablation.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    out = parser.parse_args().out
    if machine.SMOKE:
        return smoke()
    fresh = not out.exists()
    start = time.monotonic()
    found = mvar.ablate(preset="digits", data="digits", out=out, **WHAT).to_dict()
    minutes = (time.monotonic() - start) / 60
    # A run that was stopped and resumed has no time of its own as a whole.
    found["minutes"] = minutes if fresh else None
    found["promised_minutes"] = PROMISED_MINUTES
    for name in ("outputs", "seconds", "machine"):  # the machine is described again, with the commit
        del found[name]
    machine.save("ablation", found)
    for name in ("ablation.png", "ablation.svg"):
        shutil.copy(out / name, ROOT / "docs" / "images" / name)
    took = f"\n\nThe whole command took {minutes:.0f} minutes.\n" if fresh else ""
    PAGE.write_text(embed(PAGE.read_text(), (out / "ablation.md").read_text().rstrip() + took))
    print(f"{minutes:.1f} minutes; tables are in {PAGE}", file=sys.stderr)
    return sys.exit(0 if minutes <= PROMISED_MINUTES else 1)


if __name__ == "__main__":
    main()
