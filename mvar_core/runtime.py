"""The machine: devices, dtypes, memory, and random numbers that are passed, never global."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvar_core import __version__
from mvar_core.errors import BackendError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `Machine.device` stands for.

    BackendError for one that this machine or this build of torch does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.",
            "Run `mvar doctor` to see why, or use --device cpu.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BackendError(f"--device {name}: this machine has no MPS device.", "Use --device cpu.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `Machine.dtype` stands for; auto is bfloat16 on GPUs that compute in it, float16 on older ones.

    Elsewhere auto is float32, in which a CPU repeats a run to the bit.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    old = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8
    return torch.float16 if old else torch.bfloat16  # cards before Ampere (8.x) only imitate bfloat16


def has_bfloat16_unit() -> bool:
    """Whether this CPU computes products and convolutions in bfloat16 (oneDNN, on x86 from AVX-512 on)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator whose stream depends on `parts` alone, for example ("train", seed, step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class RowDraws(NamedTuple):
    """Uniform numbers for some rows of a batch, from `start`, of `total` rows whose numbers are generated.

    So a row sees the same ones whichever rows are computed with it.
    """

    generator: torch.Generator
    start: int
    total: int


def draw_rows(source: torch.Generator | RowDraws, count: int) -> Tensor:
    """The next number of each of `count` rows, (count,) float32 in [0, 1); of a generator, rows are the batch."""
    random, start, total = source if isinstance(source, RowDraws) else (source, 0, count)
    return torch.rand(total, generator=random, device=random.device)[start : start + count]


def sample_uniforms(seed: int, indices: Sequence[int], count: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), float64 (N, count) on the CPU: row i depends on (seed, indices[i], stream) alone.

    So a sample never depends on its batch.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])).random(count)
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count, dtype=torch.float64)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on the GPU, or the resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # What the system calls the process's peak also counts what its parent held when it started it; this does not.
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next measures finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe_machine() -> dict[str, Any]:
    """Machine, versions and date: what a measurement must state about where it was made."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "mvar": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": next(models, platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
