"""A model of the published d16 shape, random weights: convert it and sample one 256 px image, and measure the memory.

python benchmarks/published_size.py writes benchmarks/results/published_size.json. Each command runs in a process of its
own; the figure is the largest resident memory of that process, Python and torch included.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

SHAPES = Path(__file__).parent.parent / "tests" / "golden"
KEYS = {"model": "official-transformer-d16-keys.json", "vqvae": "official-vqvae-keys.json"}
NAMES = {"model": "mvar_d16.pth", "vqvae": "vae_ch160v4096z32.pth"}
PYRAMID = ("--pyramid", "1,2,3,4") if machine.SMOKE else ()


def shapes(kind: str) -> dict[str, list[int]]:
    """Names and shapes of the published transformer or tokenizer; in a smoke run those of a tiny one."""
    if machine.SMOKE:
        small: dict[str, list[int]] = json.loads((SHAPES / "mvar_small.json").read_text())[kind]
        return small
    return {name: shape for name, (shape, _) in json.loads((SHAPES / KEYS[kind]).read_text()).items()}


def write_random(folder: Path) -> None:
    """Published files with random weights: unit norms, everything else small enough to stay finite."""
    import torch

    for kind, file in NAMES.items():
        random = torch.Generator().manual_seed(0)
        state = {}
        for name, shape in shapes(kind).items():
            if name.endswith("lvl_1L"):
                state[name] = torch.zeros(shape, dtype=torch.int64)
            elif ".norm" in name and name.endswith("weight"):
                state[name] = torch.ones(shape)
            else:
                scale = 1.2 / math.sqrt(math.prod(shape[1:])) if len(shape) == 4 else 0.02
                state[name] = torch.randn(shape, generator=random) * scale
        torch.save({"mvar_wo_ddp": state} if kind == "model" else state, folder / file)


def measure(*arguments: str) -> dict[str, Any]:
    """Seconds and peak resident bytes of one mvar command."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mvar_cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mvar {arguments[0]} failed")
    return {"seconds": round(time.monotonic() - start, 2), "peak_resident_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A child's peak counts what its parent held when it was started, so another process writes the files.
        code = f"import pathlib, published_size; published_size.write_random(pathlib.Path({name!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        model, tokenizer = (str(folder / file) for file in NAMES.values())
        convert = ("convert", "--model", model, "--tokenizer", tokenizer, "--kind", "mvar", *PYRAMID)
        sample = ("sample", "--class", "0", "--num", "1", "--device", "cpu", "--checkpoint", str(folder / "d16"))
        rows = {
            "convert (float32)": measure(*convert, "--out", str(folder / "d16")),
            "convert (bfloat16)": measure(*convert, "--dtype", "bfloat16", "--out", str(folder / "d16b")),
            "sample 1 image (bfloat16)": measure(*sample, "--dtype", "bfloat16", "--out", str(folder / "half")),
            "sample 1 image (float32)": measure(*sample, "--dtype", "float32", "--out", str(folder / "full")),
        }
    machine.save("published_size", {"model": "MVAR-d16, 256 px, random weights", "rows": rows})
    promised = [row for name, row in rows.items() if "sample 1 image (float32)" not in name]
    sys.exit(machine.exit_code(row["peak_resident_bytes"] < 2e9 for row in promised))


if __name__ == "__main__":
    machine.parse_no_options(__doc__)
    main()
