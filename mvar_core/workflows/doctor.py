"""What this machine has, what mvar will use, and how to fix the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mvar_core.errors import MvarError
from mvar_core.evaluation.demo import default_demo_path
from mvar_core.evaluation.features import INCEPTION
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.formatting import format_bytes
from mvar_core.kernels import available_backends
from mvar_core.results import Result
from mvar_core.runtime import resolve_device, resolve_dtype
from mvar_core.training.perceptual import LPIPS, VGG16


@dataclass(frozen=True)
class Finding:
    """One fact about the machine: whether mvar can use what was `found`, and what to do if not, usually a command."""

    name: str
    ok: bool
    found: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    """What `doctor` found."""

    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The findings as dictionaries."""
        return {"findings": [asdict(finding) for finding in self.findings]}


def doctor() -> DoctorResult:
    """Examine this machine: Python, torch, the device, memory, attention backends, and what is optional.

    Nothing is downloaded or computed.

        for finding in doctor().findings:
            print(finding.name, finding.found, finding.fix or "")
    """
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    free = format_bytes(shutil.disk_usage(Path.cwd()).free)
    findings = (
        _python(),
        Finding("torch", True, f"{torch.__version__}, built for {built_for}"),
        _device(),
        Finding("threads", True, f"torch computes with {torch.get_num_threads()} of {os.cpu_count()} cores"),
        _memory(),
        Finding("disk", True, f"{free} free in {Path.cwd()}"),
        _attention(),
        _natten(),
        _torch_fidelity(),
        _weights("inception weights", INCEPTION.find),
        _weights("perceptual weights", lambda: ", ".join(str(file.find()) for file in (VGG16, LPIPS)), " (tokenizers)"),
        _cache(),
    )
    return DoctorResult(findings=findings)


def _python() -> Finding:
    supported = (3, 10) <= sys.version_info[:2] < (3, 14)
    fix = None if supported else "Use Python 3.10 … 3.13, for example: make install PYTHON=python3.12"
    return Finding("python", supported, f"{platform.python_version()} on {platform.system()} {platform.machine()}", fix)


def _device() -> Finding:
    device = resolve_device("auto")
    found = f"auto means {device.type} in {str(resolve_dtype('auto', device)).removeprefix('torch.')}"
    fix = None
    if device.type == "cuda":
        free, total = map(format_bytes, torch.cuda.mem_get_info(device))
        found = f"{torch.cuda.get_device_name(device)}, {free} of {total} free; {found}"
    elif torch.version.cuda is not None:
        fix = "torch is built for CUDA but sees no GPU; see what nvidia-smi says."
    elif shutil.which("nvidia-smi"):
        fix = "There is an NVIDIA driver, but torch is built for the CPU: pip install --force-reinstall torch"
    return Finding("device", fix is None, found, fix)


def _memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (AttributeError, OSError, ValueError):
        return Finding("memory", True, "unknown")
    return Finding("memory", True, f"{format_bytes(available)} of {format_bytes(total)} free")


def _attention() -> Finding:
    device = resolve_device("auto")
    backends = available_backends(device, resolve_dtype("auto", device))
    can = ", ".join(name for name, reason in backends if reason is None)
    cannot = [f"{name} cannot: {reason}" for name, reason in backends if reason is not None]
    return Finding("attention", True, "; ".join([f"{can} run on {device.type}", *cannot]))


def _natten() -> Finding:
    command = "pip install setuptools wheel && pip install --no-build-isolation natten"
    fix = f"{command}   (optional; others do the same work)"
    try:
        version = importlib.metadata.version("natten")
        importlib.import_module("natten")
    except importlib.metadata.PackageNotFoundError:
        return Finding("natten", False, "not installed", fix)
    except Exception as error:  # a build for another torch fails in many ways
        return Finding("natten", False, f"{version} does not import: {_one_line(error)}", fix)
    return Finding("natten", True, version)


def _torch_fidelity() -> Finding:
    try:
        version = importlib.metadata.version("torch-fidelity")
        fidelity_module()
        torchvision = importlib.metadata.version("torchvision")
    except Exception as error:
        fix = "pip install --force-reinstall torch-fidelity torchvision"
        return Finding("torch-fidelity", False, _one_line(error), fix)
    return Finding("torch-fidelity", True, f"{version}, torchvision {torchvision}")


def _weights(name: str, find: Callable[[], object], note: str = "") -> Finding:
    try:
        return Finding(name, True, str(find()))
    except MvarError as error:
        return Finding(name, False, error.message + note, error.hint)


def _cache() -> Finding:
    directory = default_demo_path().parent
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("cache", False, f"{directory} cannot be written", "export MVAR_CACHE=/a/folder/you/own")
    return Finding("cache", True, f"{directory}, {format_bytes(shutil.disk_usage(existing).free)} free on its disk")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
