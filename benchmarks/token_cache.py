"""A token cache of ImageNet's size: how long it takes to open, what it costs in memory, how fast rows are read.

python benchmarks/token_cache.py [--smoke] writes benchmarks/results/token_cache.json. The cache is synthetic: 1,281,167
images in two views of 680 tokens, the token files sparse (all zeros), labels and names written in full. It is opened in
a new process; memory is compared with that after importing torch and mvar. The baseline is what a reader would hold
without side files: the images' names as Python strings.
"""

import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

IMAGES, VIEWS, TOKENS, CLASSES = 10_000 if machine.SMOKE else 1_281_167, 2, 680, 1000
PYRAMID = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH = 448
SECONDS, MEGABYTES = 2.0, 200


def write_cache(out: Path) -> None:
    """The files that `mvar tokenize` writes for this many images, with tokens that are all 0."""
    import numpy as np

    from mvar_core.config.training import DataConfig
    from mvar_core.data.token_writer import default_shard
    from mvar_core.data.tokens import MANIFEST, FileEntry, Manifest, Shard
    from mvar_core.io.files import write_json

    per_shard = default_shard(VIEWS * TOKENS * 2, IMAGES)
    shards, hashes = [], {}
    labels = np.sort(np.random.default_rng(0).integers(0, CLASSES, IMAGES)).astype(np.uint16)
    for number, start in enumerate(range(0, IMAGES, per_shard)):
        count = min(per_shard, IMAGES - start)
        path = out / f"tokens-{number:05d}.npy"
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u2", "fortran_order": False, "shape": (count, VIEWS, TOKENS)}
            )
            header = file.tell()
            file.truncate(header + count * VIEWS * TOKENS * 2)
        if count not in hashes:
            hashes[count] = hashlib.sha256(path.read_bytes()).hexdigest()
        tokens = FileEntry(file=path.name, bytes=path.stat().st_size, sha256=hashes[count])
        np.save(out / f"labels-{number:05d}.npy", labels[start : start + count])
        names = (f"n{label:08d}/n{label:08d}_{start + n}.JPEG\n" for n, label in enumerate(labels[start:][:count]))
        (out / f"names-{number:05d}.txt").write_text("".join(names))
        entries = [
            FileEntry.of(out / f"{kind}-{number:05d}.{end}") for kind, end in (("labels", "npy"), ("names", "txt"))
        ]
        shards.append(Shard(images=count, tokens=tokens, labels=entries[0], names=entries[1]))
    manifest = Manifest(
        tokenizer_hash="0" * 64,
        patch_sizes=PYRAMID,
        codebook_size=4096,
        image_size=256,
        class_names=tuple(f"class {number}" for number in range(CLASSES)),
        images=IMAGES,
        views=VIEWS,
        view_names=("image", "flip"),
        data=DataConfig(flip=True),
        seed=0,
        dtype="uint16",
        source="imagenet:train",
        fingerprint="0" * 64,
        images_per_shard=per_shard,
        shards=tuple(shards),
    )
    write_json(out / MANIFEST, manifest.to_json())


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def bytes_read() -> int:
    """Bytes that this process has read from files, without those that are only mapped."""
    return int(Path("/proc/self/io").read_text().split()[1])


def seconds_to_first_batch(out: Path, verify: bool) -> dict[str, float]:
    """From opening to a first batch, and the 50 batches behind it, with hashes compared in a thread or never."""
    from mvar_core.data.tokens import TokenCache
    from mvar_core.training.trainer import batch_rows

    batches = [batch_rows(step, BATCH, IMAGES * VIEWS, seed=0) for step in range(51)]
    start = time.perf_counter()
    cache = TokenCache.open(out, verify=None if verify else False)
    cache.batch(batches[0])
    first = time.perf_counter()
    for rows in batches[1:]:
        cache.batch(rows)
    following = time.perf_counter()
    cache.verify()
    return {"first": first - start, "following": following - first, "compared": time.perf_counter() - start}


