"""torch-fidelity, imported when it is first needed, also next to a torchvision whose compiled part cannot load.

torch-fidelity imports torchvision, and some torchvision wheels with a CPU build of torch fail there: their compiled
part wants CUDA, its operators stay undeclared, and registering their shape rules raises "operator torchvision::nms does
not exist". Nothing that is measured here needs those operators, so declaring their schemas is enough. It must happen
only after that very error: a working torchvision declares them itself, and a second declaration aborts the process.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

from mvar_core.errors import BackendError, one_line

MISSING_OPERATOR = "operator torchvision::nms does not exist"

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[torch.library.Library] = []
"""Declarations last as long as the object that made them."""


@cache
def fidelity_module(name: str = "") -> ModuleType:
    """Import torch-fidelity, or one of its modules, such as "metric_fid".

    Raises:
        BackendError: The package, or the torchvision it needs, cannot be imported.
    """
    module = f"torch_fidelity.{name}" if name else "torch_fidelity"
    try:
        try:
            return importlib.import_module(module)
        except RuntimeError as error:
            if MISSING_OPERATOR not in str(error):
                raise
            _declare_operators()
            return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"torch-fidelity cannot be imported: {one_line(error)}.",
            f"Install the torchvision that belongs to torch {torch.__version__}, or reinstall torch-fidelity.",
        ) from error


def _declare_operators() -> None:
    """Declare the schemas that the compiled part would have, and forget the modules that were half imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    for module in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[module]
