"""Attention reports without a model."""

from __future__ import annotations

import torch

from mvar_core.analysis.attention import AttentionProbe
from mvar_core.config import ModelConfig


def report_of(patch_sizes, prefixes="all", windows=(), depth=2):
    """A report of random queries and keys."""
    last = patch_sizes[-1]
    config = ModelConfig.model_validate(
        {
            "image_size": [16 * side for side in (last if isinstance(last, tuple) else (last, last))],
            "patch_sizes": patch_sizes,
            "transformer": {"depth": depth, "embed_dim": 8, "num_heads": 2, "num_classes": 3},
            "attention": {"scale_prefixes": prefixes, "windows": windows},
        }
    )
    noise = torch.Generator().manual_seed(0)
    probe = AttentionProbe(config)
    for layer in range(depth):
        for scale, pattern in enumerate(config.patterns):
            q = torch.randn(1, 2, pattern.queries, 4, generator=noise)
            k = torch.randn(1, 2, pattern.keys, 4, generator=noise)
            probe(layer, scale, q, k, pattern, 1.0)
    return probe.report()
