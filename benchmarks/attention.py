"""Attention over one scale: every backend over sides and windows, and how much faster tiles are than dense attention.

python benchmarks/attention.py writes benchmarks/results/attention.json; --quick measures fewer sides and windows, in
less than three minutes on two cores. 16 heads of width 64, medians, backends in turns. On a machine with a GPU, its
table stands next to that of the CPU (times by events, warmed up); without one it says "not run".
"""

import argparse
import sys
import time
from typing import Any

import machine
import torch

from mvar_core.analysis.attention_sweep import sweep

SIDES = (13, 16, 18, 24, 27, 32, 36, 48, 64)
WINDOWS = (3, 5, 7, 9, 13)
PROMISES = {32: 2.5, 64: 8.0}
if machine.SMOKE:
    SIDES, WINDOWS, PROMISES = (8,), (3,), {8: 0.0}
NEAR = 1.1
"""A pick of "auto" is right if it is the fastest, or takes at most this many times as long."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(device: str, backends: list[str], quick: bool) -> list[dict[str, Any]]:
    """Rows of all sides, windows, dtypes and passes on a device."""
    rows = []
    batch = 1 if device == "cpu" else 8
    for backward in (False, True):
        sides: tuple[int, ...] = (13, 16, 24, 32, 64) if quick else SIDES
        windows: tuple[int, ...] = (3, 7, 13) if quick else WINDOWS
        if device == "cpu" and backward:
            sides = tuple(side for side in sides if side < 64)  # seconds a call
        for dtype in DTYPES.values():
            rows += sweep(
                sides,
                windows,
                backends,
                batch=batch,
                dtype=dtype,
                device=device,
                backward=backward,
                repeats=3 if device == "cpu" else 9,
                progress=lambda note: print(device, note, file=sys.stderr, flush=True),
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often and by how much the pick of "auto" is slower than the fastest backend."""
    worst, near, cases = 1.0, 0, 0
    slower = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["seconds"] is not None:
            groups.setdefault((row["side"], row["window"], row["dtype"], row["backward"]), []).append(row)
    for key, group in groups.items():
        best = min(row["seconds"] for row in group)
        (picked,) = (row["seconds"] for row in group if row["chosen"])
        cases += 1
        near += picked <= NEAR * best
        worst = max(worst, picked / best)
        if picked > NEAR * best:
            slower.append([*key, round(picked / best, 2)])
    return {"cases": cases, "auto_within_a_tenth": near, "auto_at_worst": round(worst, 3), "auto_slower": slower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick and not machine.SMOKE
    start = time.monotonic()
    # What is promised is measured on its own, with more repetitions than the table.
    promised = [
        row
        for dtype in DTYPES.values()
        for row in sweep(list(PROMISES), [7], ["dense", "tiled"], dtype=dtype, repeats=9)
    ]
    rows = measure("cpu", ["dense", "tiled"], quick)
    found = {
        f"{side}, {dtype}": row["times_dense"]
        for side in PROMISES
        for dtype in DTYPES
        for row in promised
        if (row["side"], row["dtype"], row["backend"]) == (side, dtype, "tiled")
    }
    kept = {
        f"tiled at least {times} times as fast as dense at {side}×{side}, 7×7 windows, forward, {dtype}": found[
            f"{side}, {dtype}"
        ]
        >= times
        for side, times in PROMISES.items()
        for dtype in DTYPES
    }
    gpu: Any = "not run: no GPU"
    if torch.cuda.is_available():
        gpu_rows = measure("cuda", ["dense", "tiled", "flex", "natten"], quick)
        gpu = {"summary": summary(gpu_rows), "rows": gpu_rows}
    machine.save(
        "attention",
        {
            "quick": quick,
            "seconds": round(time.monotonic() - start, 1),
            "tiled_times_dense": found,
            "kept": kept,
            "promised": promised,
            "cpu": {"summary": summary(rows), "rows": rows},
            "gpu": gpu,
        },
    )
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
