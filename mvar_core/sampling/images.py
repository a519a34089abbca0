"""Images from conditions: batches that advance from scale to scale, then the decoder, a few images at a time."""

# Shape suffixes: N images of a batch, L tokens of all scales, S scales, Z latent channels, h w the latent grid,
# H W pixels, C color channels.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mvar_core.config import SamplingConfig
from mvar_core.errors import CheckpointError, ConfigError, is_out_of_memory, one_line
from mvar_core.io.pixels import to_uint8
from mvar_core.models.compilation import is_compiled, room_for_shapes
from mvar_core.models.micro_batches import MicroBatches
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.sampling.editing import KeptTokens
from mvar_core.sampling.sampler import sample_tokens

log = logging.getLogger("mvar")


@dataclass(frozen=True)
class Samples:
    """Sampled images, uint8 (N, H, W, 3), and their tokens, int64 (N, L), on the CPU.

    A label is -1 where a vector was given and no label. `stages`, uint8 (N, S, H, W, 3), are the samples decoded
    after every scale, if asked for; `kept`, bool (N, L), says which tokens are those of a given image that was edited.
    """

    images: UInt8[Tensor, "N H W 3"]
    tokens: Int[Tensor, "N L"]
    labels: tuple[int, ...]
    stages: UInt8[Tensor, "N S H W 3"] | None = None
    kept: Bool[Tensor, "N L"] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: slice) -> Samples:
        """Some of them."""
        return replace(self, **{name: values[rows] for name, values in vars(self).items() if values is not None})


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {name: torch.cat([vars(part)[name] for part in parts]) for name in names}
    return replace(parts[0], labels=tuple(chain.from_iterable(part.labels for part in parts)), **joined)


def sample_images(
    transformer: Transformer,
    tokenizer: VQVAE,
    conditions: Tensor,
    indices: Sequence[int],
    seed: int,
    settings: SamplingConfig,
    sizes: MicroBatches,
    *,
    labels: Sequence[int] | None = None,
    kept: KeptTokens | None = None,
    attention: str = "auto",
    stages: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Samples]:
    """Samples in order, `sizes.images` at a time.

    Arguments are as of `sample_tokens` and `Pipeline.stream`; the tokenizer's encoder is not needed. For `progress`,
    sampling the tokens of an image is half of the work, decoding it the other half.
    """
    labels = transformer.conditioner.labels(conditions) if labels is None else labels
    total, halves, reported = len(conditions), 0.0, 0

    def add(more: float, most: int) -> None:
        nonlocal halves, reported
        halves += more
        done = min(int(halves / 2), most)
        if progress is not None and done > reported:
            reported = done
            progress(done, total)

    def sampled(batch: slice, given: KeptTokens | None) -> Samples:
        with room_for_shapes(transformer):
            found = sample_tokens(
                transformer, tokenizer.quantizer, conditions[batch], indices[batch], seed, settings, kept=given,
                micro_batches=sizes.scales, attention=attention, keep_stages=stages,
                static_shapes=is_compiled(transformer),
                on_tokens=lambda count: add(count / transformer.pyramid.num_tokens, total - 1),
            )  # fmt: skip
        # The last image of a batch is only done when the batch is.
        images_NHWC = _decode(tokenizer, found.fhat_NZhw, sizes.decoder, lambda count: add(count, total - 1))
        strips = None
        if (fhats := found.stages_NSZhw) is not None:
            strips = _decode(tokenizer, fhats.flatten(0, 1), sizes.decoder).unflatten(0, fhats.shape[:2])
        stays = given.kept_NL.cpu() if given is not None else None
        return Samples(images_NHWC, found.tokens_NL.cpu(), tuple(labels[batch]), strips, stays)

    start = 0
    while start < total:
        batch, samples = slice(start, min(start + sizes.images, total)), None
        try:
            samples = sampled(batch, kept.rows(batch) if kept is not None else None)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = one_line(error)
        if samples is None:  # out here the error is gone, and with it what its frames held
            sizes, before = sizes.halved(batch.stop - start), sizes
            if sizes == before:
                raise ConfigError(f"There is too little memory to sample one image: {problem}",
                                  "Free some, or use --dtype bfloat16.")  # fmt: skip
            if transformer.input_projection.weight.device.type == "cuda":
                torch.cuda.empty_cache()
            log.warning("Out of memory: at most %d images are sampled together from here on.", sizes.images)
            halves = 2.0 * start
            continue
        start = batch.stop
        add(2 * start - halves, total)
        yield samples


@torch.no_grad()
def _decode(
    tokenizer: VQVAE, fhat_NZhw: Float[Tensor, "N Z h w"], at_once: int, on_images: Callable[[int], None] | None = None
) -> UInt8[Tensor, "N H W 3"]:
    """Bytes of images on the CPU, decoded a few at a time; copies from a GPU overlap the next decoding."""
    on_gpu = fhat_NZhw.device.type == "cuda"
    pixels_NHWC = torch.empty(0)
    for start in range(0, len(fhat_NZhw), at_once):
        decoded = tokenizer.decode_features(fhat_NZhw[start : start + at_once])
        if not decoded.isfinite().all():
            raise CheckpointError(
                "The tokenizer's decoder returns values that are not finite numbers.",
                "Its weights hold nan or inf, or overflow: use --dtype float32, or other weights.",
            )
        decoded = to_uint8(decoded)
        if start == 0:
            pixels_NHWC = torch.empty(len(fhat_NZhw), *decoded.shape[1:], dtype=torch.uint8, pin_memory=on_gpu)
        pixels_NHWC[start : start + at_once].copy_(decoded, non_blocking=on_gpu)
        if on_images is not None:
            on_images(len(decoded))
    if on_gpu:
        torch.cuda.synchronize(fhat_NZhw.device)
    return pixels_NHWC


def free_memory(device: torch.device) -> int | None:
    """Bytes that the device has free, or None where it does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
