"""What `mvar edit` was asked for: which images, what stays of them, and how the rest is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvar_cli.drawing import Chunk, Draw
from mvar_cli.parts import Request
from mvar_core.config import ModelConfig
from mvar_core.data.decoding import check_image, read_rgb
from mvar_core.data.folders import find_images
from mvar_core.data.masks import Mask, box_mask, crop_kept, read_mask
from mvar_core.data.transforms import resize_and_crop
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.files import fingerprint
from mvar_core.io.pixels import Pixels, from_uint8
from mvar_core.pipeline import Pipeline
from mvar_core.sampling.editing import KeptTokens, kept_pixels, kept_tokens

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class EditRequest(Request):
    """Everything that the bytes of edited images depend on: every image with every class, `num` times each.

    Attributes:
        images: Names of the image files, without their endings.
        inputs: Fingerprint of the image files and the mask.
        box: x0, y0, x1, y1, or None.
        keep: What stays: inside or outside.
        coverage: How much of a coarse token's cell must stay.
        paste: Whether the given pixels are laid over the drawn ones.
        stays: For each image which tokens stay: one bit each, in hexadecimal.
        no_class: The label that stands for no class.
    """

    images: tuple[str, ...]
    inputs: str
    box: Box | None
    keep: str
    coverage: float
    paste: bool
    stays: tuple[str, ...]
    no_class: int

    @property
    def groups(self) -> int:
        """Images times classes."""
        return len(self.images) * max(1, len(self.classes))

    @cached_property
    def entries(self) -> NDArray[np.int64]:
        """Which of `classes` each sample is of (N,); 0 where there are none."""
        return np.tile(np.repeat(np.arange(max(1, len(self.classes))), self.num), len(self.images))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class label of each sample (N,)."""
        return np.asarray(self.classes or (self.no_class,), np.int64)[self.entries]

    @cached_property
    def known(self) -> dict[str, NDArray]:
        """Labels and, beside tokens, which of them stayed: bool (N, L)."""
        if not self.save_tokens:
            return {"labels": self.labels}
        bits = np.array([np.frombuffer(bytes.fromhex(text), np.uint8) for text in self.stays])
        kept = np.unpackbits(bits, axis=1, count=self.tokens).astype(bool)
        return {"labels": self.labels, "kept": kept.repeat(self.total // len(self.images), axis=0)}

    def image_of(self, index: int) -> int:
        """Which image a sample is made of."""
        return index // (self.total // len(self.images))

    def file_name(self, index: int) -> str:
        """Name of one sample's PNG: number, image and, where there is one, class."""
        label = f"_{self.condition_name(index)}" if self.classes else ""
        return f"{self.number(index)}_{self.images[self.image_of(index)]}{label}.png"


class Edit:
    """Images, and what stays of each; everything is checked before anything is drawn.

    Args:
        config: The model.
        images: Files, and folders of them.
        box: x0, y0, x1, y1 in pixels of every image's file, or None.
        mask: An image file, white inside; of an image's size, or of the model's. One of box and mask is there.
        keep: What stays: inside or outside.
        coverage: How much of a coarse token's cell must stay.

    Raises:
        DataError: Images or a mask that cannot be used, or nothing to draw, or nothing that stays.
        ConfigError: A coverage out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        images: Sequence[Path],
        box: Box | None,
        mask: Path | None,
        keep: str,
        coverage: float,
    ):
        self.config, self.box, self.mask, self.keep, self.coverage = config, box, mask, keep, coverage
        self.paths = [path for given in images for path in _files(given)]
        inside = read_mask(mask) if mask is not None else None
        self._pixels: dict[tuple[int, int], Mask] = {}
        self._sizes: list[tuple[int, int]] = []
        for path in self.paths:
            size = check_image(path)
            if size not in self._pixels:
                self._pixels[size] = self._kept(path, size, inside)
            self._sizes.append(size)
        self._stays = {
            size: kept_tokens(torch.from_numpy(pixels), config.pyramid, coverage)
            for size, pixels in self._pixels.items()
        }
        for path, size in zip(self.paths, self._sizes, strict=True):
            self._require_both(path, self._stays[size])

    def pixels(self, image: int) -> Mask:
        """Where an image's pixels stay, (H, W) of the model's size."""
        return self._pixels[self._sizes[image]]

    def stays(self, image: int) -> torch.Tensor:
        """Which of an image's tokens stay, bool (L,)."""
        return self._stays[self._sizes[image]]

    def given(self, image: int) -> Pixels:
        """An image as the model sees it, uint8 (H, W, 3)."""
        return np.asarray(resize_and_crop(read_rgb(self.paths[image]), self.config.image_shape))

    def request(self, base: Request, *, paste: bool) -> EditRequest:
        """The request for edits, from one that says model, classes, settings and output."""
        assert self.config.transformer is not None
        packed = [np.packbits(self.stays(image).numpy()).tobytes().hex() for image in range(len(self.paths))]
        return EditRequest(
            **{field.name: getattr(base, field.name) for field in fields(base)},
            images=tuple(path.stem for path in self.paths),
            inputs=fingerprint([*self.paths, *([self.mask] if self.mask is not None else [])]),
            box=self.box,
            keep=self.keep,
            coverage=self.coverage,
            paste=paste,
            stays=tuple(packed),
            no_class=self.config.transformer.num_classes,
        )

    def facts(self) -> list[dict[str, Any]]:
        """For every image its file, and how many tokens stay of how many at each scale."""
        spans = self.config.pyramid.spans
        return [
            {
                "image": str(path),
                "kept_by_scale": [int(self.stays(image)[span].sum()) for span in spans],
                "tokens_by_scale": [grid.tokens for grid in self.config.pyramid.grids],
            }
            for image, path in enumerate(self.paths)
        ]

    def _kept(self, path: Path, size: tuple[int, int], inside: Mask | None) -> Mask:
        if inside is None:
            assert self.box is not None
            inside = box_mask(self.box, size)
        kept = kept_pixels(torch.from_numpy(inside), self.keep).numpy()
        if inside.shape == size:
            return crop_kept(kept, self.config.image_shape)
        if inside.shape == self.config.image_shape:
            return kept
        raise DataError(
            f"The mask {self.mask} is {_size(inside.shape)}, but {path} is {_size(size)}.",
            f"Give a mask of the image's size, or of the model's, {_size(self.config.image_shape)}.",
        )

    def _require_both(self, path: Path, stays: torch.Tensor) -> None:
        """Refuse what asks for nothing, or for all."""
        what = f"--mask {self.mask}" if self.mask is not None else "--box " + ",".join(map(str, self.box or ()))
        last = stays[self.config.pyramid.spans[-1]]
        height, width = self.config.image_shape
        if last.all():
            raise DataError(
                f"Nothing of {path} would change: {what} with --keep {self.keep} keeps all that the model sees of it.",
                f"The model sees its centre, resized to {_size((height, width))}; choose another part, or --keep"
                f" {'outside' if self.keep == 'inside' else 'inside'}.",
            )
        if not last.any():
            grid = self.config.pyramid.latent_grid
            raise DataError(
                f"Nothing of {path} would stay: {what} with --keep {self.keep} keeps no whole token.",
                f"One covers {_size((height // grid.height, width // grid.width))} of {_size((height, width))}; to draw"
                " without an image, use `mvar sample`.",
            )


def parse_box(text: str) -> Box:
    """`--box`: four whole numbers.

    Raises:
        ConfigError: Something else.
    """
    from mvar_cli.old_options import parse_numbers

    numbers = parse_numbers(text, "--box")
    if len(numbers) != 4:
        raise ConfigError(f"--box {text!r} has {len(numbers)} numbers; expected x0,y0,x1,y1.")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def edit_draws(pipeline: Pipeline, edit: Edit, request: EditRequest, **settings: Any) -> Draw:
    """How a pipeline draws edits with settings of `Pipeline.stream`."""

    def draw(labels: Sequence[int], indices: Sequence[int], progress: Callable[[int, int], None]) -> Iterator[Chunk]:
        images = [request.image_of(index) for index in indices]
        given = lru_cache(maxsize=4)(edit.given)
        encoded = {
            image: pipeline.kept_tokens(
                from_uint8(given(image)[None]), torch.from_numpy(edit.pixels(image)), edit.coverage
            )
            for image in dict.fromkeys(images)
        }
        kept = KeptTokens(
            torch.cat([encoded[image].tokens_NL for image in images]),
            torch.cat([encoded[image].kept_NL for image in images]),
        )
        conditions: Any = labels if request.classes else pipeline.null_conditions(len(labels))
        if request.vectors is not None:
            conditions = request.conditions_of(indices)
        done = 0
        for samples in pipeline.stream(conditions, kept=kept, indices=indices, progress=progress, **settings):
            pixels = samples.images.numpy()
            if request.paste:
                for row, image in enumerate(images[done : done + len(pixels)]):
                    np.copyto(pixels[row], given(image), where=edit.pixels(image)[..., None])
            done += len(pixels)
            stages = samples.stages.numpy() if samples.stages is not None else None
            yield Chunk(pixels, samples.tokens.numpy(), stages)

    return draw


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        return [given / name for name in find_images(given)[1]]
    return [given]


def _size(shape: Sequence[int]) -> str:
    """A size as image programs write it: width first."""
    return f"{shape[1]}×{shape[0]} pixels"
