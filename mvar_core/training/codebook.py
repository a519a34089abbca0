"""Keeping a codebook alive: a k-means start, restarts of codes that nothing uses, and counts of use."""

# Shape suffixes: N vectors, S scales, V codebook entries, Z latent channels, B batch, L tokens of all scales.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.pyramid import ScalePyramid
from mvar_core.runtime import generator

_VECTORS_PER_CODE = 256  # more do not move k-means' centres noticeably
_REFINEMENTS = 2  # rounds of k-means after the first one that has seen every scale


def kmeans_centres(vectors_NZ: Float[Tensor, "N Z"], count: int, seed: int) -> Float[Tensor, "V Z"]:
    """Centres of `count` clusters, V; where there are fewer distinct vectors, slightly moved copies fill up."""
    from sklearn.cluster import MiniBatchKMeans

    distinct_NZ = torch.unique(vectors_NZ, dim=0)
    if len(distinct_NZ) <= count:
        source = generator("k-means", seed)
        extra = torch.randint(len(distinct_NZ), (count - len(distinct_NZ),), generator=source)
        spread = 0.01 * vectors_NZ.std(unbiased=False).clamp_min(1e-4)
        noise_NZ = torch.randn(len(extra), vectors_NZ.shape[1], generator=source).to(vectors_NZ) * spread
        return torch.cat([distinct_NZ, distinct_NZ[extra.to(vectors_NZ.device)] + noise_NZ])
    clusters = MiniBatchKMeans(
        n_clusters=count, random_state=seed, n_init=1, batch_size=max(1024, 4 * count), max_iter=20
    )
    clusters.fit(vectors_NZ.cpu().double().numpy())
    return torch.from_numpy(clusters.cluster_centers_).to(vectors_NZ)


@torch.no_grad()
def start_codebook(quantizer: MultiScaleQuantizer, features: Float[Tensor, "B Z h w"], seed: int) -> None:
    """Set the codebook to k-means centres of what the scales have to quantize.

    What a scale quantizes is what the codes of the scales before it leave over, so the codebook grows with the scales:
    round s clusters the vectors of scales 1 … s. Scales weigh equally, or the few coarse vectors would get no codes.
    """
    codes, scales = quantizer.codebook.shape[0], quantizer.pyramid.num_scales
    for turn in range(scales + _REFINEMENTS):
        vectors = quantizer.residual_vectors(features)[: turn + 1]
        pooled_NZ = balanced_sample(vectors, _VECTORS_PER_CODE * codes, generator("k-means vectors", seed, turn))
        quantizer.codebook.copy_(kmeans_centres(pooled_NZ, codes, seed))


def balanced_sample(
    vectors: Sequence[Float[Tensor, "N Z"]], count: int, source: torch.Generator
) -> Float[Tensor, "N Z"]:
    """Up to `count` vectors, the same number from each scale as far as it has them."""
    share = max(1, count // len(vectors))
    chosen = []
    for vectors_NZ in vectors:
        order = torch.randperm(len(vectors_NZ), generator=source)[:share]
        chosen.append(vectors_NZ[order.to(vectors_NZ.device)])
    return torch.cat(chosen)


def count_codes(tokens_BL: Int[Tensor, "B L"], pyramid: ScalePyramid, codes: int) -> Int[Tensor, "S V"]:
    """How often each scale uses each code."""
    return torch.stack([torch.bincount(tokens_BL[:, span].flatten(), minlength=codes) for span in pyramid.spans])


def code_usage(counts_SV: Int[Tensor, "S V"]) -> dict[str, Any]:
    """Fraction of the codebook that each scale uses, the perplexity of its use, and the fraction in any use."""
    return {
        "usage_per_scale": tuple((counts_SV > 0).double().mean(dim=1).tolist()),
        "perplexity_per_scale": tuple(perplexity(counts_SV).tolist()),
        "code_usage": float((counts_SV.sum(dim=0) > 0).double().mean()),
    }


def perplexity(counts_SV: Tensor) -> Float[Tensor, " S"]:
    """Exponential of the entropy of each scale's use of codes: how many codes it uses as if evenly."""
    shares_SV = counts_SV.double() / counts_SV.sum(dim=1, keepdim=True).clamp_min(1)
    entropies_S: Tensor = torch.special.entr(shares_SV).sum(dim=1)
    return entropies_S.exp()


@torch.no_grad()
def revive_dead_codes(
    quantizer: MultiScaleQuantizer,
    features: Float[Tensor, "B Z h w"],
    counts_V: Int[Tensor, " V"],
    optimizer: torch.optim.Optimizer,
    source: torch.Generator,
) -> int:
    """Move codes that nothing used onto vectors of the current batch, and reset their optimizer state.

    `counts_V` counts uses since the last call; `source` chooses the vectors. Returns how many codes were moved.
    """
    dead = (counts_V == 0).nonzero().flatten()
    if len(dead) == 0:
        return 0
    vectors = quantizer.residual_vectors(features)
    pooled_NZ = balanced_sample(vectors, len(dead) * len(vectors), source)
    order = torch.randint(len(pooled_NZ), (len(dead),), generator=source)
    quantizer.codebook[dead] = pooled_NZ[order.to(pooled_NZ.device)]
    moments = optimizer.state.get(quantizer.codebook, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in moments:
            moments[name][dead] = 0
    return len(dead)
