"""What a model costs, before anything is trained: parameters, multiply-accumulates, KV cache, memory.

Parameters and operations come from the modules themselves, on the meta device. Figures called GMACs are 10⁹
multiply-accumulates for one image. `attention_gmacs` follows the MVAR paper's convention ("GFLOPs in attention
blocks"): query, key and value projections and the attention itself, without guidance. Memory counts what torch's
allocators hand out and what lives together; it leaves out what the device's libraries and allocators hold for
themselves. In bfloat16 on a CPU, it holds where the CPU computes in bfloat16; others need up to three times as much for
the decoder.
"""

from __future__ import annotations

import bisect
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mvar_core.config import Machine, ModelConfig, RunConfig, TokenizerConfig
from mvar_core.config.training import TrainConfig
from mvar_core.errors import ConfigError
from mvar_core.models import footprint
from mvar_core.models.footprint import FLOAT32, INT64, Setting
from mvar_core.models.linear import SMALLEST_ROWS
from mvar_core.models.meta import meta_device
from mvar_core.models.micro_batches import PROCESS_BYTES, choose
from mvar_core.models.steps import WORTHWHILE_ELEMENTS
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import ScalePyramid
from mvar_core.results import Result
from mvar_core.runtime import DTYPES, resolve_device

GIGA = 1e9
MAX_BATCH = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Plan(Result):
    """The predicted cost of a model; `parameters` are the transformer's, 0 for a tokenizer alone.

    GMACs: `attention_gmacs` of all scales in the paper's convention; `total_gmacs` of one image without guidance, and
    of it `parts_gmacs` (inputs, projections, attention for the products alone, mlp, head, conditioning, quantizer,
    decoder); `guided_gmacs` with guidance, the transformer and its conditioning twice, the decoder once.

    Bytes are for sampling `batch_size` images, `guided` or not, or a training step on one device. `kv_cache_bytes` are
    the most keys and values kept after any scale, `sample_peak_bytes` the predicted peak, weights included, and
    `image_bytes` what each further image of a batch keeps from scale to scale, or while images are decoded.
    `images_together` advance together: the batch size, or fewer where `memory`, what sampling may use, asks for it.
    `largest_batch` is the most that do in `device_memory`, bounded by what an image keeps from scale to scale.

    `scales` has a row each: side (or [height, width]), tokens, window (0 = whole), keys_per_query, attention_gmacs,
    total_gmacs (transformer without guidance), parts_gmacs (of them), kv_cache_bytes (kept once the scale is done),
    micro_batch (images in one pass), activation_bytes (of that pass).
    """

    name: str
    parameters: int
    tokenizer_parameters: int
    tokens: int
    attention_gmacs: float
    total_gmacs: float
    guided_gmacs: float
    conditioning_gmacs: float
    decoder_gmacs: float
    parts_gmacs: dict[str, float]
    batch_size: int
    dtype_bytes: int
    device: str
    guided: bool
    weight_bytes: int
    kv_cache_bytes: int
    sample_peak_bytes: int
    image_bytes: int
    images_together: int
    decoder_images: int
    memory: int | None
    train_batch_size: int | None
    train_peak_bytes: int | None
    device_memory: int | None
    largest_batch: int | None
    largest_train_batch: int | None
    scales: list[dict[str, Any]]


