"""A model and its tokenizer as one object: load, encode, decode, score, sample and edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Float64, Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from mvar_core.analysis.likelihood import log_likelihoods, read_candidates
from mvar_core.arguments import tensor_argument
from mvar_core.classes import Classes
from mvar_core.config import Machine, ModelConfig, SamplingConfig
from mvar_core.config.section import checked
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.io.pixels import to_uint8
from mvar_core.kernels import check_backend
from mvar_core.models import directory as model_directory
from mvar_core.models import official
from mvar_core.models.compilation import check_compiler, compile_for_sampling
from mvar_core.models.footprint import Setting
from mvar_core.models.meta import meta_device
from mvar_core.models.micro_batches import DECODED_AT_ONCE, PROCESS_BYTES, MicroBatches, choose
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import has_bfloat16_unit, resolve_device, resolve_dtype
from mvar_core.sampling.conditions import by_labels
from mvar_core.sampling.editing import UNGUIDED, KeptTokens, checked_mask, kept_pixels, kept_tokens, pasted
from mvar_core.sampling.images import Samples, free_memory, join_samples, sample_images
from mvar_core.sampling.sampler import resolve_settings

# Shape suffixes: N samples, B batch, L tokens of all scales, S scales, H W pixels, V codebook entries.

SHARE_OF_FREE_MEMORY = 0.5
"""What sampling may use of what the device has free, where no budget is given."""
LARGEST_VALUE = 2.0
"""Of an image in [-1, 1]: what is beyond is bytes, or was normalized in another way."""

TensorLike = Any
"""A tensor, an array or nested lists; what it must hold is checked by `tensor_argument`."""


class Pipeline:
    """A tokenizer and, unless there is a tokenizer alone, a transformer, on one device.

    `config` says what the model is; `attention` is the backend, or "auto"; `memory` is the number of bytes that
    sampling may use where a call does not specify them, None for half of what is free.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: VQVAE,
        transformer: Transformer | None = None,
        *,
        attention: str = "auto",
        memory: int | None = None,
    ):
        self.config = config
        self._tokenizer = tokenizer.eval()
        self._load_tokenizer: Callable[[], VQVAE] | None = None
        self._transformer = transformer.eval() if transformer is not None else None
        self.device = tokenizer.quantizer.codebook.device
        self.attention = attention
        self.memory = memory
        if self.device.type == "meta":
            message = f"The tokenizer of {config.name} has no weights: it is on the meta device."
            raise CheckpointError(message, "Load it with Pipeline.from_pretrained.")
        if transformer is not None:
            check_backend(attention, config.patterns, self.device, transformer.input_projection.weight.dtype)

    @classmethod
    @checked
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
        compile: bool = False,  # noqa: A002
        verify: bool = True,
        machine: Machine | None = None,
    ) -> Pipeline:
        """Load a model directory, a run directory, or a published .pth file with its tokenizer.

        CheckpointError where there is nothing that can be loaded, BackendError for a backend or device that cannot be
        used.

        Args:
            path: The directory or file.
            tokenizer: The tokenizer's .pth, where `path` is one; by default the one vae*.pth next to it.
            device: auto, cpu, cuda, cuda:N or mps.
            dtype: auto, float32, bfloat16 or float16: of the weights and activations. Logits, sampling and f̂ are
                float32 in any case.
            attention: Attention backend.
            compile: Compile the transformer's blocks for sampling: the first images wait for it, later ones do not.
            verify: Compare a directory's weights with the hashes that were recorded when they were saved.
            machine: These five, and the memory that sampling may use, in place of the keywords.
        """
        path = Path(path)
        machine = machine or Machine(
            device=cast("str", device), dtype=cast("str", dtype), attention=attention, compile=compile, verify=verify
        )
        target = resolve_device(machine.device)
        kind = resolve_dtype(machine.dtype, target)
        options: dict[str, Any] = {"attention": machine.attention, "memory": machine.memory_bytes}
        if machine.compile:
            check_compiler(target)
        load_tokenizer, transformer = None, None
        if path.is_file():
            converted = official.convert(path, Path(tokenizer) if tokenizer else official.tokenizer_next_to(path))
            assert converted.transformer is not None
            config = converted.config
            with meta_device():
                vqvae, transformer = VQVAE(config.tokenizer, config.pyramid), Transformer(config)
            vqvae.load_state_dict(converted.tokenizer, assign=True)
            transformer.load_state_dict(converted.transformer, assign=True)
            for module in (vqvae, transformer):
                module.requires_grad_(False).to_compute_dtype(kind).to(target)
        elif tokenizer is not None:
            raise ConfigError(
                f"{path} is not a published .pth file: it has a tokenizer of its own, and {tokenizer} is not used.",
                "Leave out --tokenizer.",
            )
        else:
            config = model_directory.read_model_config(path)
            load_tokenizer = partial(model_directory.load_tokenizer, path, config, target, kind, verify=machine.verify)
            if config.transformer is not None:
                transformer = model_directory.load_transformer(path, config, target, kind, verify=machine.verify)
            vqvae = load_tokenizer(encoder=transformer is None)
        pipeline = cls(config, vqvae, transformer, **options)
        pipeline._load_tokenizer = load_tokenizer
        if machine.compile:
            compile_for_sampling(pipeline.transformer, target)
        return pipeline

    @property
    def tokenizer(self) -> VQVAE:
        """The VQVAE; its encoder, which sampling does not need, is loaded on first use, or else a CheckpointError."""
        if not self._tokenizer.has_encoder:
            if self._load_tokenizer is None:
                raise CheckpointError(
                    f"The tokenizer of {self.config.name} has no encoder, which encoding and saving need.",
                    "Build the Pipeline from a VQVAE with its encoder, or load it with Pipeline.from_pretrained.",
                )
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """The tokenizer's quantizer, which needs neither encoder nor decoder."""
        return self._tokenizer.quantizer

    @property
    def transformer(self) -> Transformer:
        """The transformer; CheckpointError where the pipeline holds a tokenizer alone."""
        if self._transformer is None:
            message = f"{self.config.name} is a tokenizer without a transformer."
            raise CheckpointError(message, "Train one with `mvar train`.")
        return self._transformer

    @property
    def classes(self) -> Classes:
        """The model's classes: `pipe.classes.resolve("tabby, #3")` returns positions, which are labels."""
        return Classes.of_model(self.config)

    @checked
    def save_pretrained(self, path: str | Path) -> None:
        """Write a model directory that `from_pretrained` reads."""
        weights = {"tokenizer": self.tokenizer.state_dict()}
        if self._transformer is not None:
            weights["transformer"] = self._transformer.state_dict()
        model_directory.save_model(Path(path), self.config, **weights)

    @torch.no_grad()
    def encode(self, images: TensorLike) -> Int[Tensor, "B L"]:
        """Tokens of images (B, 3, H, W) in [-1, 1]; DataError where they are not, or have another size."""
        images_BCHW = self._checked_images(images)
        if not len(images_BCHW):
            return torch.empty(0, self.config.pyramid.num_tokens, dtype=torch.long, device=self.device)
        return self.tokenizer.encode(images_BCHW.to(self.device))

    @torch.no_grad()
    def decode(self, tokens: TensorLike) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of tokens (B, L)."""
        tokens_BL = self._checked(tokens)
        if not len(tokens_BL):
            return torch.empty(0, 3, *self.config.image_shape, device=self.device)
        return self._tokenizer.decode(tokens_BL)

    @torch.no_grad()
    def logits(self, tokens: TensorLike, labels: TensorLike) -> Float[Tensor, "B L V"]:
        """Teacher-forced logits (float32) of every token given the condition and the true tokens of earlier scales.

        `labels` holds one class label per image, or vectors (B, X) where the model is conditioned on them.
        """
        tokens_BL, conditions = self._checked(tokens), self.transformer.conditioner.read(self._by_name(labels))
        _require_count(conditions, len(tokens_BL), "labels", "images of tokens")
        if not len(tokens_BL):
            return torch.empty(*tokens_BL.shape, self.config.tokenizer.codebook_size, device=self.device)
        inputs_BLZ = self._tokenizer.quantizer.teacher_forcing_inputs(tokens_BL)
        return self.transformer(conditions.to(self.device), inputs_BLZ, attention=self.attention)

    def log_likelihoods(self, tokens: TensorLike, labels: TensorLike) -> Float64[Tensor, "B *K S"]:
        """Ln p(tokens of each scale | earlier scales, condition), in nats: teacher-forced, without guidance or filters.

        `labels` holds one condition per image, as of `logits`, or K of them, (B, K): then each image is scored under
        each.
        """
        tokens_BL = self._checked(tokens)
        conditions, several = read_candidates(self.transformer.conditioner, labels, len(tokens_BL))
        conditions = conditions.to(self.device)
        scored_BKS = log_likelihoods(self.transformer, self.quantizer, tokens_BL, conditions, attention=self.attention)
        return scored_BKS if several else scored_BKS.squeeze(1)

    def sampling_settings(self, settings: SamplingConfig | None = None, **shorthand: Any) -> SamplingConfig:
        """The settings that `sample` uses for the same arguments: what is not set is as the model recommends."""
        return resolve_settings(self.config, settings, **shorthand)

    @checked
    def micro_batches(
        self,
        images: NonNegativeInt,
        settings: SamplingConfig,
        *,
        batch_size: PositiveInt | None = None,
        memory: PositiveInt | None = None,
        stages: bool = False,
    ) -> MicroBatches:
        """How many images run together when `images` are sampled; the arguments are those of `stream`."""
        memory, budget = self.memory if memory is None else memory, None
        if memory is not None:
            modules = (self.transformer, self._tokenizer)
            weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
            budget = memory - weights - (PROCESS_BYTES if self.device.type == "cpu" else 0)
        elif (free := free_memory(self.device)) is not None:
            budget = int(SHARE_OF_FREE_MEMORY * free)
        each = self.transformer.input_projection.weight.element_size()
        setting = Setting(each, settings, self.device.type, keep_stages=stages, bfloat16_unit=has_bfloat16_unit())
        return choose(self.config, images, setting, budget=budget, batch_size=batch_size)

    def sample(self, labels: TensorLike | None = None, **options: Any) -> Samples:
        """Images of classes, or of vectors where the model is conditioned on them.

        A sample depends on (seed, its global index, condition, settings, weights) alone.

            pipe.sample([3, 3, 7], settings=SamplingConfig(cfg=1.5, top_k=900), seed=0)
            pipe.sample([3, 3, 7], cfg=1.5, seed=0)

        Arguments and errors are those of `stream`.
        """
        batches = list(self.stream(labels, **options))
        if batches:
            return join_samples(batches)
        return Samples(
            images=torch.empty(0, *self.config.image_shape, 3, dtype=torch.uint8),
            tokens=torch.empty(0, self.config.pyramid.num_tokens, dtype=torch.long),
            labels=(),
        )

    @checked
    def stream(
        self,
        labels: TensorLike | None = None,
        *,
        conditions: TensorLike | None = None,
        settings: SamplingConfig | None = None,
        seed: int = 0,
        indices: TensorLike | None = None,
        kept: Any = None,
        batch_size: PositiveInt | None = None,
        memory: PositiveInt | None = None,
        stages: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **shorthand: Any,
    ) -> Iterator[Samples]:
        """`sample`, a batch at a time: samples that were yielded are not held.

        Args:
            labels: The class of each sample: its label, 0 … num_classes - 1, where num_classes is "no class", or its
                name. With `conditions`, what the samples are labelled with.
            conditions: Vectors (N, X), one per sample; a row of nan stands for none.
            settings: Guidance and filters; fields that are not set are as the model recommends.
            seed: The run's seed.
            indices: Global index of each sample; by default 0 … N-1.
            kept: Tokens of given images, one for each sample, that replace sampled ones where it says so; see `edit`.
            batch_size: Samples that advance from scale to scale together; decides speed and memory, never the result.
            memory: Bytes that sampling may use, weights included, and on a CPU the process as well; by default as the
                machine says that the pipeline was loaded for, otherwise half of what the device has free.
            stages: Also decode each sample after every scale.
            progress: Called as progress(done, total), in images; also while images are being sampled.
            **shorthand: Any field of `SamplingConfig`, over `settings`; None is as if it were not there.

        ConfigError for conditions of another kind, a setting out of range, or too little memory for one image.
        """
        settings = self.sampling_settings(settings, **shorthand)
        conditioner = self.transformer.conditioner
        labels = self._by_name(labels)
        asked = labels if conditions is None else conditions
        if asked is None:
            raise ConfigError("sample needs labels, or conditions.", "For example sample(labels=[3, 3, 7]).")
        read = conditioner.read(asked)
        marks, count = conditioner.labels(read), len(read)
        noun = "labels" if read.ndim == 1 else "vectors"

        def numbers_of(values: TensorLike, what: str) -> list[int]:
            expected = f"{what} are whole numbers, {count} for {count} {noun}"
            return tensor_argument(values, expected, "whole", (count,), error=ConfigError).tolist()

        if conditions is not None and labels is not None:
            marks = numbers_of(labels, "labels")
        numbers = numbers_of(range(count) if indices is None else indices, "indices")
        if min(numbers, default=0) < 0:
            raise ConfigError(f"indices hold {min(numbers)}.", "Count samples from 0.")
        if kept is not None:
            if not isinstance(kept, KeptTokens):
                raise ConfigError(f"kept is of type {type(kept).__name__}.", "Pass what Pipeline.kept_tokens returns.")
            tokens_NL = self._checked(kept.tokens_NL)
            _require_count(tokens_NL, count, "images of kept tokens", noun)
            shape = (count, self.config.pyramid.num_tokens)
            kept_NL = tensor_argument(kept.kept_NL, f"kept_NL is bool of {shape}", "bool", shape)
            kept = KeptTokens(tokens_NL, kept_NL)
        sizes = self.micro_batches(len(read), settings, batch_size=batch_size, memory=memory, stages=stages)
        return sample_images(
            self.transformer, self._tokenizer, read, numbers, seed, settings, sizes, labels=marks, kept=kept,
            attention=self.attention, stages=stages, progress=progress,
        )  # fmt: skip

    @checked
    def edit(
        self,
        images: TensorLike,
        mask: TensorLike,
        *,
        labels: TensorLike | None = None,
        keep: Literal["inside", "outside"] = "outside",
        num: PositiveInt = 1,
        coverage: float = 0.5,
        paste: bool = False,
        **options: Any,
    ) -> Samples:
        """Regenerate a region of given images: in-painting, out-painting and class-conditional editing, zero-shot.

        The images' tokens stay, at every scale, where the mask keeps them (mvar_core.sampling.editing), and the rest is
        sampled around them. `Samples.kept` tells which tokens stayed; they are those of `encode`.

        Args:
            images: In [-1, 1], of the model's size.
            mask: Boolean, (H, W) for all images or (N, H, W).
            labels: One class, or vector, per image to edit towards; None is without any, and so without guidance.
            keep: What stays: "outside" fills the mask (in-painting), "inside" generates around it (out-painting).
            num: Variants of each image, one after the other in the result.
            coverage: How much of a coarser scale's cell must stay for its token to stay: above 0, at most 1.
            paste: Copy the given pixels over the generated ones where the mask keeps them, bit-equal to `to_uint8` of
                them.
            **options: As of `stream`.

        DataError for images or a mask of another size than the model's; other errors as of `stream`.
        """
        images = self._checked_images(images)
        pixels = kept_pixels(checked_mask(mask, len(images), self.config.image_shape), keep)
        if labels is None:
            conditions = self.null_conditions(len(images))
            options.update(UNGUIDED)
        else:
            conditions = self.transformer.conditioner.read(self._by_name(labels))
            _require_count(conditions, len(images), "labels", "images")
        rows = torch.arange(len(images)).repeat_interleave(num)
        samples = self.sample(conditions[rows], kept=self.kept_tokens(images, pixels, coverage).rows(rows), **options)
        if not paste:
            return samples
        stays = pixels.expand(len(images), -1, -1)[rows]
        return replace(samples, images=pasted(samples.images, to_uint8(images.cpu())[rows], stays))

    @checked
    def kept_tokens(self, images: TensorLike, pixels: TensorLike, coverage: float = 0.5) -> KeptTokens:
        """Tokens of given images, and which of them stay where these pixels do; what `sample` accepts as `kept`.

        The pixels are for all images or for each; images and coverage are as of `edit`.
        """
        images = self._checked_images(images)
        pixels = checked_mask(pixels, len(images), self.config.image_shape)
        stays = kept_tokens(pixels, self.config.pyramid, coverage).expand(len(images), -1)
        return KeptTokens(self.encode_apart(images).cpu(), stays)

    def encode_apart(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B L"]:
        """As `encode`, a few at a time: on a CPU one, so that an image's tokens never depend on the others."""
        parts = images.split(DECODED_AT_ONCE.get(self.device.type, 1))
        return torch.cat([self.encode(part) for part in parts])

    @checked
    def null_conditions(self, count: NonNegativeInt) -> Tensor:
        """`count` conditions that stand for none, on the CPU."""
        return self.transformer.conditioner.null(count)

    def conditions_of(self, labels: Sequence[int]) -> Tensor:
        """What images of these classes are conditioned on: labels, or vectors of their names; on the CPU."""
        return self.transformer.conditioner.read(by_labels(self.config, labels).get("conditions", labels))

    def _by_name(self, labels: TensorLike) -> TensorLike:
        """Labels, some of which may be names of classes."""
        if isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
            return [self.classes.index(label) for label in labels]
        return labels

    def _checked(self, tokens: TensorLike) -> Int[Tensor, "B L"]:
        """Tokens on the model's device; DataError where they cannot be the model's."""
        length, size = self.config.pyramid.num_tokens, self.config.tokenizer.codebook_size
        expected = f"tokens of {self.config.name} are whole numbers (B, {length})"
        tokens_BL = tensor_argument(tokens, expected, "whole", (None, length))
        if tokens_BL.numel() and not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < size:
            found = f"{int(tokens_BL.min())} … {int(tokens_BL.max())}"
            raise DataError(f"tokens range over {found}; the codebook has {size}.")
        return tokens_BL.to(self.device)

    def _checked_images(self, images: TensorLike) -> Float[Tensor, "B 3 H W"]:
        """Images as float32; DataError where they cannot be the model's."""
        shape = (None, 3, *self.config.image_shape)
        expected = f"images of {self.config.name} are real numbers in [-1, 1] of shape (B, 3, {shape[2]}, {shape[3]})"
        images_BCHW = tensor_argument(images, expected, "real", shape).float()
        if images_BCHW.numel() and not (largest := float(images_BCHW.abs().max())) <= LARGEST_VALUE:
            raise DataError(f"{expected}; found {largest:g}.", "mvar_core.io.pixels.from_uint8 converts bytes.")
        return images_BCHW


def _require_count(values: Sequence[Any] | Tensor, count: int, what: str, noun: str) -> None:
    """Refuse another number of one thing than of another."""
    if len(values) != count:
        raise ConfigError(f"there are {count} {noun} but {len(values)} {what}.")
