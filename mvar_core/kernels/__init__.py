"""Attention over one scale: one call, several backends that agree with the reference."""

from __future__ import annotations

from mvar_core.kernels.select import BACKEND_NAMES, attend, available_backends, check_backend

__all__ = ["BACKEND_NAMES", "attend", "available_backends", "check_backend"]
