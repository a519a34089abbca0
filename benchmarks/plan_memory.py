"""What `mvar plan` predicts against what torch allocates: seven models, three batches each, sampling and training.

python benchmarks/plan_memory.py writes benchmarks/results/plan_memory.json, and ends with 1 where a prediction is more
than a tenth off. Published models have two or three of their blocks, so that a step fits a small machine; widths,
pyramids, codebook and decoder are theirs. On a CPU all allocations are counted, on a GPU max_memory_allocated is read.
`--only NAME` runs one model and leaves the file alone.
"""

import argparse
import sys
from typing import Any

import machine

from mvar_core.analysis.cost import cost_of, weight_bytes
from mvar_core.analysis.measure import allocation_peak
from mvar_core.config import Machine
from mvar_core.config.presets import load_config
from mvar_core.workflows.bench_row import Request

PROMISED = 0.1
SHORT = ["transformer.depth=2"]
CASES = [  # name, preset, settings, dtype, batches of sampling, batches of training
    ("digits", "digits", [], "float32", (8, 32, 128), (8, 24, 64)),
    ("digits-var", "digits-var", [], "float32", (8, 32, 128), (8, 24, 64)),
    ("MVAR-d16, 2 blocks", "mvar-d16-256", SHORT, "bfloat16", (1, 8, 32), (1, 2, 6)),
    ("VAR-d16, 2 blocks", "var-d16-256", SHORT, "float32", (1, 4, 12), (1, 2, 4)),
    ("MVAR-d16, 2 scale prefixes, 3 blocks", "mvar-d16-256", ["attention.scale_prefixes=2", "transformer.depth=3"],
     "bfloat16", (1, 8, 16), (1, 2, 4)),
    ("VAR-d36, shared AdaLN, 512 px, 2 blocks", "var-d36-512", SHORT, "bfloat16", (1, 2, 4), (1, 2)),
    ("MVAR-d24, 512 px, 2 blocks", "mvar-d24-512", SHORT, "bfloat16", (1, 2, 8), (1, 2)),
]  # fmt: skip
if machine.SMOKE:
    CASES = [("digits", "digits", [], "float32", (2,), (2,))]


def measure(request: Request) -> dict[str, Any]:
    """The most memory that torch's allocator hands out, weights included, next to what `mvar plan` predicts."""
    config, batch, dtype = request.config, request.batch_size, str(request.dtype).removeprefix("torch.")
    if request.what == "train":
        step = request.training_step()
        weights = weight_bytes(step.transformer)
        with allocation_peak(request.device) as live:
            step()
            step()  # the optimizer's state is there from the first step on
    else:
        transformer, vqvae, sample = request.sampling()
        weights = weight_bytes(transformer, vqvae)
        sample(1)
        with allocation_peak(request.device) as live:
            sample(batch)
    machine = Machine(device=request.device.type, dtype=dtype)
    cost = cost_of(config, machine, batch_size=batch, guided=config.sampling.guided)
    prediction = cost.train_peak_bytes if request.what == "train" else cost.sample_peak_bytes
    assert prediction is not None
    return {
        "batch_size": batch,
        "dtype": dtype,
        "measured_bytes": weights + live.peak_bytes,
        "predicted_bytes": prediction,
        "weight_bytes": weights,
        "ratio": prediction / (weights + live.peak_bytes),
        "ratio_beside_weights": (prediction - weights) / live.peak_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=None)
    chosen = parser.parse_args().only
    rows = []
    for name, preset, settings, dtype, sampling, training in CASES:
        if chosen not in (None, name):
            continue
        config = load_config(preset, settings)
        for what, batches in (("sample", sampling), ("train", training)):
            for batch in batches:
                request = Request(what=what, config=config, batch_size=batch, machine=Machine(dtype=dtype))
                row = {"name": name, "what": what, **measure(request)}
                rows.append(row)
                print(f"{name:42} {what:6} {batch:4} {row['ratio']:.3f}", file=sys.stderr, flush=True)
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    result = {
        "promised": f"predicted within {PROMISED:.0%} of what is allocated, weights included",
        "worst": {"name": worst["name"], "what": worst["what"], "ratio": worst["ratio"]},
        "rows": rows,
    }
    if chosen is None:
        machine.save("plan_memory", result)
    sys.exit(machine.exit_code([abs(worst["ratio"] - 1) <= PROMISED]))


if __name__ == "__main__":
    main()
