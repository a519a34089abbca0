"""Train, fine-tune, sample, measure and understand next-scale visual autoregressive models (VAR, MVAR).

Everything that the command line does is one function here, with the command's names; docs/python.md shows how they go
together. Names are resolved on first use, so that `import mvar_core` loads nothing; `__init__.pyi` lists them.
"""

import ast
from importlib import import_module
from inspect import isfunction
from pkgutil import get_data
from typing import Any

__version__ = "0.1.0"

_LISTED = ast.parse(get_data(__name__, "__init__.pyi") or b"").body  # the one list, for type checkers and here
_SOURCE = {alias.name: node.module for node in _LISTED if isinstance(node, ast.ImportFrom) for alias in node.names}

__all__ = ["__version__", *sorted(_SOURCE)]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it (PEP 562); functions check their arguments."""
    if name not in _SOURCE:
        raise AttributeError(f"module 'mvar_core' has no attribute {name!r}")
    value = getattr(import_module(_SOURCE[name]), name)
    if isfunction(value):
        value = import_module("mvar_core.config.section").checked(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
