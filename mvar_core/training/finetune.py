"""Starting a transformer from the weights of another: what fits is loaded, tables are adapted, the rest is refused.

The weights are under this project's parameter names. Which token sees which is not a weight: it follows from the
target's configuration, so that VAR's weights start an MVAR with the MVAR's own pattern.
"""

# Shape suffixes: L tokens of all scales, l tokens of one scale, C width, S scales, y x the grid of one scale.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mvar_core.config import ModelConfig
from mvar_core.errors import CheckpointError
from mvar_core.models.conditioning import CONDITIONERS
from mvar_core.models.transformer import Transformer
from mvar_core.pyramid import ScalePyramid

Action = Literal["loaded", "resized", "interpolated", "initialised", "ignored"]
Classes = Literal["auto", "keep", "resize", "reinit"]
"""What becomes of the class table: `load_pretrained`."""
START_REPORT = "started-from.json"
"""The file of a run directory that lists what became of the weights that the run started from."""

_CLASSES, _START, _POSITIONS, _SCALES = (
    "class_embedding.weight",
    "start_position",
    "position_embedding",
    "scale_embedding.weight",
)


class ParameterReport(NamedTuple):
    """What became of one parameter of the target, or of one tensor of the file that the target has no use for."""

    name: str
    action: Action
    note: str = ""


_Adapted = tuple[Tensor, ParameterReport]


