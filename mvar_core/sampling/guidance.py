"""From logits to tokens: guidance, filters and the sampled codes, as pure functions."""

# Shape suffixes: B batch, l tokens of one scale, V codebook entries, Z latent channels.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.config import SamplingConfig
from mvar_core.errors import ConfigError
from mvar_core.models.linear import row_stable_linear
from mvar_core.pyramid import ScalePyramid


def guidance_strengths(settings: SamplingConfig, pyramid: ScalePyramid) -> tuple[float, ...]:
    """Guidance t of each scale: (1 + t)·conditional - t·unconditional.

    With the ratio r from 0 at the first scale to 1 at the last: linear (as published) is cfg·r, cosine is
    cfg·(1 - cos πr)/2, constant is cfg; a list says t itself. Scales outside `cfg_scales` are not guided. ConfigError
    for a list of another length than the pyramid, or scales that it does not have.
    """
    schedule, last = settings.cfg_schedule, pyramid.num_scales - 1
    ratios = [pyramid.ratio(scale) for scale in range(pyramid.num_scales)]
    if schedule == "linear":
        strengths = [settings.cfg * ratio for ratio in ratios]
    elif schedule == "cosine":
        strengths = [settings.cfg * (1 - math.cos(math.pi * ratio)) / 2 for ratio in ratios]
    elif schedule == "constant":
        strengths = [settings.cfg] * len(ratios)
    elif len(schedule) == len(ratios):
        strengths = [float(strength) for strength in schedule]
    else:
        raise ConfigError(
            f"cfg-schedule has {len(schedule)} numbers; the pyramid has {len(ratios)} scales ({pyramid}).",
            "Give one number per scale, or linear, constant or cosine.",
        )
    first_guided, last_guided = settings.cfg_scales or (0, last)
    if last_guided > last:
        raise ConfigError(f"cfg-scales ends at scale {last_guided}; the model has scales 0 … {last}.")
    return tuple(strength if first_guided <= scale <= last_guided else 0.0 for scale, strength in enumerate(strengths))


def unconditional_scales(strengths: Sequence[float], first_visible: Sequence[int]) -> tuple[bool, ...]:
    """At which scales the unconditional half must run: the guided ones, and those from `first_visible` on they see."""
    needed = [strength > 0 for strength in strengths]
    for scale in reversed(range(len(needed))):
        if needed[scale]:
            for seen in range(first_visible[scale], scale):
                needed[seen] = True
    return tuple(needed)


def guide(
    conditional_BlV: Float[Tensor, "B l V"], unconditional_BlV: Float[Tensor, "B l V"], strength: float
) -> Float[Tensor, "B l V"]:
    """Classifier-free guidance of strength t: (1 + t)·conditional - t·unconditional."""
    return (1 + strength) * conditional_BlV - strength * unconditional_BlV


def keep_top_k(logits_BlV: Float[Tensor, "B l V"], top_k: int) -> Float[Tensor, "B l V"]:
    """Set logits below the k-th largest to -∞; ties with it stay. 0 keeps all."""
    if top_k == 0 or top_k >= logits_BlV.shape[-1]:
        return logits_BlV
    smallest_kept = logits_BlV.topk(top_k, dim=-1).values[..., -1:]
    return logits_BlV.masked_fill(logits_BlV < smallest_kept, -torch.inf)


def keep_top_p(logits_BlV: Float[Tensor, "B l V"], top_p: float) -> Float[Tensor, "B l V"]:
    """Set to -∞ the least likely entries whose cumulative probability is at most 1 - p. 0 or 1 keeps all.

    Entries are sorted in ascending order; the most likely one always stays.
    """
    if top_p in (0, 1):
        return logits_BlV
    ascending, order = logits_BlV.sort(dim=-1, stable=True)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[..., -1] = False
    return logits_BlV.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(logits_BlV: Float[Tensor, "B l V"], min_p: float) -> Float[Tensor, "B l V"]:
    """Set to -∞ the entries that are less than `min_p` times as likely as the likeliest of their row. 0 keeps all."""
    if min_p == 0:
        return logits_BlV
    return logits_BlV.masked_fill(logits_BlV < _smallest_logit(logits_BlV, min_p), -torch.inf)


def keep_likely(logits_BlV: Float[Tensor, "B l V"], settings: SamplingConfig) -> Float[Tensor, "B l V"]:
    """All filters of the settings, in order: top-k, top-p, min-p."""
    return keep_min_p(keep_top_p(keep_top_k(logits_BlV, settings.top_k), settings.top_p), settings.min_p)


