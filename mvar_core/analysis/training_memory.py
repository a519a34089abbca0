"""Predicted peak memory of a training step of all scales, by formula.

A step holds weights and AdamW's state, and at its widest either what the forward pass kept for the backward pass, or
the gradients with what is left of it: the backward pass frees one while it makes the other. The formulas follow what
the blocks keep, tensor by tensor.
"""

from __future__ import annotations

from torch import nn

from mvar_core.config.training import TrainConfig
from mvar_core.models.footprint import FLOAT32, INT64
from mvar_core.models.linear import SMALLEST_ROWS
from mvar_core.models.steps import WORTHWHILE_ELEMENTS
from mvar_core.models.transformer import Transformer


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of modules, also of those on the meta device."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def train_peak_bytes(transformer: Transformer, train: TrainConfig, dtype_bytes: int, device: str = "cpu") -> int:
    """Most memory allocated at once in a training step on one device, of a model that may be on the meta device.

    `dtype_bytes` are those of the compute dtype; weights, gradients and optimizer state are in float32.
    """
    sizes, pyramid = transformer.config, transformer.pyramid
    width, depth, length = sizes.embed_dim, sizes.depth, pyramid.num_tokens
    weights = FLOAT32 * count_parameters(transformer)
    block_weights = FLOAT32 * count_parameters(transformer.blocks[0])
    head_weights = FLOAT32 * count_parameters(transformer.head, transformer.head_modulation)
    rows = min(train.micro_batch or -(-train.batch_size // train.accumulate), train.batch_size)
    accumulates, half, tokens = rows < train.batch_size, dtype_bytes < FLOAT32, rows * length
    image_by_image = device == "cpu" and length * width >= WORTHWHILE_ELEMENTS  # which keeps less

    # What a block keeps for its backward pass.
    hidden_layer = 2 * sizes.hidden_dim * dtype_bytes  # before and after GELU
    apart = 0
    if image_by_image:
        # Norms, q k v, q and k normalised, attention, both branches; the stream twice in float32; lengths of q and k.
        per_token = 10 * width * dtype_bytes + 2 * width * FLOAT32
        per_token += 2 * sizes.num_heads * FLOAT32 if sizes.l2_attention else -2 * width * dtype_bytes
        # Small scales are computed by SDPA, which keeps its output apart.
        small = sum(grid.tokens for grid in pyramid if rows * grid.tokens * width < WORTHWHILE_ELEMENTS)
        apart = rows * small * width * dtype_bytes
    else:
        # Both norms, as they are and modulated (and then cast), and the stream twice.
        per_token = width * ((4 * FLOAT32 + 2 * dtype_bytes) if half else 6 * FLOAT32)
        # q k v, attention scale by scale and joined, both branches.
        per_token += 7 * width * dtype_bytes
        if sizes.l2_attention:
            # q and k in float32, q's direction, and what attention reads; in float32 the directions and q.
            per_token += width * (3 * FLOAT32 + 2 * dtype_bytes if half else 3 * FLOAT32)
    # AdaLN vectors of the block, and what norms make of them.
    modulation = max(rows, SMALLEST_ROWS) * 6 * width * dtype_bytes + rows * 4 * width * FLOAT32
    block = tokens * (per_token + hidden_layer) + apart + modulation
    # Weights of the block in the compute dtype, where that is not float32.
    block += block_weights // FLOAT32 * dtype_bytes if half else 0

    stream = tokens * width * FLOAT32
    inputs = tokens * (transformer.input_projection.in_features * FLOAT32 + INT64)
    # The head's norm; of the loss: log-probabilities, and two gradients of their size.
    head = stream * (1 if image_by_image else 2) + 3 * tokens * transformer.head.out_features * FLOAT32
    # What a block's backward pass makes at its widest: GELU's output is gone when two gradients of its size are there;
    # a weight's gradient is cast.
    transient = tokens * (hidden_layer // 2 + 2 * width * FLOAT32)
    transient += sizes.hidden_dim * width * dtype_bytes if half else 0

    def widest(done: int) -> int:
        """Bytes next to weights and optimizer state when the backward pass has `done` blocks behind it."""
        left = depth - done
        if train.activation_checkpointing:  # each block's input, and one block computed again for its gradient
            activations = inputs + left * stream + (min(left, 1) * block if done else 0)
        else:
            activations = inputs + stream + left * block
        if done == 0:
            return activations + head
        return activations + transient + (0 if accumulates else head_weights + done * block_weights)

    # Weights, AdamW's two values for each, EMA, and the gradients of the micro-batches before this one.
    states = weights * (3 + (train.ema > 0) + accumulates)
    return states + max(weights, *(widest(done) for done in range(depth + 1)))
