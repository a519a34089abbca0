"""The library under the `mvar` command line: next-scale visual autoregressive models (VAR, MVAR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvar_core.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the pipeline, and torch with it, only when it is asked for."""
    if name == "Pipeline":
        from mvar_core.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