def sample_likely_codes(
    logits_BlV: Float[Tensor, "B l V"], uniforms_Bl: Float[Tensor, "B l"], settings: SamplingConfig
) -> Int[Tensor, "B l"]:
    """Sample from what `keep_likely` keeps, without sorting the vocabulary; codes that are tied with the k-th stay.

    The k most likely codes come in descending order, so that their running sums tell both where top-p ends and which
    code is sampled. Sums are float64 where the device has it. Without top-k and top-p the codes stay in the codebook's
    order.
    """
    top_k, nucleus, min_p = settings.top_k, 0 < settings.top_p < 1, settings.min_p
    limited = 0 < top_k < logits_BlV.shape[-1]
    if not limited and not nucleus:
        return sample_codes(logits_BlV, uniforms_Bl, min_p)
    # One more than k tells whether the k-th is tied with a code that would be left out.
    descending, order = logits_BlV.topk(top_k + 1, dim=-1) if limited else logits_BlV.sort(dim=-1, descending=True)
    kept_Blk = descending[..., :-1] if limited else descending
    ranks_Bl = _sample_ranks(kept_Blk, uniforms_Bl, settings.top_p if nucleus else 1.0, min_p)
    tokens_Bl = order.gather(-1, ranks_Bl.unsqueeze(-1)).squeeze(-1)
    if limited and (tied_Bl := descending[..., -2] == descending[..., -1]).any():
        rows_1nV = keep_top_k(logits_BlV[tied_Bl].unsqueeze(0), top_k)
        unlimited = settings.model_copy(update={"top_k": 0})
        tokens_Bl[tied_Bl] = sample_likely_codes(rows_1nV, uniforms_Bl[tied_Bl].unsqueeze(0), unlimited)[0]
    return tokens_Bl


def _sample_ranks(descending_Blk: Tensor, uniforms_Bl: Tensor, top_p: float, min_p: float) -> Tensor:
    """Ranks of the chosen codes among some in descending order, cut off by `top_p` and then by `min_p`."""
    cumulative_Blk = _exact(descending_Blk).softmax(dim=-1).cumsum(dim=-1)
    total_Bl1 = cumulative_Blk[..., -1:]
    if top_p < 1:
        last_Bl1 = torch.searchsorted(cumulative_Blk, top_p * total_Bl1)
        total_Bl1 = cumulative_Blk.gather(-1, last_Bl1)
    if min_p > 0:
        kept_Bl1 = (descending_Blk >= _smallest_logit(descending_Blk, min_p)).sum(dim=-1, keepdim=True)
        total_Bl1 = torch.minimum(total_Bl1, cumulative_Blk.gather(-1, kept_Bl1 - 1))
    return _invert(cumulative_Blk, uniforms_Bl, total_Bl1)


def sample_codes(
    logits_BlV: Float[Tensor, "B l V"], uniforms_Bl: Float[Tensor, "B l"], min_p: float = 0
) -> Int[Tensor, "B l"]:
    """One token per row by the inverse of the cumulative distribution, in the codebook's order.

    Codes with logits of -∞ are never chosen. `uniforms_Bl` holds one number in [0, 1) per token, from the sample's own
    stream. `min_p` acts as if `keep_min_p` had filtered, without a copy of the logits.
    """
    probabilities_BlV = _exact(logits_BlV).softmax(dim=-1)
    if min_p > 0:
        probabilities_BlV.masked_fill_(logits_BlV < _smallest_logit(logits_BlV, min_p), 0)
    cumulative_BlV = probabilities_BlV.cumsum(dim=-1)
    return _invert(cumulative_BlV, uniforms_Bl, cumulative_BlV[..., -1:])


def _smallest_logit(logits_BlV: Tensor, min_p: float) -> Tensor:
    """Per row the logit of a code that is `min_p` > 0 times as likely as the likeliest."""
    return logits_BlV.amax(dim=-1, keepdim=True) + math.log(min_p)


def _exact(values: Tensor) -> Tensor:
    """Values in float64, which every device but Apple's has."""
    return values.float() if values.device.type == "mps" else values.double()


def _invert(cumulative_Blk: Tensor, uniforms_Bl: Tensor, total_Bl1: Tensor) -> Tensor:
    """The first entries whose cumulative sums pass uniforms · total."""
    # Strictly below the total, so that rounding can never point past the last entry of positive probability.
    below_total = torch.nextafter(total_Bl1, torch.zeros_like(total_Bl1))
    targets_Bl1 = torch.minimum(uniforms_Bl.unsqueeze(-1).to(total_Bl1) * total_Bl1, below_total)
    return torch.searchsorted(cumulative_Blk, targets_Bl1, right=True).squeeze(-1)


def soft_embeddings(
    logits_BlV: Float[Tensor, "B l V"],
    uniforms_BlV: Float[Tensor, "B l V"],
    codebook_VZ: Float[Tensor, "V Z"],
    ratio: float,
) -> Float[Tensor, "B l Z"]:
    """VAR's "more smooth": a Gumbel-softmax mixture of codebook entries, for looks only, never for metrics.

    With the ratio from 0 at the first scale to 1 at the last, the filtered logits are multiplied by 1 + ratio, and the
    temperature is max(0.27·(1 - 0.95·ratio), 0.005). `uniforms_BlV` holds one number in [0, 1) per logit, from the
    sample's own stream.
    """
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    smallest = torch.finfo(torch.float64).tiny
    gumbels = -(-_exact(uniforms_BlV).clamp(min=smallest).log()).clamp(min=smallest).log()
    weights = ((logits_BlV.double() * (1 + ratio) + gumbels) / temperature).softmax(dim=-1)
    return row_stable_linear(weights.to(codebook_VZ), codebook_VZ.T, None)