def measure(out: Path) -> dict[str, Any]:
    """Open the cache, read a first batch and many more, in a process that does nothing else."""
    import numpy as np
    import torch

    from mvar_core.data.tokens import TokenCache
    from mvar_core.training.trainer import batch_rows

    torch.zeros(8, dtype=torch.long)
    gc.collect()
    before = {name: status(name) for name in ("VmRSS", "RssAnon", "VmHWM")}
    read = bytes_read()
    start = time.perf_counter()
    cache = TokenCache.open(out, verify=False)
    opened = time.perf_counter()
    read = bytes_read() - read
    rows = batch_rows(0, BATCH, len(cache), seed=0)
    ordered = time.perf_counter()
    tokens, labels = cache.batch(rows)
    first = time.perf_counter()
    assert tokens.shape == (BATCH, TOKENS)
    assert labels.shape == (BATCH,)
    growth = {name: status(name) - value for name, value in before.items()}
    steps = range(1, 201)
    began = time.perf_counter()
    for step in steps:
        batch_rows(step, BATCH, len(cache), seed=0)
    sampler = (time.perf_counter() - began) / len(steps)
    began = time.perf_counter()
    for step in steps:
        cache.batch(batch_rows(step, BATCH, len(cache), seed=0))
    batch = (time.perf_counter() - began) / len(steps) - sampler
    gc.collect()
    anonymous = status("RssAnon")
    began = time.perf_counter()
    names = [line for path in sorted(out.glob("names-*.txt")) for line in path.read_text().split("\n")[:-1]]
    strings = time.perf_counter() - began
    assert len(names) == IMAGES
    size = sum(path.stat().st_size for path in out.iterdir())
    assert len(np.unique(rows)) == BATCH
    return {
        "bytes": size,
        "bytes_per_view": sum(path.stat().st_size for path in out.glob("*.npy")) / (IMAGES * VIEWS),
        "shards": len(cache.manifest.shards),
        "seconds": {
            "open": opened - start,
            "first_epoch_order": ordered - opened,
            "first_batch": first - ordered,
            "open_to_first_batch": first - start,
            "sampler_per_step": sampler,
            "read_per_batch": batch,
        },
        "bytes_read_by_opening": read,
        "growth_bytes": {
            "resident": growth["VmRSS"],
            "resident_without_maps": growth["RssAnon"],
            "peak_resident": growth["VmHWM"],
        },
        "baseline_names_as_strings": {"seconds": strings, "bytes": status("RssAnon") - anonymous},
    }


def in_new_process(call: str) -> dict[str, Any]:
    code = f"import json; from pathlib import Path; from token_cache import *; print(json.dumps({call}))"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, check=True, cwd=Path(__file__).parent, stdout=subprocess.PIPE)
    return json.loads(process.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name))
        write_cache(Path(folder))
        found = in_new_process(f"measure(Path({folder!r}))")
        pairs = [
            [in_new_process(f"seconds_to_first_batch(Path({folder!r}), {verify})") for verify in (True, False)]
            for _ in range(2 if machine.SMOKE else 9)
        ]
    seconds = found["seconds"]["open_to_first_batch"]
    grown = found["growth_bytes"]["peak_resident"]
    comparing = {
        name: statistics.median(compared[name] / never[name] for compared, never in pairs)
        for name in ("first", "following")
    }
    kept = {
        f"open to first batch within {SECONDS:.0f} s": seconds < SECONDS,
        f"peak growth below {MEGABYTES} MB": grown < MEGABYTES * 10**6,
        "at most 1400 bytes per view": found["bytes_per_view"] <= 1400,
        "comparing hashes delays the first batch by at most 2 %": comparing["first"] <= 1.02,
    }
    names = found["baseline_names_as_strings"]
    ratios = {
        "comparing_hashes_over_never": comparing,
        "seconds_to_compare_all": statistics.median(compared["compared"] for compared, _ in pairs),
        "seconds_over_names_as_strings": seconds / names["seconds"],
        "memory_over_names_as_strings": found["growth_bytes"]["resident_without_maps"] / names["bytes"],
    }
    machine.save(
        "token_cache",
        {"images": IMAGES, "views": VIEWS, "tokens": TOKENS, "batch": BATCH, **found, "ratios": ratios, "kept": kept},
    )
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    machine.parse_no_options(__doc__)
    main()
