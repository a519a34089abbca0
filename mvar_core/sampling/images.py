"""Images from conditions: batches that advance from scale to scale, then the decoder, a few images at a time."""

# Shape suffixes: N images of a batch, L tokens of all scales, S scales, Z latent channels, h w the latent grid,
# H W pixels, C color channels.

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mvar_core.config import SamplingConfig
from mvar_core.io.pixels import to_uint8
from mvar_core.models.compilation import is_compiled, room_for_shapes
from mvar_core.models.micro_batches import MicroBatches
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.sampling.editing import KeptTokens
from mvar_core.sampling.sampler import sample_tokens


@dataclass(frozen=True)
class Samples:
    """Sampled images, on the CPU.

    Attributes:
        images: uint8 (N, H, W, 3).
        tokens: int64 (N, L).
        labels: The class label of each sample; -1 where a vector was given and no label with it.
        stages: uint8 (N, S, H, W, 3): each sample decoded after every scale, if asked for.
        kept: bool (N, L): which tokens are those of a given image, where one was edited.
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
        stages, kept = (None if values is None else values[rows] for values in (self.stages, self.kept))
        return Samples(self.images[rows], self.tokens[rows], self.labels[rows], stages, kept)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    labels = tuple(label for part in parts for label in part.labels)
    return Samples(joined("images"), joined("tokens"), labels, joined("stages"), joined("kept"))


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

    for start in range(0, total, sizes.images):
        batch = slice(start, min(start + sizes.images, total))
        given = kept.rows(batch) if kept is not None else None
        with room_for_shapes(transformer):
            sampled = sample_tokens(
                transformer,
                tokenizer.quantizer,
                conditions[batch],
                indices[batch],
                seed,
                settings,
                kept=given,
                micro_batches=sizes.scales,
                attention=attention,
                keep_stages=stages,
                static_shapes=is_compiled(transformer),
                on_tokens=lambda count: add(count / transformer.pyramid.num_tokens, total - 1),
            )
        # The last image of a batch is only done when the batch is.
        images_NHWC = _decode(tokenizer, sampled.fhat_NZhw, sizes.decoder, lambda count: add(count, total - 1))
        strips = None
        if sampled.stages_NSZhw is not None:
            shape = sampled.stages_NSZhw.shape[:2]
            strips = _decode(tokenizer, sampled.stages_NSZhw.flatten(0, 1), sizes.decoder).unflatten(0, shape)
        add(2 * batch.stop - halves, total)
        stays = given.kept_NL.cpu() if given is not None else None
        yield Samples(images_NHWC, sampled.tokens_NL.cpu(), tuple(labels[batch]), strips, stays)


@torch.no_grad()
def _decode(
    tokenizer: VQVAE,
    fhat_NZhw: Float[Tensor, "N Z h w"],
    at_once: int,
    on_images: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "N H W 3"]:
    """Bytes of images on the CPU, decoded a few at a time; copies from a GPU overlap the next decoding."""
    on_gpu = fhat_NZhw.device.type == "cuda"
    pixels_NHWC = None
    for start in range(0, len(fhat_NZhw), at_once):
        decoded = to_uint8(tokenizer.decode_features(fhat_NZhw[start : start + at_once]))
        if pixels_NHWC is None:
            shape = (len(fhat_NZhw), *decoded.shape[1:])
            pixels_NHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        pixels_NHWC[start : start + at_once].copy_(decoded, non_blocking=on_gpu)
        if on_images is not None:
            on_images(len(decoded))
    if on_gpu:
        torch.cuda.synchronize(fhat_NZhw.device)
    assert pixels_NHWC is not None
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
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
