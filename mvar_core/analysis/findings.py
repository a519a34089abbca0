"""What attention statistics say, in numbers and in words, compared with what the papers say.

MVAR's observation on VAR: attention falls on the adjacent scale and on spatial neighbours. The inputs of a scale's
tokens are made from the scale before, so attention to a token's own scale is attention to what the paper calls the
adjacent scale; attention to the tokens of the scale before is added to it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mvar_core.analysis.attention import AttentionReport, AttentionStatistics

Verdict = Literal["shown", "not shown", "by construction"]

HALF = 0.5
"""What dominates holds more than this fraction …"""
LEFT_OVER = 0.75
"""… and leaves at most this fraction of what an even spread would leave to everything else."""
NO_CHOICE = 0.995
"""Where an even spread puts more than this, the model has no choice."""


def find(report: AttentionReport) -> dict[str, Any]:
    """What a report says about the papers' two observations: means over the tokens of all scales but the first.

    Returns:
        Attention to the token's `own` scale, to the `previous` one, and to both (`adjacent`); `neighbours`, the
        fraction of own-scale attention within a window of k×k (`window` is k) over the scales that are larger;
        `projected`, attention within k×k around the matching position in all scales that are seen. Keys that start
        with `even_` hold the same of an even spread, `adjacent_verdict` and `neighbours_verdict` whether these
        dominate, `sentences` all of it in words.
    """
    window, grids = neighbourhood(report), report.pyramid.grids
    later = list(range(1, len(grids))) or [0]
    larger = [scale for scale, grid in enumerate(grids) if max(grid) > window] or [len(grids) - 1]

    def mean(values_S: np.ndarray, scales: list[int]) -> float:
        """Of some scales, each token counted alike."""
        tokens = np.array([grids[scale].tokens for scale in scales], dtype=np.float64)
        return float(values_S[scales] @ tokens / tokens.sum())

    def measures(of: AttentionStatistics) -> dict[str, float]:
        own = mean(np.diagonal(of.scale_mass), later)
        previous = mean(np.array([0.0, *np.diagonal(of.scale_mass, offset=-1)]), later)
        return {
            "own": own,
            "previous": previous,
            "adjacent": own + previous,
            "neighbours": mean(of.window_share[window], larger),
            "projected": mean(of.window_mass_by_scale[window].sum(axis=1), later),
        }

    found, even = measures(report), measures(report.even)
    adjacent = _verdict(found["adjacent"], even["adjacent"])
    constrained = 0 < report.model_windows[-1] <= window
    neighbours = "by construction" if constrained else _verdict(found["neighbours"], even["neighbours"])
    said = {name: _percent(share) for name, share in found.items()}
    near, spread = f"within {window}×{window}", "an even spread would put {} there".format
    sentences = (
        f"{said['own']} of the attention falls on the token's own scale and {said['previous']} on the scale before,"
        f" {said['adjacent']} together; {spread(_percent(even['adjacent']))}."
        f" {_compared(adjacent, found['adjacent'], even['adjacent'], 'the adjacent scale', False)}",
        f"On scales larger than {window}×{window}, {said['neighbours']} of the attention to the own scale falls {near}"
        f" of the token; {spread(_percent(even['neighbours']))}."
        f" {_compared(neighbours, found['neighbours'], even['neighbours'], 'spatial neighbours', True)}",
        f"Over all scales that a token sees, {said['projected']} falls {near} of its matching position;"
        f" {spread(_percent(even['projected']))}.",
        _layers_sentence(report),
    )
    return {
        **found,
        **{f"even_{name}": share for name, share in even.items()},
        "adjacent_verdict": adjacent,
        "neighbours_verdict": neighbours,
        "window": window,
        "sentences": tuple(filter(None, sentences)),
    }


def neighbourhood(report: AttentionReport) -> int:
    """The k whose window is called the neighbourhood: the paper's 7, or 3 where 7×7 is half of the last scale."""
    last = report.pyramid.latent_grid
    return 7 if min(7, last.height) * min(7, last.width) <= last.tokens / 2 else 3


def _verdict(share: float, even: float) -> Verdict:
    if even > NO_CHOICE:
        return "by construction"
    return "shown" if share > HALF and 1 - share <= LEFT_OVER * (1 - even) else "not shown"


def _compared(verdict: Verdict, share: float, even: float, what: str, plural: bool) -> str:
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
    if len(own_N) < 2 or report.even.scale_mass[-1, -1] > NO_CHOICE:
        return ""
    low, high = int(own_N.argmin()), int(own_N.argmax())
    return (
        f"Layers differ: at the last scale, layer {low + 1} gives {_percent(own_N[low])} of its attention to its own"
        f" scale, layer {high + 1} {_percent(own_N[high])}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.095 <= share < 0.995 or share in (0, 1) else f"{100 * share:.1f} %"
