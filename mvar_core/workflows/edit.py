"""In-painting, out-painting and class editing of given images, written to files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvar_core.config import Machine, ModelConfig, SamplingConfig
from mvar_core.data.decoding import check_image, read_rgb
from mvar_core.data.folders import find_images
from mvar_core.data.masks import Mask, box_mask, crop_kept, read_mask
from mvar_core.data.transforms import resize_and_crop
from mvar_core.distributed import connect, sigterm_as_interrupt
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.files import fingerprint
from mvar_core.io.pixels import Pixels, from_uint8
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress
from mvar_core.sampling.conditions import choose_conditions
from mvar_core.sampling.editing import UNGUIDED, KeptTokens, kept_pixels, kept_tokens, pasted
from mvar_core.sampling.images import Samples
from mvar_core.sampling.sampler import resolve_settings
from mvar_core.sampling.shards import SampleOutput, SampleShards, SampleSpec
from mvar_core.workflows.sample import Interrupted, LazyModel, SampleResult, check_early, write_samples

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class EditResult(SampleResult):
    """What `edit` leaves behind.

    Attributes:
        keep: What stayed: inside or outside.
        coverage: How much of a coarse token's cell had to stay.
        paste: Whether the given pixels were copied over the generated ones.
        box: x0, y0, x1, y1, or None.
        mask: The mask's file, or None.
        edits: For every image its file, and how many tokens stay of how many at each scale.
    """

    keep: str = "outside"
    coverage: float = 0.5
    paste: bool = False
    box: Box | None = None
    mask: Path | None = None
    edits: Sequence[Mapping[str, Any]] = ()


def edit(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | Path,
    box: Box | str | None = None,
    mask: str | Path | None = None,
    keep: str = "outside",
    classes: Sequence[str | int] | str = (),
    words: Sequence[str] = (),
    num: int = 1,
    paste: bool = False,
    coverage: float = 0.5,
    settings: SamplingConfig | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    format: str | None = None,  # noqa: A002
    save_tokens: bool = False,
    stages: bool = False,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> EditResult:
    """Regenerate a region of images: in-painting, out-painting, and editing towards a class.

    The image's tokens stay at every scale where box or mask say so, and the model generates the rest around them: VAR's
    zero-shot editing, for any VAR or MVAR. Each image is first resized and cropped to the model's size, and box or mask
    with it. The same call again resumes an interrupted run.

        mvar.edit("a.png", "out", checkpoint="var-d16", box=(64, 64, 192, 192), classes="golden retriever")

    Arguments that are not named here are as of `sample_to`.

    * images: Image files, and folders of them.
    * box: x0, y0, x1, y1 in pixels of every image's file, also as text with commas; or give a mask.
    * mask: An image file, white inside; of an image's size, or of the model's.
    * keep: What stays: "outside" (in-painting) or "inside" (out-painting).
    * classes, words: Edit towards these; by default towards none, and so without guidance.
    * num: Variants per image and class.
    * paste: Copy the image's own pixels over what stays: bit-equal there.
    * coverage: How much of a coarse token's cell must stay for it to stay: above 0, at most 1.
    * save_tokens: Also write the tokens, and which of them stayed.

    Raises:
        MvarError: Images, region, model, settings or output do not fit together.
    """
    if (box is None) == (mask is None):
        raise ConfigError("There must be one region to edit.", "Use either --box X0,Y0,X1,Y1 or --mask FILE.")
    output = SampleOutput.of(Path(out), format, save_tokens)
    region = parse_box(box) if isinstance(box, str) else box
    towards = bool(classes or words)
    try:
        with connect(machine.device) as world, sigterm_as_interrupt():
            if not towards and settings is not None and settings.cfg and "cfg" in settings.model_fields_set:
                logging.getLogger("mvar").info("--cfg guides towards a class; without --class it has no effect.")
            check_early(world, output, overwrite)
            model = LazyModel(checkpoint, tokenizer, world, machine)
            chosen = choose_conditions(model.config, classes, words)
            resolved = resolve_settings(model.config, settings, **({} if towards else UNGUIDED))
            region_of = Regions(model.config, images, region, Path(mask) if mask is not None else None, keep, coverage)
            edits = region_of.summary()
            if dry_run:
                total = len(region_of.paths) * max(1, len(chosen.labels)) * num
                steps = (
                    f"encode {len(region_of.paths)} images, and keep their tokens where the region says so",
                    f"generate the others, {total} times in all",
                    f"write {output.target}",
                )
                return EditResult(dry_run=model.dry_run(steps, total, resolved, batch_size, edits=edits))
            fields = model.spec(chosen, num, resolved, seed, output, save_tokens, stages)
            spec = EditSpec(**fields, **region_of.spec(), paste=paste)

            def generate(indices: Sequence[int], report: Callable[[int, int], None]) -> Iterator[Samples]:
                options = {"settings": resolved, "seed": seed, "batch_size": batch_size, "stages": stages}
                return edited(model.load(), region_of, spec, indices, progress=report, **options)

            shards = SampleShards(output, spec)
            values = write_samples(world, shards, generate, overwrite, model, batch_size, progress)
            return EditResult(
                **values, keep=keep, coverage=coverage, paste=paste, box=region, mask=region_of.mask, edits=edits
            )
    except Interrupted as stop:
        return EditResult(**stop.values)


@dataclass(frozen=True)
class EditSpec(SampleSpec):
    """Everything that the bytes of edited images depend on: every image with every class, `num` times each.

    Attributes:
        images: Names of the image files, without their endings.
        inputs: Fingerprint of the image files and the mask.
        stays: For each image which tokens stay: one bit each, in hexadecimal.
    """

    images: tuple[str, ...]
    inputs: str
    box: Box | None
    keep: str
    coverage: float
    stays: tuple[str, ...]
    null_label: int
    paste: bool

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
        return np.asarray(self.classes or (self.null_label,), np.int64)[self.entries]

    @cached_property
    def known(self) -> dict[str, NDArray]:
        """Labels and, if tokens are saved, which of them stayed: bool (N, L)."""
        if not self.save_tokens:
            return {"labels": self.labels}
        bits = np.array([np.frombuffer(bytes.fromhex(text), np.uint8) for text in self.stays])
        kept = np.unpackbits(bits, axis=1, count=self.tokens).astype(bool)
        return {"labels": self.labels, "kept": kept.repeat(self.total // len(self.images), axis=0)}

    def image_of(self, index: int) -> int:
        """Which image a sample is made of."""
        return index // (self.total // len(self.images))

    def file_name(self, index: int) -> str:
        """Name of one sample's PNG: its global number, its image and, where there is one, its class."""
        label = f"_{self.condition_name(index)}" if self.classes else ""
        return f"{self.number(index)}_{self.images[self.image_of(index)]}{label}.png"


