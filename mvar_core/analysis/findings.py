"""What attention statistics say, in numbers and in words, compared with what the papers say.

MVAR's observation on VAR: attention falls on the adjacent scale and on spatial neighbours. The inputs of a scale's
tokens are made from the scale before, so attention to a token's own scale is attention to what the paper calls the
adjacent scale; attention to the tokens of the scale before is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mvar_core.analysis.attention import AttentionReport
from mvar_core.analysis.recommendation import share_of

Verdict = Literal["shown", "not shown", "by construction"]

HALF = 0.5
"""What dominates holds more than this fraction …"""
LEFT_OVER = 0.75
"""… and leaves at most this fraction of what an even spread would leave to everything else."""
NO_CHOICE = 0.995
"""Where an even spread puts more than this, the model has no choice."""


@dataclass(frozen=True)
class Findings:
    """The two observations: means over the tokens of all scales but the first, verdicts, and sentences.

    Attributes:
        own: Attention to the token's own scale.
        previous: Attention to the scale before.
        adjacent: Both.
        even_adjacent: What an even spread would give them.
        adjacent_verdict: Whether the adjacent scale dominates.
        window: The k of the neighbourhood.
        neighbours: The fraction of own-scale attention within k×k, over the scales that are larger than that.
        even_neighbours: The same for an even spread.
        neighbours_verdict: Whether neighbours dominate.
        projected: Attention within k×k around the matching position in all scales that are seen.
        even_projected: The same for an even spread.
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


def find(report: AttentionReport) -> Findings:
    """What a report says about the papers' two observations."""
    scales = len(report.patch_sizes)
    counted = list(range(1, scales)) or [0]
    tokens = np.array([report.pyramid.grids[scale].tokens for scale in counted], dtype=np.float64)

    def mean(values: np.ndarray) -> float:
        return float(values[counted] @ tokens / tokens.sum())

    def own_and_previous(mass_SS: np.ndarray) -> tuple[float, float]:
        before = np.array([0.0, *np.diagonal(mass_SS, offset=-1)])
        return mean(np.diagonal(mass_SS)), mean(before)

    own, previous = own_and_previous(report.scale_mass)
    even_adjacent = sum(own_and_previous(report.even_scale_mass))
    adjacent_verdict = _verdict(own + previous, even_adjacent)

    window = neighbourhood(report)
    inside, even_inside = report.window_mass_by_scale[window], report.even_window_mass[window]
    neighbours = _inside_own(report, inside, report.scale_mass, window)
    even_neighbours = _inside_own(report, even_inside, report.even_scale_mass, window)
    constrained = 0 < report.model_windows[-1] <= window
    neighbours_verdict = "by construction" if constrained else _verdict(neighbours, even_neighbours)

    projected, even_projected = mean(inside.sum(axis=1)), mean(even_inside.sum(axis=1))
    sentences = (
        f"{_percent(own)} of the attention falls on the token's own scale and {_percent(previous)} on the scale before,"
        f" {_percent(own + previous)} together; an even spread would put {_percent(even_adjacent)} there."
        f" {_compared(adjacent_verdict, own + previous, even_adjacent, 'the adjacent scale', False)}",
        f"On scales larger than {window}×{window}, {_percent(neighbours)} of the attention to the own scale falls"
        f" within {window}×{window} of the token; an even spread would put {_percent(even_neighbours)} there."
        f" {_compared(neighbours_verdict, neighbours, even_neighbours, 'spatial neighbours', True)}",
        f"Over all scales that a token sees, {_percent(projected)} falls within {window}×{window} of its matching"
        f" position; an even spread would put {_percent(even_projected)} there.",
        _layers_sentence(report),
    )
    return Findings(
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


def neighbourhood(report: AttentionReport) -> int:
    """The k whose window is called the neighbourhood: the paper's 7, or 3 where 7×7 is half of the last scale."""
    last = report.pyramid.latent_grid
    return 7 if min(7, last.height) * min(7, last.width) <= last.tokens / 2 else 3


def _inside_own(report: AttentionReport, inside_SS: np.ndarray, mass_SS: np.ndarray, window: int) -> float:
    """The fraction of own-scale attention within a window, over the tokens of all scales that are larger than it."""
    grids = report.pyramid.grids
    larger = [scale for scale, grid in enumerate(grids) if max(grid) > window] or [len(grids) - 1]
    tokens = np.array([grids[scale].tokens for scale in larger], dtype=np.float64)
    shares = share_of(np.diagonal(inside_SS), np.diagonal(mass_SS))[larger]
    return float(shares @ tokens / tokens.sum())


def _verdict(share: float, even: float) -> Verdict:
    if even > NO_CHOICE:
        return "by construction"
    return "shown" if share > HALF and 1 - share <= LEFT_OVER * (1 - even) else "not shown"


def _compared(verdict: Verdict, share: float, even: float, what: str, plural: bool) -> str:
    """A verdict in words."""
    if verdict == "by construction":
        return "The model sees hardly anything else, so this neither supports nor contradicts the paper."
    if verdict == "shown":
        return f"This agrees with the paper: {what} {'dominate' if plural else 'dominates'}."
    do_not = "do not" if plural else "does not"
    if share > HALF:
        return f"This is hardly more than an even spread: unlike in the paper, {what} {do_not} dominate."
    more = f", although it is {share / even:.1f} times an even spread" if share >= 1.1 * even else ""
    return f"This is less than half{more}: unlike in the paper, {what} {do_not} dominate."


def _layers_sentence(report: AttentionReport) -> str:
    """How much layers differ in their attention to their own scale, at the last scale."""
    own_N = report.scale_mass_by_head[:, :, -1, -1].mean(axis=1)
    if len(own_N) < 2 or report.even_scale_mass[-1, -1] > NO_CHOICE:
        return ""
    low, high = int(own_N.argmin()), int(own_N.argmax())
    return (
        f"Layers differ: at the last scale, layer {low + 1} gives {_percent(own_N[low])} of its attention to its own"
        f" scale, layer {high + 1} {_percent(own_N[high])}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.095 <= share < 0.995 or share in (0, 1) else f"{100 * share:.1f} %"
