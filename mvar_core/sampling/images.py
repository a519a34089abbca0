"""From conditions to images: batches that advance from scale to scale, then the decoder a few images at a time."""

# Shape suffixes: N images of a batch, L tokens of all scales, S scales, Z latent channels, h w the latent grid,
# H W pixels, C color channels.

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mvar_core.config import ModelConfig, SamplingConfig
from mvar_core.io.pixels import to_uint8
from mvar_core.models.compilation import is_compiled, room_for_shapes
from mvar_core.models.footprint import Setting
from mvar_core.models.micro_batches import PROCESS_BYTES, MicroBatches, choose
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import has_bfloat16_unit
from mvar_core.sampling.editing import KeptTokens
from mvar_core.sampling.sampler import sample_tokens

PART_OF_FREE_MEMORY = 0.5
"""Of what the device has free, where no budget is given."""


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

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Samples(
        images=torch.cat([part.images for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        labels=tuple(label for part in parts for label in part.labels),
        stages=joined("stages"),
        kept=joined("kept"),
    )


class ImageSampler:
    """Draws images with a transformer and a tokenizer.

    Args:
        config: What the model is.
        transformer: In evaluation mode.
        tokenizer: On the same device; its encoder is not needed.
        attention: Attention backend.
    """

    def __init__(self, config: ModelConfig, transformer: Transformer, tokenizer: VQVAE, attention: str = "auto"):
        self.config = config
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.attention = attention
        self.device = tokenizer.quantizer.codebook.device

    def micro_batches(
        self,
        images: int,
        settings: SamplingConfig,
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        stages: bool = False,
    ) -> MicroBatches:
        """How many images run together when `images` are sampled.

        Args:
            images: How many are asked for.
            settings: Guidance and filters.
            batch_size: Images that advance from scale to scale together; by default as many as are fast and fit.
            memory: Bytes that sampling may take, weights included, and on a CPU the process as well; by default half
                of what the device has free.
            stages: f̂ is kept after every scale.

        Raises:
            ConfigError: Too little memory for one image.
        """
        if memory is None:
            free = free_memory(self.device)
            budget = None if free is None else int(PART_OF_FREE_MEMORY * free)
        else:
            budget = memory - self.weight_bytes() - (PROCESS_BYTES if self.device.type == "cpu" else 0)
        setting = Setting(
            dtype_bytes=self.transformer.input_projection.weight.element_size(),
            sampling=settings,
            device=self.device.type,
            keep_stages=stages,
            bfloat16_unit=has_bfloat16_unit(),
        )
        return choose(self.config, images, setting, budget=budget, batch_size=batch_size)

    def weight_bytes(self) -> int:
        """Bytes of all weights that sampling uses."""
        modules = (self.transformer, self.tokenizer)
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def stream(
        self,
        conditions: Tensor,
        indices: Sequence[int],
        seed: int,
        settings: SamplingConfig,
        sizes: MicroBatches,
        *,
        labels: Sequence[int] | None = None,
        kept: KeptTokens | None = None,
        stages: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Samples]:
        """Samples in order, a batch at a time.

        Args:
            conditions: Class label of each sample (N,), or vectors (N, X), as the model is conditioned.
            indices: Global index of each sample; its random stream follows from it and the seed.
            seed: The run's seed.
            settings: Guidance and filters.
            sizes: From `micro_batches`.
            labels: What the samples are labelled with; by default the conditions that are labels, else -1.
            kept: Tokens of given images, one for each sample, and which of them stay.
            stages: Also decode each sample after every scale.
            progress: Called as progress(done, total), in images; also while images are on their way.
        """
        labels = self.transformer.conditioner.labels(conditions) if labels is None else labels
        report = _Progress(progress, len(conditions), self.config.pyramid.num_tokens)
        for start in range(0, len(conditions), sizes.images):
            batch = slice(start, min(start + sizes.images, len(conditions)))
            given = kept.rows(batch) if kept is not None else None
            with room_for_shapes(self.transformer):
                sampled = sample_tokens(
                    self.transformer,
                    self.tokenizer.quantizer,
                    conditions[batch],
                    indices[batch],
                    seed,
                    settings,
                    kept=given,
                    micro_batches=sizes.scales,
                    attention=self.attention,
                    keep_stages=stages,
                    static_shapes=is_compiled(self.transformer),
                    on_tokens=report.tokens,
                )
            images_NHWC = self._decode(sampled.fhat_NZhw, sizes.decoder, report.images)
            strips = None
            if sampled.stages_NSZhw is not None:
                shape = sampled.stages_NSZhw.shape[:2]
                strips = self._decode(sampled.stages_NSZhw.flatten(0, 1), sizes.decoder).unflatten(0, shape)
            report.batch_done(batch.stop)
            stays = given.kept_NL.cpu() if given is not None else None
            yield Samples(images_NHWC, sampled.tokens_NL.cpu(), tuple(labels[batch]), strips, stays)

    @torch.no_grad()
    def _decode(
        self, fhat_NZhw: Float[Tensor, "N Z h w"], at_once: int, on_images: Callable[[int], None] | None = None
    ) -> UInt8[Tensor, "N H W 3"]:
        """Bytes of images on the CPU, decoded a few at a time; copies from a GPU overlap the next decoding."""
        on_gpu = self.device.type == "cuda"
        shape = (len(fhat_NZhw), *self.config.image_shape, 3)
        pixels_NHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=on_gpu)
        for start in range(0, len(fhat_NZhw), at_once):
            part = slice(start, start + at_once)
            decoded = to_uint8(self.tokenizer.decode_features(fhat_NZhw[part]))
            pixels_NHWC[part].copy_(decoded, non_blocking=on_gpu)
            if on_images is not None:
                on_images(len(decoded))
        if on_gpu:
            torch.cuda.synchronize(self.device)
        return pixels_NHWC


class _Progress:
    """Tells how many images are done, counting sampling the tokens of one and decoding it as half of it each."""

    def __init__(self, report: Callable[[int, int], None] | None, total: int, tokens_per_image: int):
        self.report = report
        self.total = total
        self.tokens_per_image = tokens_per_image
        self.halves = 0.0
        self.reported = 0

    def tokens(self, count: int) -> None:
        self._add(count / self.tokens_per_image)

    def images(self, count: int) -> None:
        self._add(count)

    def batch_done(self, done: int) -> None:
        """Every image up to here is finished."""
        self.halves = 2.0 * done
        self._tell(done)

    def _add(self, halves: float) -> None:
        self.halves += halves
        # The last image of a batch is only done when the batch is.
        self._tell(min(int(self.halves / 2), self.total - 1))

    def _tell(self, done: int) -> None:
        if self.report is not None and done > self.reported:
            self.reported = done
            self.report(done, self.total)
