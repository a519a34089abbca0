"""From attention statistics to settings: which prefixes and windows keep most attention, and what they save."""

# Shape suffixes: S scales, W windows.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from mvar_core.analysis.cost import cost_of
from mvar_core.config import AttentionConfig, Machine, ModelConfig
from mvar_core.errors import DataError
from mvar_core.pyramid import Grid, ScalePrefixes

WINDOWS = (1, 3, 5, 7, 9, 11, 13, 15)
"""Sides k of the windows whose mass is measured."""

TOLERANCE = 1e-9
"""Sums of probabilities miss 1 by rounding."""

SAVINGS_BATCH = 8
"""Images sampled together, for the savings in bytes."""


@dataclass(frozen=True)
class Recommendation:
    """The smallest settings that together keep a requested fraction of the attention.

    `kept`, the mean over all tokens, and `kept_by_scale` are within prefixes and windows; `kept_by_prefixes` within the
    prefixes alone; `kept_by_windows` is the fraction of a scale's own mass within its window. `own_windows` are, for
    each scale by itself, the smallest that keep the fraction of the mass in it, 0 where only the whole scale does.
    """

    scale_prefixes: ScalePrefixes
    windows: tuple[int, ...]
    keep: float
    kept: float
    kept_by_scale: tuple[float, ...]
    kept_by_prefixes: tuple[float, ...]
    kept_by_windows: tuple[float, ...]
    own_windows: tuple[int, ...]


def check_keep(keep: float) -> None:
    """Raise DataError for what is not a fraction of the attention."""
    if not 0 < keep <= 1:
        raise DataError(f"keep is {keep}; expected a fraction of the attention, above 0 and at most 1.", "Use 0.95.")


def recommend(
    scale_mass_SS: Float64[np.ndarray, "S S"],
    window_mass_SW: Float64[np.ndarray, "S W"],
    grids: Sequence[Grid],
    keep: float,
    model_windows: Sequence[int] = (),
) -> Recommendation:
    """The smallest prefixes, and then the smallest windows, that keep a fraction of the attention.

    What is kept is the mean over all tokens of an image. First come the fewest prefixes that keep the fraction with
    every scale whole. Then each scale gets the smallest window that holds a share of its own mass: one share for all,
    the least with which prefixes and windows together keep enough. A scale that would need a window as large as itself,
    or larger than was measured, stays as the model has it: `model_windows`, by default whole.

    Mass is by query scale and key scale, and in the query's own scale by query scale and window of WINDOWS.
    """
    check_keep(keep)
    scales = len(grids)
    whole = tuple(model_windows) or (0,) * scales
    tokens_S = np.array([grid.tokens for grid in grids], dtype=np.float64)
    weights_S = tokens_S / tokens_S.sum()
    own_S = np.diagonal(scale_mass_SS)
    share_SW = share_of(window_mass_SW, own_S[:, None])

    def smallest_windows(wanted: float) -> tuple[tuple[int, ...], np.ndarray]:
        """Each scale's smallest window that holds the requested share of its own mass, and what it holds."""
        windows, shares = [], []
        for scale, grid in enumerate(grids):
            fits = [i for i, k in enumerate(WINDOWS) if k < max(grid) and share_SW[scale, i] >= wanted]
            windows.append(WINDOWS[fits[0]] if fits else whole[scale])
            shares.append(share_SW[scale, fits[0]] if fits else 1.0)
        return tuple(windows), np.array(shares)

    visible_S = np.ones(scales)
    prefixes: ScalePrefixes = 1 if scales == 1 else "all"
    for count in range(1, scales):
        seen_S = np.array([scale_mass_SS[s, max(0, s - count + 1) : s + 1].sum() for s in range(scales)])
        if seen_S @ weights_S >= keep - TOLERANCE:
            prefixes, visible_S = count, seen_S
            break
    for wanted in [*np.unique(share_SW), 2.0]:  # 2: no window holds that much, every scale stays whole
        windows, shares_S = smallest_windows(wanted)
        kept_S = visible_S - own_S * (1 - shares_S)
        if kept_S @ weights_S >= keep - TOLERANCE:
            break
    return Recommendation(
        scale_prefixes=prefixes,
        windows=windows,
        keep=keep,
        kept=float(kept_S @ weights_S),
        kept_by_scale=tuple(map(float, kept_S)),
        kept_by_prefixes=tuple(map(float, visible_S)),
        kept_by_windows=tuple(map(float, shares_S)),
        own_windows=smallest_windows(keep - TOLERANCE)[0],
    )


def share_of(mass: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`mass` as a fraction of `whole`, 1 where there is nothing to share."""
    whole = np.broadcast_to(whole, mass.shape)
    share: np.ndarray = np.divide(mass, whole, out=np.ones_like(mass), where=whole > 0)
    return share


def recommended_config(config: ModelConfig, best: Recommendation) -> ModelConfig:
    """The model with the recommended attention and everything else as it is."""
    attention = AttentionConfig(scale_prefixes=best.scale_prefixes, windows=best.windows)
    return config.model_copy(update={"attention": attention})


def savings(config: ModelConfig, best: Recommendation, *, dtype_bytes: int = 4, device: str = "cpu") -> dict[str, Any]:
    """What `mvar plan` predicts for the model as it is and for the recommended one, sampling with guidance.

    Returns:
        `attention_gmacs` (one image), `kv_cache_bytes` and `sample_peak_bytes` (`batch_size` images), each with the
        value of the `model`, of the `recommended` one, and as `part` their ratio (None where the first is 0).
    """
    machine = Machine(device=device, dtype="bfloat16" if dtype_bytes == 2 else "float32")
    both = [cost_of(each, machine, batch_size=SAVINGS_BATCH) for each in (config, recommended_config(config, best))]
    values: dict[str, Any] = {"batch_size": SAVINGS_BATCH, "dtype_bytes": dtype_bytes, "device": device}
    for name in ("attention_gmacs", "kv_cache_bytes", "sample_peak_bytes"):
        before, after = (getattr(each, name) for each in both)
        values[name] = {"model": before, "recommended": after, "part": after / before if before else None}
    return values


def preset_values(config: ModelConfig, best: Recommendation, run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A complete preset of the recommended model; data, training and seed are as in a `run`'s config.yaml."""
    model = recommended_config(config, best).model_dump(mode="json", exclude={"provenance", "name"}, exclude_none=True)
    return {
        "description": f"{config.name} with settings that keep {best.kept:.4g} of its attention.",
        "source": f"mvar analyze-attention of {config.name}, keep {best.keep:g}",
        **model,
        **{key: run[key] for key in ("seed", "data", "train", "train_tokenizer") if run and key in run},
    }
