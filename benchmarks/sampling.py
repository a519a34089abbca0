"""Sampling of the published d16 at 256 px, random weights, cfg 1.5, top-k 900, top-p 0.96: speed against the machine's
own matmul rate, and memory against the batch.

python benchmarks/sampling.py [--part speed memory baseline gpu] merges its parts into benchmarks/results/sampling.json.

speed: seconds an image, in bfloat16 and float32, and the part of the roofline: operations of one guided image over the
rate of a plain matrix product, which is measured between the batches of the same process. memory: largest resident
memory of `mvar sample`, Python and torch included, at batch 8 and 64. baseline: VAR as its published code samples it,
at growing batches. gpu: images/s and memory of several models and batches next to that baseline, where CUDA is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

TOP_K = 64 if machine.SMOKE else 900
SETTINGS = {"cfg": 1.5, "top_k": TOP_K, "top_p": 0.96}
FLAGS = ["--cfg", "1.5", "--top-k", str(TOP_K), "--top-p", "0.96"]
GFLOP_PER_IMAGE = 957
"""Of one guided image: 563 in the transformer, 394 in the decoder (a multiply-accumulate is two operations)."""
PUBLISHED_CPU = {"MVAR float32": 7.1, "MVAR bfloat16 autocast": 4.6, "VAR float32": 6.9, "VAR bfloat16 autocast": 4.7}
"""Seconds an image of the published code at batch 4, measured on a machine of this kind."""
SPEED = {"bfloat16": (8, 3), "float32": (4, 2)}
ROOFLINE = 0.75
GROWTH, PEAK_BYTES = 1.05, 1.7e9
MODEL, BATCHES = ("digits", (1, 2)) if machine.SMOKE else ("mvar-d16-256", (8, 64))
GPU_MODELS = ("mvar-d16-256", "mvar-d20-256", "mvar-d24-256", "mvar-d30-256", "mvar-d24-512")
RESULT = machine.RESULTS / "sampling.json"


def measure_speed(dtype: str) -> dict[str, Any]:
    """Seconds an image and the matmul rate, measured in turn."""
    import torch

    from mvar_core.allocator import keep_freed_memory
    from mvar_core.analysis.random_models import random_tokenizer, random_transformer
    from mvar_core.config.presets import load_config
    from mvar_core.pipeline import Pipeline

    keep_freed_memory()
    kind = getattr(torch, dtype)
    config = load_config(MODEL).model
    tokenizer = random_tokenizer(config, dtype=kind, encoder=False)
    pipeline = Pipeline(config, tokenizer, random_transformer(config, dtype=kind))
    batch, repeats = SPEED[dtype]
    x, weight = torch.randn(2048, 1024).to(kind), torch.randn(4096, 1024).to(kind)

    def rate() -> float:
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - start)
        return 2 * 2048 * 1024 * 4096 / statistics.median(seconds) / 1e9

    pipeline.sample([0], **SETTINGS)
    rates, seconds = [rate()], []
    for seed in range(repeats):
        start = time.perf_counter()
        pipeline.sample(range(batch), seed=seed, batch_size=batch, **SETTINGS)
        seconds.append((time.perf_counter() - start) / batch)
        rates.append(rate())
    gflops, per_image = statistics.median(rates), statistics.median(seconds)
    return {
        "batch_size": batch,
        "seconds_per_image": round(per_image, 3),
        "matmul_gflops": round(gflops, 1),
        "roofline": round(GFLOP_PER_IMAGE / gflops / per_image, 3),
        "all_seconds_per_image": [round(value, 3) for value in seconds],
        "all_matmul_gflops": [round(value, 1) for value in rates],
    }


def speed() -> dict[str, Any]:
    rows = {}
    for dtype in SPEED:
        code = f"import json, sampling; print(json.dumps(sampling.measure_speed({dtype!r})))"
        rows[dtype] = run_json([sys.executable, "-c", code])
    return {"gflop_per_image": GFLOP_PER_IMAGE, "published_code": PUBLISHED_CPU, "rows": rows}


def memory() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = f"import pathlib, sampling; sampling.write_model(pathlib.Path({name!r}) / 'd16')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        rows = {}
        for batch in BATCHES:
            command = [*mvar("sample"), "--checkpoint", str(folder / "d16"), "--class", "1", "--num", str(batch)]
            command += ["--batch-size", str(batch), "--format", "npz", "--out", str(folder / f"{batch}.npz")]
            found = run_json([*command, "--dtype", "bfloat16", "--device", "cpu", *FLAGS, "--json"])
            rows[batch] = {"peak_resident_bytes": found["peak_memory_bytes"]}
    growth = rows[BATCHES[1]]["peak_resident_bytes"] / rows[BATCHES[0]]["peak_resident_bytes"]
    return {"rows": rows, "batch_64_over_batch_8": round(growth, 4)}


def write_model(directory: Path) -> None:
    """A model directory of the published d16 with random weights, in bfloat16."""
    import torch

    from mvar_core.analysis.random_models import random_tokenizer, random_transformer
    from mvar_core.config.presets import load_config
    from mvar_core.models.directory import save_model

    config = load_config(MODEL).model
    tokenizer = random_tokenizer(config, dtype=torch.bfloat16).state_dict()
    save_model(
        directory,
        config,
        tokenizer=tokenizer,
        transformer=random_transformer(config, dtype=torch.bfloat16).state_dict(),
    )


def bench(preset: str, batches: tuple[int, ...], *flags: str) -> list[dict[str, Any]]:
    """Rows of `mvar bench --published-style`: MVAR, VAR, and VAR as published."""
    command = [*mvar("bench"), "--preset", preset, "--batch-size", ",".join(map(str, batches)), "--published-style"]
    return run_json([*command, "--no-breakdown", *FLAGS, *flags, "--json"])["rows"]


def baseline() -> dict[str, Any]:
    flags = ("--dtype", "bfloat16", "--device", "cpu", "--repeats", "1")
    kept = ("name", "batch_size", "peak_memory_bytes", "kv_cache_bytes")
    return {
        "rows": [{key: row[key] for key in kept} for row in bench(MODEL, (1,) if machine.SMOKE else (1, 4, 8), *flags)]
    }


def gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"not_run": "this machine has no CUDA device"}
    batches = (1, 8, 32, 64, 128)
    return {"rows": {model: bench(model, batches, "--device", "cuda") for model in GPU_MODELS}}


def mvar(command: str) -> list[str]:
    return [sys.executable, "-m", "mvar_cli", command]


def run_json(command: list[str]) -> Any:
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    return json.loads(found.stdout.strip().splitlines()[-1])


def judge(parts: dict[str, Any]) -> dict[str, bool]:
    """Which promises the parts that are there keep."""
    kept = {}
    if "speed" in parts:
        for dtype, row in parts["speed"]["rows"].items():
            kept[f"{dtype}: at least {ROOFLINE} of the roofline"] = row["roofline"] >= ROOFLINE
    if "memory" in parts:
        peaks = [row["peak_resident_bytes"] for row in parts["memory"]["rows"].values()]
        kept["peak at batch 64 within 5 % of batch 8"] = parts["memory"]["batch_64_over_batch_8"] <= GROWTH
        kept["peak below 1.7 GB"] = max(peaks) < PEAK_BYTES
    return kept


def main() -> None:
    every = {"speed": speed, "memory": memory, "baseline": baseline, "gpu": gpu}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", nargs="+", choices=list(every), default=["speed", "memory"] if machine.SMOKE else list(every)
    )
    parts = json.loads(RESULT.read_text()) if RESULT.exists() and not machine.SMOKE else {}
    for name in parser.parse_args().part:
        parts[name] = {"machine": machine.describe(), **every[name]()}
        kept = judge(parts)
        machine.save("sampling", {**{part: parts[part] for part in every if part in parts}, "kept": kept})
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