@dataclass(eq=False)
class Regions:
    """Images, and what stays of each; everything is checked before anything is sampled.

    There is a box, in pixels of every image's file, or a mask, white inside, of an image's size or of the model's.
    DataError where images or mask cannot be used, or all or nothing of an image would stay.
    """

    config: ModelConfig
    images: str | Path | Sequence[str | Path]
    box: Box | None
    mask: Path | None
    keep: str
    coverage: float

    def __post_init__(self) -> None:
        mask, images = self.mask, self.images
        named = [Path(path) for path in ([images] if isinstance(images, (str, Path)) else images)]
        self.paths = [
            path
            for given in named
            for path in ([given / name for name in find_images(given)[1]] if given.is_dir() else [given])
        ]
        inside = read_mask(mask) if mask is not None else None
        self.sizes = [check_image(path) for path in self.paths]
        # Images of one size share what stays.
        first = dict(zip(reversed(self.sizes), reversed(self.paths), strict=True))
        self._pixels = {size: self._kept(path, size, inside) for size, path in first.items()}
        self._stays = {
            size: kept_tokens(torch.from_numpy(pixels), self.config.pyramid, self.coverage)
            for size, pixels in self._pixels.items()
        }
        for size, path in first.items():
            self._require_both(path, self._stays[size])

    def pixels(self, image: int) -> Mask:
        """Where an image's pixels stay, (H, W) of the model's size."""
        return self._pixels[self.sizes[image]]

    def stays(self, image: int) -> torch.Tensor:
        """Which of an image's tokens stay, bool (L,)."""
        return self._stays[self.sizes[image]]

    def given(self, image: int) -> Pixels:
        """An image as the model sees it, uint8 (H, W, 3)."""
        return np.asarray(resize_and_crop(read_rgb(self.paths[image]), self.config.image_shape))

    def spec(self) -> dict[str, Any]:
        """Fields of an `EditSpec`."""
        packed = [np.packbits(self.stays(image).numpy()).tobytes().hex() for image in range(len(self.paths))]
        assert self.config.transformer is not None
        return {
            "images": tuple(path.stem for path in self.paths),
            "inputs": fingerprint([*self.paths, *([self.mask] if self.mask is not None else [])]),
            "box": self.box,
            "keep": self.keep,
            "coverage": self.coverage,
            "stays": tuple(packed),
            "null_label": self.config.transformer.num_classes,
        }

    def summary(self) -> list[dict[str, Any]]:
        """For every image its file, and how many tokens stay of how many at each scale."""
        pyramid = self.config.pyramid
        return [
            {
                "image": str(path),
                "kept_by_scale": [int(self.stays(image)[span].sum()) for span in pyramid.spans],
                "tokens_by_scale": [grid.tokens for grid in pyramid.grids],
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
            f"Use a mask of the image's size, or of the model's, {_size(self.config.image_shape)}.",
        )

    def _require_both(self, path: Path, stays: torch.Tensor) -> None:
        """Refuse a region that keeps everything, or nothing."""
        what = f"--mask {self.mask}" if self.mask is not None else "--box " + ",".join(map(str, self.box or ()))
        last = stays[self.config.pyramid.spans[-1]]
        height, width = self.config.image_shape
        if last.all():
            raise DataError(
                f"Nothing of {path} would change: {what} with --keep {self.keep} keeps all that the model sees of it.",
                f"The model sees its centre, resized to {_size((height, width))}; choose another region, or --keep"
                f" {'outside' if self.keep == 'inside' else 'inside'}.",
            )
        if not last.any():
            grid = self.config.pyramid.latent_grid
            raise DataError(
                f"Nothing of {path} would stay: {what} with --keep {self.keep} keeps no whole token.",
                f"One covers {_size((height // grid.height, width // grid.width))} of {_size((height, width))}; to"
                " generate without an image, use `mvar sample`.",
            )


def edited(
    pipeline: Pipeline, regions: Regions, spec: EditSpec, indices: Sequence[int], **options: Any
) -> Iterator[Samples]:
    """Edits with some global numbers, with options of `Pipeline.stream`."""
    images = [spec.image_of(index) for index in indices]
    given = lru_cache(maxsize=4)(regions.given)
    encoded = {}
    for image in dict.fromkeys(images):
        pixels = torch.from_numpy(regions.pixels(image))
        encoded[image] = pipeline.kept_tokens(from_uint8(given(image)[None]), pixels, spec.coverage)
    kept = KeptTokens(
        torch.cat([encoded[image].tokens_NL for image in images]),
        torch.cat([encoded[image].kept_NL for image in images]),
    )
    conditions = spec.conditions(indices) if spec.classes else {"labels": pipeline.null_conditions(len(indices))}
    done = 0
    for samples in pipeline.stream(**conditions, kept=kept, indices=indices, **options):
        batch = images[done : done + len(samples)]
        done += len(samples)
        if spec.paste:
            own = torch.from_numpy(np.stack([given(image) for image in batch]))
            pixels = torch.from_numpy(np.stack([regions.pixels(image) for image in batch]))
            samples = replace(samples, images=pasted(samples.images, own, pixels))
        yield samples


def parse_box(text: str) -> Box:
    """A box from text such as 64,64,192,192; ConfigError where it is not four whole numbers."""
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--box {text!r} is not four whole numbers.", "Use x0,y0,x1,y1, as in 64,64,192,192."
        ) from None
    return x0, y0, x1, y1


def _size(shape: Sequence[int]) -> str:
    """A size as image programs write it: width first."""
    return f"{shape[1]}×{shape[0]} pixels"
