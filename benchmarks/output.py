"""What writing samples costs: memory and speed of shards, threads and assembling, without a model.

python benchmarks/output.py [--counts 5000 50000] [--smoke] writes benchmarks/results/output.json. Random 64 px images
go through the writers of `mvar sample` in batches of 64; each row is measured in a new process. Memory that does not
depend on the number of images is 1.0 times that of the smallest number. PNG rows compare one thread with two.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine

SIDE, TOKENS, BATCH = 64, 341, 64


def measure(output: str, count: int, threads: int, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    from mvar_core.sampling.images import Samples
    from mvar_core.sampling.shards import SampleOutput, SampleShards, SampleSpec

    smooth = np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    pixels, tokens = torch.from_numpy(smooth), torch.zeros(BATCH, TOKENS, dtype=torch.long)

    def generate(indices: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[Samples]:
        for start in range(0, len(indices), BATCH):
            size = min(BATCH, len(indices) - start)
            yield Samples(pixels[:size].clone(), tokens[:size], (0,) * size)

    spec = SampleSpec(
        model="none", weights="", classes=tuple(range(10)), num=count // 10, settings={}, output=output,
        save_tokens=True, stages=False, image_shape=(SIDE, SIDE), scales=7, tokens=TOKENS, device="cpu",
        dtype="float32", attention="auto", version="",
    )  # fmt: skip
    shards = SampleShards(SampleOutput(folder / f"out{'.npz' if output == 'npz' else ''}", output), spec)
    shards.begin()
    began = time.perf_counter()
    shards.make(spec.shards, set(), generate, lambda done, total: None, threads=threads)
    written = time.perf_counter() - began
    shards.assemble()
    return {
        "output": output,
        "images": count,
        "threads": threads,
        "seconds_shards": written,
        "seconds_assembled": time.perf_counter() - began - written,
        "images_per_second": count / (time.perf_counter() - began),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300] if machine.SMOKE else [5_000, 50_000])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        output, count, threads, folder = arguments.one
        print(json.dumps(measure(output, int(count), int(threads), Path(folder))))
        return
    rows = []
    cases = [("npz", count, 2) for count in arguments.counts] + [("png", arguments.counts[0], n) for n in (1, 2)]
    for output, count, threads in cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", output, str(count), str(threads), folder]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    npz = [row for row in rows if row["output"] == "npz"]
    png = [row for row in rows if row["output"] == "png"]
    ratios = {
        "memory_of_most_over_fewest": npz[-1]["peak_memory_bytes"] / npz[0]["peak_memory_bytes"],
        "png_two_threads_over_one": png[1]["images_per_second"] / png[0]["images_per_second"],
    }
    machine.save("output", {"ratios": ratios, "rows": rows})


if __name__ == "__main__":
    main()
