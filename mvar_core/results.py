"""What the functions of the public face return: frozen records whose fields are the keys of `--json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a function would do: every setting, resolved; the steps, in order; the predicted cost, where there is one.

    `facts` are further keys of the JSON object.
    """

    configuration: Mapping[str, Any]
    steps: tuple[str, ...]
    cost: Any = None
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a dry run."""
        cost = self.cost.to_dict() if hasattr(self.cost, "to_dict") else self.cost
        values = {"dry_run": True, "configuration": self.configuration, "cost": cost, "plan": self.steps, **self.facts}
        return plain(values)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is common to all results.

    `dry_run` is what would have been done, where that was asked for; the other fields then hold what is known before.
    """

    dry_run: DryRun | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as `--json` prints them; fields that are marked hidden are left out."""
        if self.dry_run is not None:
            return self.dry_run.to_dict()
        shown = (field.name for field in fields(self) if not field.metadata.get("hidden"))
        return {name: plain(getattr(self, name)) for name in shown if name != "dry_run"}


def plain(value: Any) -> Any:
    """A value as JSON knows it: what is not finite becomes null, paths and arrays become text and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
