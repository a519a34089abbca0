"""Predicted peak memory of a training step of all scales, by formula; no torch.

A step holds weights, AdamW's two moments, and at its widest either what the forward pass kept for the backward pass, or
the gradients with what is left of it: the backward pass frees one while it makes the other. The formulas follow what
the blocks keep, tensor by tensor. Letters: C width, F hidden width of the MLP, V codebook entries, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from mvar_core.analysis.counts import block_parameters, head_parameters, transformer_parameters
from mvar_core.config import ModelConfig, TransformerConfig
from mvar_core.config.training import TrainConfig
from mvar_core.models.footprint import FLOAT32, INT64, PADDED_ROWS

IMAGE_BY_IMAGE = 1 << 16
"""Numbers per image in the stream from which blocks on a CPU train image by image, which keeps less."""


@dataclass(frozen=True)
class KeptBytes:
    """What the forward pass of some images keeps for the backward pass.

    Attributes:
        block: Of one block.
        inputs: What is given to the model.
        stream: The stream that enters a block.
        head: The head's norm.
        logits: Of the loss: log-probabilities, and two gradients of their size.
        copies: Weights of one block in the compute dtype, where that is not float32.
        transient: What a block's backward pass makes at its widest.
    """

    block: int
    inputs: int
    stream: int
    head: int
    logits: int
    copies: int
    transient: int


def train_peak_bytes(config: ModelConfig, train: TrainConfig, dtype_bytes: int, device: str = "cpu") -> int:
    """Most memory allocated at once in a training step on one device.

    Args:
        config: The model.
        train: Batch size, micro-batches, averaged weights, activation checkpointing.
        dtype_bytes: Bytes per value of the compute dtype; weights, gradients and moments are float32.
        device: cpu, cuda or mps.
    """
    sizes = config.transformer
    if sizes is None:
        return 0
    parameters = transformer_parameters(config)
    rows = train.micro_batch or -(-train.batch_size // train.accumulate)
    rows = min(rows, train.batch_size)
    kept = kept_bytes(config, sizes, rows, dtype_bytes, device)
    # Weights, two moments, and averaged weights where they are asked for.
    states = parameters * FLOAT32 * (3 + (train.ema > 0))
    # Gradients of the micro-batches before this one.
    if rows < train.batch_size:
        states += parameters * FLOAT32
    return states + max(
        parameters * FLOAT32, *(_moment(config, sizes, kept, train, rows, done) for done in range(sizes.depth + 1))
    )


def _moment(
    config: ModelConfig, sizes: TransformerConfig, kept: KeptBytes, train: TrainConfig, rows: int, done: int
) -> int:
    """Bytes beside the states when the backward pass has `done` blocks behind it."""
    left = sizes.depth - done
    if train.activation_checkpointing:
        # Each block's input, and one block computed again for its gradient.
        blocks = min(left, 1) if done else 0
        streams = left
    else:
        blocks, streams = left, 1
    activations = kept.inputs + streams * kept.stream + blocks * (kept.block + kept.copies)
    if done == 0:
        return activations + kept.head + kept.logits
    gradients = 0
    if rows == train.batch_size:
        gradients = FLOAT32 * (head_parameters(config) + done * block_parameters(sizes))
    return activations + gradients + kept.transient


def kept_bytes(
    config: ModelConfig, sizes: TransformerConfig, rows: int, dtype_bytes: int, device: str = "cpu"
) -> KeptBytes:
    """What the forward pass of `rows` images keeps.

    Args:
        config: The model.
        sizes: Its transformer.
        rows: Images.
        dtype_bytes: Bytes per value of the compute dtype.
        device: cpu, cuda or mps.
    """
    width, hidden, length = sizes.embed_dim, sizes.hidden_dim, config.pyramid.num_tokens
    half = dtype_bytes < FLOAT32
    thrifty = device == "cpu" and length * width >= IMAGE_BY_IMAGE
    hidden_layer = 2 * hidden * dtype_bytes  # before and after GELU
    if thrifty:
        # Norms, q k v, q and k normalised, attention, both branches; the stream twice in float32; lengths of q and k.
        per_token = 10 * width * dtype_bytes + 2 * width * FLOAT32
        if sizes.l2_attention:
            per_token += 2 * sizes.num_heads * FLOAT32
        else:
            per_token -= 2 * width * dtype_bytes
        # Below so many numbers SDPA computes a scale, and keeps its output apart.
        small = sum(grid.tokens for grid in config.pyramid if rows * grid.tokens * width < IMAGE_BY_IMAGE)
        apart = rows * small * width * dtype_bytes
    else:
        # Both norms, as they are and modulated (and then cast), and the stream twice.
        per_token = width * ((4 * FLOAT32 + 2 * dtype_bytes) if half else 6 * FLOAT32)
        # q k v, attention scale by scale and joined, both branches.
        per_token += 7 * width * dtype_bytes
        if sizes.l2_attention:
            # q and k in float32, q's direction, and what attention reads; in float32 the directions and q.
            per_token += width * (3 * FLOAT32 + 2 * dtype_bytes if half else 3 * FLOAT32)
        apart = 0
    # AdaLN vectors of the block, and what norms make of them.
    modulation = max(rows, PADDED_ROWS) * 6 * width * dtype_bytes + rows * 4 * width * FLOAT32
    tokens = rows * length
    block = tokens * (per_token + hidden_layer) + apart + modulation
    return KeptBytes(
        block=block,
        inputs=tokens * (config.tokenizer.latent_channels * FLOAT32 + INT64),
        stream=tokens * width * FLOAT32,
        head=tokens * width * FLOAT32 * (1 if thrifty else 2),
        logits=3 * tokens * config.tokenizer.codebook_size * FLOAT32,
        copies=block_parameters(sizes) * dtype_bytes if half else 0,
        # GELU's output is gone when two gradients of its size are there; a weight's gradient is cast.
        transient=tokens * (hidden_layer // 2 + 2 * width * FLOAT32) + (hidden * width * dtype_bytes if half else 0),
    )
