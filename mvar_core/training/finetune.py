"""Starting a transformer from the weights of another: what fits is loaded, tables are adapted, the rest is refused.

The weights are under this project's parameter names. Which token sees which is not a weight: it follows from the
target's configuration, so that VAR's weights start an MVAR with the MVAR's own pattern.
"""

# Shape suffixes: L tokens of all scales, l tokens of one scale, C width, S scales, y x the grid of one scale.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mvar_core.classes import Classes
from mvar_core.config import ModelConfig
from mvar_core.errors import CheckpointError, ConfigError, nearest, shown
from mvar_core.models.conditioning import CONDITIONERS
from mvar_core.models.transformer import Transformer
from mvar_core.pyramid import ScalePyramid

Action = Literal["loaded", "resized", "interpolated", "initialised", "ignored"]
CHOICES = ("auto", "by-number", "new")
"""What becomes of the class table: `match_classes`."""
FORMER_CHOICES = {"keep": "auto", "resize": "auto", "reinit": "new"}
START_REPORT = "started-from.json"
"""The file of a run directory that lists what became of the weights that the run started from."""

_CLASSES, _SCALES = "class_embedding.weight", "scale_embedding.weight"
_START, _POSITIONS = "start_position", "position_embedding"
_SIZES = (
    "transformer.depth", "transformer.embed_dim", "transformer.num_heads", "transformer.mlp_ratio",
    "transformer.shared_adaln", "transformer.l2_attention",
    "tokenizer.codebook_size", "tokenizer.latent_channels", "conditioning.dim",
)  # fmt: skip
"""What the weights and the model must have in common."""


class ClassRows(NamedTuple):
    """The row of the weights' class table that each class starts from, None for none; how many rows none starts from.

    `by` says what classes were matched by, name or number; None where all of them are new.
    """

    rows: tuple[int | None, ...]
    dropped: int
    by: str | None

    def counts(self) -> dict[str, int]:
        """How many classes are matched, how many new, and how many of the weights are dropped."""
        new = self.rows.count(None)
        return {"matched": len(self.rows) - new, "new": new, "dropped": self.dropped}

    def note(self) -> str:
        """The same in words."""
        how = f" by {self.by}" if self.by else ""
        matched, new, dropped = self.counts().values()
        return f"{matched} classes matched{how}, {new} new, {dropped} of the weights dropped"


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
    pairs = {name: (attrgetter(name)(source), attrgetter(name)(config)) for name in _SIZES}
    if None in pairs["conditioning.dim"]:
        del pairs["conditioning.dim"]
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
    classes: ClassRows | None = None,
) -> list[ParameterReport]:
    """Start a transformer from the weights of another one of the same depth, width, heads and codebook.

    `weights` are under this project's names. For another pyramid, positions are interpolated from the scale at the same
    relative place, and that scale's embedding is copied. Either all of this succeeds or the transformer stays as it
    was. Returns what became of every parameter.

    `classes` (`match_classes`) says which rows of the class table are copied; None is that each class starts from the
    row of its number. The null label's row always is. A class without a row starts as the null label, where others have
    one, else from scratch.

    Where the source is conditioned on classes and the target on vectors, or the other way round, the embedding of
    conditions starts from scratch, except the one for no condition. CheckpointError names all parameters that are
    missing, unknown or of another shape.
    """
    target = transformer.state_dict()
    loaded, reports, others = _other_conditions(transformer, weights)
    lacking, unknown = target.keys() - weights.keys() - loaded.keys(), weights.keys() - target.keys() - others
    problems = _misfits("the file lacks", lacking) + _misfits("the model has no", unknown)
    for name in (name for name in target if name in weights):  # in the model's order, which the message keeps
        found, wanted = weights[name], target[name]
        if name == _CLASSES and found.ndim == 2 and found.shape[1] == wanted.shape[1]:
            counts = Classes.of(None, len(found) - 1), Classes.of(None, len(wanted) - 1)
            adapted: _Adapted | None = _class_table(found, wanted, classes or match_classes(*counts))
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


def match_classes(source: Classes, target: Classes, choice: str = "auto") -> ClassRows:
    """Which row of the weights' class table each class starts from; `choice` is one of CHOICES.

    * auto: that of the same class. Where both sides have names, names say which that is, whatever the order; where a
      side has none, numbers do if there are as many classes.
    * by-number: class N starts from row N, whatever they are called.
    * new: all start from scratch.
    """
    choice = FORMER_CHOICES.get(choice, choice)
    if choice not in CHOICES:
        raise ConfigError(f"--classes {shown(choice)} is not known. {nearest(choice, CHOICES)}")
    rows, by = (target.by_position(source), "number") if choice == "by-number" else target.match(source)
    nothing, guess = set(rows) == {None}, by == "order" or source.names is target.names is None
    if choice == "auto" and by == "name" and nothing and target.count > 1:
        ours, theirs = (f"{', '.join(side.all_names()[:3])}, …" for side in (target, source))
        raise ConfigError(
            f"{target.origin} has {target.count} classes ({ours}); {source.origin} has none of them ({theirs}).",
            "Use --classes new to train them from scratch, or --classes by-number if class N is class N there.",
        )
    if choice == "new" or nothing or (choice == "auto" and guess and source.count != target.count):
        return ClassRows((None,) * target.count, source.count, None)
    return ClassRows(rows, source.count - len({*rows} - {None}), "name" if by == "name" else "number")


def _class_table(found: Tensor, wanted: Tensor, classes: ClassRows) -> _Adapted:
    """The class table that a model starts from."""
    value = found.to(device=wanted.device, dtype=wanted.dtype)
    if classes.by is None:
        return torch.cat([wanted[:-1], value[-1:]]), ParameterReport(_CLASSES, "initialised", classes.note())
    rows = [len(found) - 1 if row is None else row for row in classes.rows]
    same = rows == list(range(len(found) - 1))
    return value[[*rows, -1]], ParameterReport(_CLASSES, "loaded" if same else "resized", classes.note())


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