def describe_reports(source: str, reports: Sequence[ParameterReport], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """What became of the weights of `source` and its buffers (`ignored`), for a file in the run directory."""
    note = "follows from the configuration, never from a file"
    rows = [*reports, *(ParameterReport(name, "ignored", note) for name in ignored)]
    return {
        "source": source,
        "counts": dict(Counter(row.action for row in rows)),
        "parameters": [row._asdict() for row in rows],
    }


def check_start(config: ModelConfig, source: ModelConfig, origin: str) -> None:
    """Refuse weights of another size than the model's (CheckpointError), which are those of `source`, in `origin`."""
    if source.transformer is None:
        raise CheckpointError(f"{origin} is a tokenizer alone; fine-tuning starts from a transformer.")
    assert config.transformer is not None
    pairs = {
        name: (getattr(source.transformer, name), getattr(config.transformer, name))
        for name in ("depth", "embed_dim", "num_heads", "mlp_ratio", "shared_adaln", "l2_attention")
    }
    pairs |= {
        name: (getattr(source.tokenizer, name), getattr(config.tokenizer, name))
        for name in ("codebook_size", "latent_channels")
    }
    if None not in (dims := (source.conditioning.dim, config.conditioning.dim)):
        pairs["conditioning.dim"] = dims
    if wrong := [f"{name} is {one} there and {two} here" for name, (one, two) in pairs.items() if one != two]:
        raise CheckpointError(
            f"The weights of {origin} do not fit the model: {'; '.join(wrong)}.",
            "Choose the preset of their size, or leave out --preset: sizes are then read off the weights.",
        )


@torch.no_grad()
def load_pretrained(
    transformer: Transformer,
    weights: Mapping[str, Tensor],
    source_pyramid: ScalePyramid,
    *,
    classes: Classes = "auto",
    source_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
) -> list[ParameterReport]:
    """Start a transformer from the weights of another one of the same depth, width, heads and codebook.

    `weights` are under this project's names. For another pyramid, positions are interpolated from the scale at the same
    relative place, and that scale's embedding is copied. Either all of this succeeds or the transformer stays as it
    was. Returns what became of every parameter.

    The null label's row of the class table is always copied. What becomes of the others:

    * keep: they are copied; another number of classes is refused.
    * resize: a class gets the row of the same name where both models name their classes and some names agree, else of
      the same number; one that has none starts as the null label.
    * reinit: they start from scratch.
    * auto: keep where the numbers of classes agree, else reinit.

    Where the source is conditioned on classes and the target on vectors, or the other way round, the embedding of
    conditions starts from scratch, except the one for no condition.

    Raises:
        CheckpointError: Parameters are missing, unknown or of another shape; all are named.
    """
    target = transformer.state_dict()
    loaded, reports, others = _other_conditions(transformer, weights)
    lacking, unknown = target.keys() - weights.keys() - loaded.keys(), weights.keys() - target.keys() - others
    problems = _misfits("the file lacks", lacking) + _misfits("the model has no", unknown)
    for name in target.keys() & weights.keys():
        found, wanted = weights[name], target[name]
        if name == _CLASSES and found.ndim == 2 and found.shape[1] == wanted.shape[1]:
            adapted: _Adapted | None = _class_table(found, wanted, classes, source_names, target_names)
        else:
            adapted = _adapt(name, found, wanted, source_pyramid, transformer.pyramid)
        if adapted is None:
            problems.append(f"{name} is {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        else:
            loaded[name], report = adapted
            reports.append(report)
    if problems:
        raise CheckpointError(
            f"These weights do not fit the model: {'; '.join(problems)}.",
            "Choose the preset that they were trained with, or set its transformer.* and tokenizer.* to match.",
        )
    transformer.load_state_dict(loaded)
    order = {name: index for index, name in enumerate(target)}
    return sorted(reports, key=lambda report: order[report.name])


def _other_conditions(
    transformer: Transformer, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[ParameterReport], set[str]]:
    """For weights with another kind of condition: the target's own values, reports, and the names of the weights."""
    own = transformer.conditioner
    if any(name.startswith(f"{own.name}.") for name in weights):
        return {}, [], set()
    for kind in CONDITIONERS:
        prefix = f"{kind.name}."
        state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if state:
            null_C, before = kind.null_of(state), {f"{own.name}.{name}": x for name, x in own.state_dict().items()}
            values = {f"{own.name}.{name}": value for name, value in own.with_null(null_C).items()}
            names = ", ".join(sorted(prefix + name for name in state))
            notes = {
                name: f"instead of {names}"
                + ("" if value.equal(before[name]) else "; the null condition is copied from there")
                for name, value in values.items()
            }
            reports = [ParameterReport(name, "initialised", note) for name, note in notes.items()]
            return values, reports, {prefix + name for name in state}
    return {}, [], set()


def _misfits(what: str, names: set[str]) -> list[str]:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"{what} {', '.join(sorted(names)[:6])}{more}"] if names else []


def _class_table(
    found: Tensor,
    wanted: Tensor,
    classes: Classes,
    source_names: Sequence[str] | None,
    target_names: Sequence[str] | None,
) -> _Adapted:
    """The class table that a model starts from; see `load_pretrained`."""
    value = found.to(device=wanted.device, dtype=wanted.dtype)
    before, now = len(found) - 1, len(wanted) - 1
    counts = f"{before} classes in the weights, {now} here"
    if classes == "auto":
        classes = "keep" if before == now else "reinit"
    if classes == "keep":
        if before != now:
            raise CheckpointError(
                f"These weights do not fit the model: {counts}.",
                "Choose what becomes of the class table: --classes resize or --classes reinit.",
            )
        return value, ParameterReport(_CLASSES, "loaded")
    if classes == "reinit":
        table = wanted.clone()
        table[-1] = value[-1]
        return table, ParameterReport(_CLASSES, "initialised", f"{counts}: all but the null label start from scratch")
    numbers = {name: number for number, name in reversed(list(enumerate(source_names or ())))}
    rows = [numbers.get(name, before) for name in target_names or ()]
    named = any(row != before for row in rows)
    if not named:
        rows = [min(number, before) for number in range(now)]
    copied = sum(row != before for row in rows)
    note = f"{counts}: {copied} copied by {'name' if named else 'number'}, {now - copied} start as the null label"
    return value[[*rows, before]], ParameterReport(_CLASSES, "resized", note)


def _adapt(name: str, found: Tensor, wanted: Tensor, source: ScalePyramid, target: ScalePyramid) -> _Adapted | None:
    """The value that a parameter starts from, or None where the weights do not fit."""
    value = found.to(device=wanted.device, dtype=wanted.dtype)
    if found.ndim != wanted.ndim or found.shape[-1] != wanted.shape[-1]:
        return None
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
    maps = []
    for scale, grid in enumerate(target.grids):
        origin = matching_scale(scale, target, source)
        map_1lC, found = table_1LC[:, source.spans[origin]], source.grids[origin]
        if found != grid:
            map_1Cyx = map_1lC.float().transpose(1, 2).unflatten(2, tuple(found))
            resized = F.interpolate(map_1Cyx, size=tuple(grid), mode="bicubic", align_corners=False)
            map_1lC = resized.flatten(2).transpose(1, 2).to(map_1lC.dtype)
        maps.append(map_1lC)
    return torch.cat(maps, dim=1)
