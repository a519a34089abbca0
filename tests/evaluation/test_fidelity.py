from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from mvar_core import evaluation as metrics

BROKEN = """
import torch
from torchvision import datasets, transforms

torch.library.register_fake("torchvision::nms")(lambda *arguments: None)
torch.library.register_fake("torchvision::qnms")(lambda *arguments: None)
"""
WORKING = """
from torchvision import datasets, transforms
"""
OTHERWISE_BROKEN = """
raise RuntimeError("compiled with different CUDA major versions")
"""
PROBE = """
import sys
import warnings

warnings.simplefilter("error")
import torch
from mvar_core.evaluation import fidelity

assert "torch_fidelity" not in sys.modules, "importing the room imported torch-fidelity"
try:
    metric = fidelity.fidelity_module("metric_fid")
    print("imported", metric.KEY_METRIC_FID, metric is sys.modules["torch_fidelity.metric_fid"])
    assert fidelity.fidelity_module() is sys.modules["torch_fidelity"]
    assert fidelity.fidelity_module().utils is sys.modules["torch_fidelity.utils"]
    assert fidelity.fidelity_module("helpers") is fidelity.fidelity_module().helpers
except Exception as error:
    print(type(error).__name__, error)
print("declared", len(fidelity._libraries), hasattr(torch.ops.torchvision, "nms"))
"""


def probe(*search: Path) -> list[str]:
    program = f"import sys\nsys.path[:0] = {list(map(str, search))!r}\n" + PROBE
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.splitlines()


def fake_torchvision(folder: Path, init: str) -> Path:
    package = folder / "torchvision"
    (package / "transforms").mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(init))
    (package / "datasets.py").write_text("class CIFAR10: ...\nclass CIFAR100: ...\nclass STL10: ...\n")
    names = "Resize CenterCrop Compose Normalize ToTensor InterpolationMode"
    (package / "transforms" / "__init__.py").write_text("\n".join(f"class {name}: ..." for name in names.split()))
    (package / "transforms" / "functional.py").write_text("")
    return folder


def test_imports_next_to_the_torchvision_of_this_machine() -> None:
    imported, _ = probe()
    assert imported == "imported frechet_inception_distance True"


def test_declares_the_operators_that_a_broken_torchvision_lacks(tmp_path: Path) -> None:
    imported, declared = probe(fake_torchvision(tmp_path, BROKEN))
    assert imported == "imported frechet_inception_distance True"
    assert declared == "declared 1 True"


def test_declares_nothing_next_to_a_working_torchvision(tmp_path: Path) -> None:
    imported, declared = probe(fake_torchvision(tmp_path, WORKING))
    assert imported == "imported frechet_inception_distance True"
    assert declared == "declared 0 False"


def test_another_failure_is_reported_and_nothing_is_declared(tmp_path: Path) -> None:
    failed, declared = probe(fake_torchvision(tmp_path, OTHERWISE_BROKEN))
    assert failed.startswith("BackendError torch-fidelity cannot be imported: compiled with different CUDA")
    assert declared == "declared 0 False"


def test_importing_the_room_imports_no_heavy_dependency() -> None:
    modules = ", ".join(
        f"mvar_core.evaluation.{path.stem}" for path in sorted(Path(metrics.__file__).parent.glob("[a-z]*.py"))
    )
    program = (
        f"import sys, {modules}; "
        "print([name for name in ('torch_fidelity', 'torchvision', 'sklearn', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""
