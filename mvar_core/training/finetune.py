"""Starting a transformer from the weights of another: what fits is loaded, tables are adapted, the rest is refused.

The weights come under this project's parameter names. Which token sees which is no weight: it follows from the target's
configuration, so that VAR's weights start an MVAR with the MVAR's own pattern.
"""

# Shape suffixes: L tokens of all scales, l tokens of one scale, C width, S scales, y x the grid of one scale.

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mvar_core.errors import CheckpointError
from mvar_core.models.transformer import Transformer
from mvar_core.scales import Grid, ScalePyramid

Action = Literal["loaded", "resized", "interpolated", "initialised"]

_CLASSES, _START, _POSITIONS, _SCALES = (
    "class_embedding.weight",
    "start_position",
    "position_embedding",
    "scale_embedding.weight",
)


class ParameterReport(NamedTuple):
    """What became of one parameter of the target."""

    name: str
    action: Action
    note: str = ""


@dataclass(frozen=True)
class _Sizes:
    """What a state dict says about the model it belongs to; None where it says nothing."""

    depth: int
    width: int | None
    heads: int | None
    codebook: int | None
    latent_channels: int | None
    shared_adaln: bool
    l2_attention: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> _Sizes:
        blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        head, inputs = state.get("head.weight"), state.get("input_projection.weight")
        scales = state.get("blocks.0.attention.log_head_scale")
        return cls(
            depth=len(blocks),
            width=None if head is None else head.shape[1],
            heads=None if scales is None else scales.numel(),
            codebook=None if head is None else head.shape[0],
            latent_channels=None if inputs is None else inputs.shape[1],
            shared_adaln=any(name.startswith("shared_modulation.") for name in state),
            l2_attention=scales is not None,
        )

    def differences(self, other: _Sizes) -> list[str]:
        """One phrase per size in which the weights (self) and the model (other) differ."""
        return [
            f"{name.replace('_', ' ')} is {found} in the weights and {wanted} in the model"
            for name, found in vars(self).items()
            if (wanted := getattr(other, name)) != found and found is not None and wanted is not None
        ]


@torch.no_grad()
def load_pretrained(
    transformer: Transformer, weights: Mapping[str, Tensor], source_pyramid: ScalePyramid
) -> list[ParameterReport]:
    """Start a transformer from the weights of another one of the same depth, width, heads and codebook.

    Another number of classes keeps the row that stands for no class and initialises the others anew; another pyramid
    interpolates positions within the scale at the same relative place, and takes that scale's embedding. Either all of
    this succeeds or the transformer stays as it was.

    Args:
        transformer: The target, already initialised.
        weights: State dict of the source, under this project's names.
        source_pyramid: The scales of the source.

    Returns:
        What became of every parameter of the target.

    Raises:
        CheckpointError: Sizes that must agree do not, or parameters are missing, unknown or misshaped; all are named.
    """
    target = transformer.state_dict()
    if problems := _Sizes.of(weights).differences(_Sizes.of(target)):
        raise CheckpointError(
            f"These weights do not fit the model: {'; '.join(problems)}.",
            "Choose the preset that they were trained with, or set its transformer.* and tokenizer.* to match.",
        )
    problems = _misfits("lacks", target.keys() - weights.keys()) + _misfits("knows no", weights.keys() - target.keys())
    loaded: dict[str, Tensor] = {}
    reports = []
    for name in target.keys() & weights.keys():
        adapted = _adapt(name, weights[name], target[name], source_pyramid, transformer.pyramid)
        if adapted is None:
            found, wanted = tuple(weights[name].shape), tuple(target[name].shape)
            problems.append(f"{name} is {found}, expected {wanted}")
            continue
        loaded[name], report = adapted
        reports.append(report)
    if problems:
        raise CheckpointError(f"These weights do not fit the model: {'; '.join(problems)}.")
    transformer.load_state_dict(loaded)
    order = {name: index for index, name in enumerate(target)}
    return sorted(reports, key=lambda report: order[report.name])


def _misfits(verb: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = sorted(names)[:6]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    subject = "the file" if verb == "lacks" else "the model"
    return [f"{subject} {verb} {', '.join(shown)}{more}"]


def _adapt(
    name: str, found: Tensor, wanted: Tensor, source: ScalePyramid, target: ScalePyramid
) -> tuple[Tensor, ParameterReport] | None:
    """The value that a parameter starts from, or None where the weights do not fit."""
    value = found.to(device=wanted.device, dtype=wanted.dtype)
    if found.ndim != wanted.ndim or found.shape[-1] != wanted.shape[-1]:
        return None
    if name == _CLASSES and found.shape != wanted.shape:
        table = wanted.clone()
        table[-1] = value[-1]
        note = f"{len(found) - 1} classes in the weights, {len(wanted) - 1} here: all but no-class start anew"
        return table, ParameterReport(name, "initialised", note)
    if name == _SCALES and (source != target or found.shape != wanted.shape):
        if len(found) != source.num_scales:
            return None
        chosen = [matching_scale(scale, target, source) for scale in range(target.num_scales)]
        note = f"from scales {', '.join(map(str, chosen))}"
        return value[chosen], ParameterReport(name, "resized", note)
    if name in (_START, _POSITIONS) and source != target:
        whole = name == _POSITIONS
        old = source if whole else ScalePyramid(source.grids[:1])
        new = target if whole else ScalePyramid(target.grids[:1])
        if found.shape[1] != old.num_tokens:
            return None
        if old == new:
            return value, ParameterReport(name, "loaded")
        return interpolate_positions(value, old, new), ParameterReport(name, "interpolated", f"{old} → {new}")
    return (value, ParameterReport(name, "loaded")) if found.shape == wanted.shape else None


def matching_scale(scale: int, target: ScalePyramid, source: ScalePyramid) -> int:
    """The scale of `source` at the same relative place between the first and the last."""
    return round(target.ratio(scale) * (source.num_scales - 1))


def interpolate_positions(
    table_1LC: Float[Tensor, "1 L C"], source: ScalePyramid, target: ScalePyramid
) -> Float[Tensor, "1 M C"]:
    """A position table for another pyramid: each scale's map is resized (bicubic) from the scale at its place."""
    parts = []
    for scale, grid in enumerate(target.grids):
        origin = matching_scale(scale, target, source)
        parts.append(_resize(table_1LC[:, source.spans[origin]], source.grids[origin], grid))
    return torch.cat(parts, dim=1)


def _resize(map_1lC: Tensor, found: Grid, wanted: Grid) -> Tensor:
    if found == wanted:
        return map_1lC
    map_1Cyx = map_1lC.float().transpose(1, 2).unflatten(2, tuple(found))
    resized = F.interpolate(map_1Cyx, size=tuple(wanted), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(map_1lC.dtype)
