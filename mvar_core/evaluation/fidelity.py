"""torch-fidelity, imported when it is first needed, even if torchvision's compiled part cannot load.

torch-fidelity imports torchvision, and some torchvision wheels fail next to a CPU build of torch: their compiled part
needs CUDA, its operators stay undeclared, and registering their shape rules raises "operator torchvision::nms does not
exist". Nothing that is measured here needs those operators, so declaring their schemas is enough, and only after that
very error: a working torchvision declares them itself, and a second declaration aborts the process.
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
"""A declaration lasts as long as its library object."""


@cache
def fidelity_module(name: str = "") -> ModuleType:
    """Import torch-fidelity, or one of its modules, such as "metric_fid".

    BackendError where that, or its torchvision, is impossible.
    """
    module = f"torch_fidelity.{name}" if name else "torch_fidelity"
    try:
        try:
            return importlib.import_module(module)
        except RuntimeError as error:
            if MISSING_OPERATOR not in str(error):
                raise
            # Declare the schemas that the compiled part would have, and forget the modules that were half imported.
            _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in SCHEMAS:
                _libraries[-1].define(schema)
            for loaded in [each for each in sys.modules if each.split(".")[0] in ("torchvision", "torch_fidelity")]:
                del sys.modules[loaded]
            return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"torch-fidelity cannot be imported: {one_line(error)}.",
            f"Install the torchvision that belongs to torch {torch.__version__}, or reinstall torch-fidelity.",
        ) from error
