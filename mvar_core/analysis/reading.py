"""What attention figures say in plain words, beside what the papers say.

MVAR's observation on VAR: attention falls on the adjacent scale and on spatial neighbours. The inputs of a scale's
tokens are made from the scale before, so attention to the own scale is attention to what the paper calls the adjacent
scale; to it is added attention to the tokens of the scale before themselves. All figures stand beside those of an even
spread over everything that a token sees: a large part of a large scale alone would say nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from mvar_core.analysis.locality_report import LocalityReport
from mvar_core.analysis.recommendation import part_of

Verdict = Literal["shown", "not shown", "by construction"]

HALF = 0.5
"""What dominates holds more than this part …"""
LEFT_OVER = 0.75
"""… and leaves at most this part of what an even spread would leave to everything else."""
NO_CHOICE = 0.995
"""An even spread of more than this leaves a model no choice."""


@dataclass(frozen=True)
class Reading:
    """The two observations as figures, the means over the tokens of all scales but the first, and in words.

    Attributes:
        own: Attention to the own scale.
        previous: Attention to the scale before.
        adjacent: Both.
        even_adjacent: What an even spread would give them.
        adjacent_verdict: Whether the adjacent scale dominates.
        window: The k of the neighbourhood.
        neighbours: Attention within k×k of the own scale, as a part of the attention to the own scale; of the scales
            alone that are larger than that.
        even_neighbours: What an even spread would give it.
        neighbours_verdict: Whether neighbours dominate.
        projected: Attention within k×k around the matching position in all scales that are seen.
        even_projected: What an even spread would give it.
        sentences: The same in words.
    """

    own: float
    previous: float
    adjacent: float
    even_adjacent: float
    adjacent_verdict: Verdict
    window: int
    neighbours: float
    even_neighbours: float
    neighbours_verdict: Verdict
    projected: float
    even_projected: float
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The reading as a mapping of plain values."""
        return {**asdict(self), "sentences": list(self.sentences)}


def read_attention(report: LocalityReport) -> Reading:
    """What the figures say of the papers' two observations."""
    scales = len(report.patch_sizes)
    counted = range(1, scales) if scales > 1 else range(scales)
    tokens = np.array([report.pyramid.grids[scale].tokens for scale in counted], dtype=np.float64)

    def mean(values: np.ndarray) -> float:
        return float(values[list(counted)] @ tokens / tokens.sum())

    def own_and_previous(mass_SS: np.ndarray) -> tuple[float, float]:
        before = np.array([0.0, *np.diagonal(mass_SS, offset=-1)])
        return mean(np.diagonal(mass_SS)), mean(before)

    own, previous = own_and_previous(report.scale_mass)
    even_adjacent = sum(own_and_previous(report.even_scale_mass))
    window = neighbourhood(report)
    inside, even_inside = report.window_mass_by_scale[window], report.even_window_mass[window]
    neighbours, even_neighbours = (
        _inside_own(report, within_SS, mass_SS, window)
        for within_SS, mass_SS in ((inside, report.scale_mass), (even_inside, report.even_scale_mass))
    )
    adjacent_verdict = _verdict(own + previous, even_adjacent)
    last_window = report.model_windows[-1]
    neighbours_verdict = _verdict(neighbours, even_neighbours)
    if last_window and last_window <= window:
        neighbours_verdict = "by construction"
    projected, even_projected = mean(inside.sum(axis=1)), mean(even_inside.sum(axis=1))
    sentences = (
        _adjacent_sentence(own, previous, even_adjacent, adjacent_verdict),
        _neighbours_sentence(window, neighbours, even_neighbours, neighbours_verdict),
        f"Counting every scale that a token sees, {_percent(projected)} falls within {window}×{window} of the place"
        f" that matches its own; an even spread would put {_percent(even_projected)} there.",
        _layers_sentence(report),
    )
    return Reading(
        own=own,
        previous=previous,
        adjacent=own + previous,
        even_adjacent=even_adjacent,
        adjacent_verdict=adjacent_verdict,
        window=window,
        neighbours=neighbours,
        even_neighbours=even_neighbours,
        neighbours_verdict=neighbours_verdict,
        projected=projected,
        even_projected=even_projected,
        sentences=tuple(sentence for sentence in sentences if sentence),
    )


def neighbourhood(report: LocalityReport) -> int:
    """The k whose window is called the neighbourhood: the paper's 7, or 3 where 7×7 is half of the last scale."""
    last = report.pyramid.latent_grid
    return 7 if min(7, last.height) * min(7, last.width) <= last.tokens / 2 else 3


def _inside_own(report: LocalityReport, inside_SS: np.ndarray, mass_SS: np.ndarray, window: int) -> float:
    """The part of own-scale attention within a window, over the tokens of all scales that are larger than it."""
    grids = report.pyramid.grids
    larger = [scale for scale, grid in enumerate(grids) if max(grid) > window] or [len(grids) - 1]
    tokens = np.array([grids[scale].tokens for scale in larger], dtype=np.float64)
    parts = part_of(np.diagonal(inside_SS), np.diagonal(mass_SS))[larger]
    return float(parts @ tokens / tokens.sum())


def _verdict(part: float, even: float) -> Verdict:
    if even > NO_CHOICE:
        return "by construction"
    return "shown" if part > HALF and 1 - part <= LEFT_OVER * (1 - even) else "not shown"


def _adjacent_sentence(own: float, previous: float, even: float, verdict: Verdict) -> str:
    figures = (
        f"{_percent(own)} of the attention falls on the own scale and {_percent(previous)} on the scale before,"
        f" {_percent(own + previous)} together; an even spread would put {_percent(even)} there."
    )
    if verdict == "by construction":
        return f"{figures} The model sees hardly anything else, so this says nothing of what the paper saw."
    if verdict == "shown":
        return f"{figures} This is what the paper says: the adjacent scale dominates."
    return f"{figures} {_why_not(own + previous, even, 'the adjacent scale does not dominate')}"


def _neighbours_sentence(window: int, part: float, even: float, verdict: Verdict) -> str:
    figures = (
        f"On scales larger than {window}×{window}, {_percent(part)} of the attention to the own scale falls within"
        f" {window}×{window} of the token; an even spread would put {_percent(even)} there."
    )
    if verdict == "by construction":
        return f"{figures} The model's own windows leave it little choice, so this says nothing of what the paper saw."
    if verdict == "shown":
        return f"{figures} This is what the paper says: spatial neighbours dominate."
    return f"{figures} {_why_not(part, even, 'neighbours do not dominate')}"


def _why_not(part: float, even: float, claim: str) -> str:
    if part > HALF:
        return f"More than half, but hardly more than an even spread: here {claim}, unlike what the paper says."
    more = f" although it is {part / even:.1f} times an even spread" if part >= 1.1 * even else ""
    return f"That is not most of it{more}: here {claim}, unlike what the paper says."


def _layers_sentence(report: LocalityReport) -> str:
    """How far layers differ in their attention to the own scale, at the last scale."""
    own_N = report.scale_mass_by_head[:, :, -1, -1].mean(axis=1)
    if len(own_N) < 2 or report.even_scale_mass[-1, -1] > NO_CHOICE:
        return ""
    low, high = int(own_N.argmin()), int(own_N.argmax())
    return (
        f"Layers differ: at the last scale layer {low + 1} gives the own scale {_percent(own_N[low])}, layer"
        f" {high + 1} {_percent(own_N[high])}."
    )


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if 0.095 <= part < 0.995 or part in (0, 1) else f"{100 * part:.1f} %"
