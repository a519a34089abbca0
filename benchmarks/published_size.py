"""A model of the published d16 shape, random weights: convert it and sample one 256 px image, and take the memory.

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

KEYS = Path(__file__).parent.parent / "tests" / "golden"
NAMES = ("mvar_d16.pth", "vae_ch160v4096z32.pth")


def write_random(keys: str, path: Path, wrapper: str | None) -> None:
    """A published file with random weights: unit norms, everything else small enough to stay finite."""
    import torch

    random = torch.Generator().manual_seed(0)
    state = {}
    for name, (shape, dtype) in json.loads((KEYS / keys).read_text()).items():
        if dtype == "int64":
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif ".norm" in name and name.endswith("weight"):
            state[name] = torch.ones(shape)
        else:
            scale = 1.2 / math.sqrt(math.prod(shape[1:])) if len(shape) == 4 else 0.02
            state[name] = torch.randn(shape, generator=random) * scale
    torch.save({wrapper: state} if wrapper else state, path)


def measure(*arguments: str) -> dict[str, Any]:
    """Seconds and peak resident bytes of one mvar command."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mvar_cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mvar {arguments[0]} failed")
    return {"seconds": round(time.monotonic() - start, 2), "peak_resident_bytes": usage.ru_maxrss * 1024}


def write_files(folder: Path) -> None:
    """The two published files, written by a process of their own.

    A child's peak counts what its parent held when it was started, so the measuring process must stay small.
    """
    model, tokenizer = (str(folder / name) for name in NAMES)
    code = (
        "import pathlib, published_size as p;"
        f"p.write_random('official-transformer-d16-keys.json', pathlib.Path({model!r}), 'mvar_wo_ddp');"
        f"p.write_random('official-vqvae-keys.json', pathlib.Path({tokenizer!r}), None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        files = ("--model", str(folder / NAMES[0]), "--tokenizer", str(folder / NAMES[1]), "--kind", "mvar")
        sample = ("--class", "207", "--num", "1", "--device", "cpu", "--checkpoint", str(folder / "d16"))
        rows = {
            "convert (float32)": measure("convert", *files, "--out", str(folder / "d16")),
            "convert (bfloat16)": measure("convert", *files, "--dtype", "bfloat16", "--out", str(folder / "d16b")),
            "sample 1 image (bfloat16)": measure(
                "sample", *sample, "--dtype", "bfloat16", "--out", str(folder / "half")
            ),
            "sample 1 image (float32)": measure("sample", *sample, "--dtype", "float32", "--out", str(folder / "full")),
        }
    machine.save("published_size", {"model": "MVAR-d16, 256 px, random weights", "rows": rows})
    promised = [row for name, row in rows.items() if "sample 1 image (float32)" not in name]
    sys.exit(0 if all(row["peak_resident_bytes"] < 2e9 for row in promised) else 1)


if __name__ == "__main__":
    main()
