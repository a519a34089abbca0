"""Vectors that models may be conditioned on, as text encoders return them."""

# Shape suffixes: B texts or images, T positions of a sequence, X values of a vector.

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mvar_core.errors import DataError


def pool_sequence(
    sequence_BTX: Float[Tensor, "B T X"],
    mask_BT: Bool[Tensor, "B T"] | Int[Tensor, "B T"] | Float[Tensor, "B T"] | None = None,
    *,
    normalise: bool = True,
) -> Float[Tensor, "B X"]:
    """One vector for each sequence: the mean over the positions that the mask keeps.

    What a text encoder returns (T5's or CLIP's `last_hidden_state` with the tokenizer's `attention_mask`) becomes what
    a model is conditioned on, in float32: scaled to length 1 (`normalise`), as embeddings of class tables have at the
    start of training. The mask is True or 1 where a position counts; others may hold anything, nan included. DataError
    for a sequence of which nothing is kept.
    """
    sequence_BTX = sequence_BTX.float()
    if mask_BT is None:
        mask_BT = torch.ones(sequence_BTX.shape[:2], device=sequence_BTX.device)
    kept_BT1 = (mask_BT != 0).unsqueeze(2)
    counts_B1 = kept_BT1.sum(dim=1)
    if (counts_B1 == 0).any():
        raise DataError(f"Sequence {int(counts_B1.flatten().argmin())} has no position that its mask keeps.")
    mean_BX = torch.where(kept_BT1, sequence_BTX, 0).sum(dim=1) / counts_B1
    return F.normalize(mean_BX, dim=1) if normalise else mean_BX
