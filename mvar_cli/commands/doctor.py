"""`mvar doctor`: what this machine has, what mvar will use, and the command that mends the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mvar_cli import old_options as options
from mvar_cli.old_console import Console, format_bytes
from mvar_core.errors import MvarError

EXAMPLE = "mvar doctor"


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    found: str
    mend: str | None = None


def run(as_json: options.AsJson = False) -> None:
    """What this machine has and what mvar will use: one line per finding, and the command that mends it."""
    console = Console(as_json)
    findings = [check() for check in CHECKS]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        console.say(f"{'ok  ' if finding.ok else 'note'}  {finding.name:<{width}}  {finding.found}")
        if finding.mend:
            console.say(f"      {'':<{width}}  {finding.mend}")
    console.finish({"findings": [finding._asdict() for finding in findings]})


def _python() -> Finding:
    fits = (3, 10) <= sys.version_info[:2] < (3, 14)
    mend = None if fits else "Use Python 3.10 … 3.13, for example: make install PYTHON=python3.12"
    return Finding("python", fits, f"{platform.python_version()} on {platform.system()} {platform.machine()}", mend)


def _torch() -> Finding:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding("torch", True, f"{torch.__version__}, built for {built_for}")


def _device() -> Finding:
    import torch

    from mvar_core.runtime import resolve_device, resolve_dtype

    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        found = f"{name}, {format_bytes(free)} of {format_bytes(total)} free; auto means {device} in {dtype}"
        return Finding("device", True, found)
    mend = None
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        mend = "There is an NVIDIA driver, but torch is built for the CPU: pip install --force-reinstall torch"
    elif torch.version.cuda is not None:
        mend = "torch is built for CUDA but sees no GPU; see what nvidia-smi says."
    return Finding("device", mend is None, f"auto means {device.type} in {dtype}", mend)


def _threads() -> Finding:
    import torch

    return Finding("threads", True, f"torch computes with {torch.get_num_threads()} of {os.cpu_count()} cores")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return Finding("memory", True, "unknown")
    return Finding("memory", True, f"{format_bytes(available)} of {format_bytes(total)} free")


def _attention() -> Finding:
    from mvar_core.kernels import available_backends
    from mvar_core.runtime import resolve_device, resolve_dtype

    device = resolve_device("auto")
    backends = available_backends(device, resolve_dtype("auto", device))
    can = [name for name, reason in backends if reason is None]
    cannot = [f"{name} cannot: {reason}" for name, reason in backends if reason is not None]
    return Finding("attention", True, "; ".join([f"{', '.join(can)} run on {device.type}", *cannot]))


def _natten() -> Finding:
    mend = (
        "pip install setuptools wheel && pip install --no-build-isolation natten   (optional; others do the same work)"
    )
    try:
        version = importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        return Finding("natten", False, "not installed", mend)
    try:
        import natten  # noqa: F401
    except Exception as error:
        return Finding("natten", False, f"{version} does not import: {_one_line(error)}", mend)
    return Finding("natten", True, version)


def _torch_fidelity() -> Finding:
    from mvar_core.evaluation.fidelity import fidelity_module

    try:
        version = importlib.metadata.version("torch-fidelity")
        fidelity_module()
    except Exception as error:
        return Finding(
            "torch-fidelity", False, _one_line(error), "pip install --force-reinstall torch-fidelity torchvision"
        )
    return Finding("torch-fidelity", True, f"{version}, torchvision {_version('torchvision')}")


def _inception() -> Finding:
    from mvar_core.evaluation.features import find_inception_weights

    try:
        return Finding("inception weights", True, str(find_inception_weights()))
    except MvarError as error:
        return Finding("inception weights", False, error.message, error.hint)


def _perceptual() -> Finding:
    from mvar_core.training.perceptual import LPIPS, VGG16, find_weights

    try:
        return Finding("perceptual weights", True, ", ".join(str(find_weights(file)) for file in (VGG16, LPIPS)))
    except MvarError as error:
        return Finding("perceptual weights", False, f"{error.message} (only for tokenizers)", error.hint)


def _cache() -> Finding:
    from mvar_core.evaluation.demo import default_demo_path

    directory = default_demo_path().parent
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding("cache", False, f"{directory} cannot be written", "export MVAR_CACHE=/a/folder/you/own")
    return Finding("cache", True, f"{directory}, {format_bytes(shutil.disk_usage(existing).free)} free on its disk")


def _disk() -> Finding:
    return Finding("disk", True, f"{format_bytes(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _device,
    _threads,
    _memory,
    _disk,
    _attention,
    _natten,
    _torch_fidelity,
    _inception,
    _perceptual,
    _cache,
)


def _version(package: str) -> Any:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