def cost_of(
    config: ModelConfig,
    machine: Machine = Machine(),
    *,
    batch_size: int | None = None,
    guided: bool = True,
    device_memory: int | None = None,
) -> Plan:
    """The predicted cost of a model, or a run, and of its training; arguments are those of `mvar_core.plan`."""
    # Not resolved: predictions are also for devices that this machine does not have.
    device = resolve_device().type if machine.device == "auto" else machine.device.split(":")[0]
    memory = machine.memory_bytes
    for name, value in (("batch_size", batch_size), ("device_memory", device_memory), ("memory", memory)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1.")
    dtype = DTYPES.get(machine.dtype, torch.float32)
    train = config.train if isinstance(config, RunConfig) else TrainConfig(batch_size=1)
    if batch_size is not None:
        train = train.model_copy(update={"batch_size": batch_size})
    images = batch_size or 1
    sampling = config.sampling
    if sampling.guided != guided:
        sampling = sampling.model_copy(update={"cfg": 1.0 if guided else 0.0, "cfg_schedule": "linear"})
    setting = Setting(dtype.itemsize, sampling, device)
    tokenizer, transformer = _tokenizer(config.tokenizer, config.pyramid, dtype), None
    if config.transformer is not None:
        transformer = _transformer(config.model_dump_json(include=_SECTIONS), dtype)
    decoder = (tokenizer.quantizer, tokenizer.decoder_conv, tokenizer.decoder)
    weights = weight_bytes(*decoder, *([transformer] if transformer else []))

    def beside_weights(limit: int | None) -> int | None:
        """What is left of a memory for sampling: without the weights, and on a CPU without the process itself."""
        return None if limit is None else limit - weights - (PROCESS_BYTES if device == "cpu" else 0)

    def kv_cache_bytes(tokens: int, count: int = images) -> int:
        """Keys and values: 2·d·C·tokens·(2B with guidance, else B)·bytes per value."""
        sizes = config.transformer
        return 2 * sizes.depth * sizes.embed_dim * tokens * (1 + guided) * count * dtype.itemsize if sizes else 0

    batches = choose(config, images, setting, budget=beside_weights(memory), batch_size=images)
    scales, parts, paper_macs, most_cached = [], dict.fromkeys(PARTS, 0), 0, 0
    for scale, pattern in enumerate(config.patterns):
        macs = transformer.macs(scale) if transformer else dict.fromkeys(PARTS[:5], 0)
        attention = macs["projections"] * 3 // 4 + macs["attention"]  # the paper leaves the output projection out
        cached, micro_batch = cached_tokens(config, scale), batches.scales[scale]
        scales.append(
            {
                "side": pattern.grid.height if pattern.grid.height == pattern.grid.width else list(pattern.grid),
                "tokens": pattern.queries,
                "window": pattern.window if pattern.is_windowed else 0,
                "keys_per_query": pattern.keys_per_query,
                "attention_gmacs": attention / GIGA,
                "total_gmacs": sum(macs.values()) / GIGA,
                "parts_gmacs": {part: count / GIGA for part, count in macs.items()},
                "kv_cache_bytes": kv_cache_bytes(cached),
                "micro_batch": micro_batch,
                "activation_bytes": footprint.scale_bytes(
                    config, scale, setting, micro_batch, whole=micro_batch >= batches.images
                ),
            }
        )
        paper_macs, most_cached = paper_macs + attention, max(most_cached, cached)
        parts |= {part: parts[part] + count for part, count in macs.items()}
    parts |= {"conditioning": transformer.conditioning_macs() if transformer else 0, **tokenizer.decoding_macs()}
    gmacs = {part: count / GIGA for part, count in parts.items()}
    decoding = gmacs["quantizer"] + gmacs["decoder"]
    through_transformer = sum(gmacs.values()) - decoding

    def train_peak(count: int) -> int:
        assert transformer is not None
        return train_peak_bytes(transformer, train.model_copy(update={"batch_size": count}), dtype.itemsize, device)

    largest = largest_train = None
    if device_memory is not None:
        if transformer is not None:  # the peak never falls as the batch grows
            largest_train = bisect.bisect_right(range(1, MAX_BATCH + 1), device_memory, key=train_peak)
        largest = 0
        with suppress(ConfigError):  # where not even one image fits
            budget = beside_weights(device_memory)
            largest = choose(config, MAX_BATCH, setting, budget=budget, batch_size=MAX_BATCH).images
    return Plan(
        name=config.name,
        parameters=count_parameters(transformer) if transformer else 0,
        tokenizer_parameters=count_parameters(tokenizer),
        tokens=config.pyramid.num_tokens,
        attention_gmacs=paper_macs / GIGA,
        total_gmacs=through_transformer + decoding,
        guided_gmacs=2 * through_transformer + decoding,
        conditioning_gmacs=gmacs["conditioning"],
        decoder_gmacs=decoding,
        parts_gmacs=gmacs,
        batch_size=images,
        dtype_bytes=dtype.itemsize,
        device=device,
        guided=guided,
        weight_bytes=weights,
        kv_cache_bytes=kv_cache_bytes(most_cached),
        sample_peak_bytes=weights + batches.peak_bytes,
        image_bytes=max(
            footprint.image_bytes(config) + kv_cache_bytes(most_cached, 1), footprint.output_bytes(config, setting)
        ),
        images_together=batches.images,
        decoder_images=batches.decoder,
        memory=memory,
        train_batch_size=train.batch_size if transformer else None,
        train_peak_bytes=train_peak(train.batch_size) if transformer else None,
        device_memory=device_memory,
        largest_batch=largest,
        largest_train_batch=largest_train,
        scales=scales,
    )


PARTS = ("inputs", "projections", "attention", "mlp", "head", "conditioning", "quantizer", "decoder")
_SECTIONS = {"image_size", "patch_sizes", "tokenizer", "transformer", "attention", "conditioning"}


@lru_cache(maxsize=16)
def _transformer(sections: str, dtype: torch.dtype) -> Transformer:
    """On the meta device; shared by the plans of one model."""
    with meta_device():
        return Transformer(ModelConfig.model_validate_json(sections)).to_compute_dtype(dtype)


@lru_cache(maxsize=16)
def _tokenizer(config: TokenizerConfig, pyramid: ScalePyramid, dtype: torch.dtype) -> VQVAE:
    """On the meta device; shared, since many models have the same."""
    with meta_device():
        return VQVAE(config, pyramid).to_compute_dtype(dtype)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def cached_tokens(config: ModelConfig, scale: int) -> int:
    """Tokens whose keys and values are kept once `scale` is done, as the MVAR paper counts them.

    VAR keeps all tokens so far; n scale prefixes keep the last n - 1 scales; n = 1 keeps nothing.
    """
    prefixes = config.attention.scale_prefixes
    first = 0 if prefixes == "all" else max(0, scale - prefixes + 2)
    return sum(grid.tokens for grid in config.pyramid.grids[first : scale + 1])


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def train_peak_bytes(transformer: Transformer, train: TrainConfig, dtype_bytes: int, device: str = "cpu") -> int:
    """Most memory allocated at once in a training step of all scales on one device, of a model on any device.

    A step holds weights and AdamW's state, and at its widest either what the forward pass kept for the backward pass,
    or the gradients with what is left of it: the backward pass frees one while it makes the other. The formulas follow
    what the blocks keep, tensor by tensor. `dtype_bytes` are those of the compute dtype; weights, gradients and
    optimizer state are in float32.
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
