"""In-painting, out-painting and class editing of given images, written to files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from typing_extensions import Unpack

from mvar_core.config import ModelConfig, SamplingConfig
from mvar_core.data.decoding import LARGEST_IMAGE, check_image, read_rgb
from mvar_core.data.folders import find_images
from mvar_core.data.transforms import Mask, box_mask, crop_kept, read_mask, resize_and_crop
from mvar_core.errors import ConfigError, DataError, shown
from mvar_core.io.files import fingerprint
from mvar_core.io.pixels import Pixels, from_uint8
from mvar_core.pipeline import Pipeline
from mvar_core.sampling.conditions import choose_conditions
from mvar_core.sampling.editing import UNGUIDED, KeptTokens, kept_pixels, kept_tokens, pasted
from mvar_core.sampling.images import Samples
from mvar_core.sampling.sampler import resolve_settings
from mvar_core.sampling.shards import SampleSpec
from mvar_core.workflows.sample import Plan, SampleJob, SampleOptions, SampleResult

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class EditResult(SampleResult):
    """What `edit` leaves behind; `edits` holds for every image its file, and how many tokens stay at each scale."""

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
    num: PositiveInt = 1,
    paste: bool = False,
    coverage: float = 0.5,
    settings: SamplingConfig | None = None,
    **options: Unpack[SampleOptions],
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
    region = parse_box(box) if isinstance(box, str) else box
    mask, towards = Path(mask) if mask is not None else None, bool(classes or words)
    edits: list[dict[str, Any]] = []

    def plan(job: SampleJob) -> Plan:
        config = job.config
        chosen = choose_conditions(config, classes, words)
        if not towards and settings is not None and settings.cfg and "cfg" in settings.model_fields_set:
            logging.getLogger("mvar").info("--cfg guides towards a class; without --class it has no effect.")
        resolved = resolve_settings(config, settings, **({} if towards else UNGUIDED))
        given = read_given(config, images, region, mask, keep, coverage, job.machine.max_pixels)
        edits.extend(image.summary(config) for image in given)
        assert config.transformer is not None
        spec = EditSpec(
            **vars(chosen),
            **job.facts(resolved),
            images=tuple(_text(Path(image.path.stem)) for image in given),
            inputs=fingerprint([*(image.path for image in given), *([mask] if mask is not None else [])]),
            box=region,
            keep=keep,
            coverage=coverage,
            stays=tuple(np.packbits(image.stays.numpy()).tobytes().hex() for image in given),
            null_label=config.transformer.num_classes,
            paste=paste,
        )

        def generate(indices: Sequence[int], report: Callable[[int, int], None]) -> Iterator[Samples]:
            return _edited(job.pipeline, given, spec, indices, progress=report, **job.options(resolved))

        steps = (
            f"encode {len(given)} images, and keep their tokens where the region says so",
            f"generate the others, {spec.total} times in all",
        )
        return Plan(spec, generate, resolved, steps, {"edits": edits, "classes": chosen.described()})

    return EditResult(**SampleJob(Path(out), checkpoint, num, **options).run(plan), edits=edits)


@dataclass(frozen=True)
class EditSpec(SampleSpec):
    """Everything that the bytes of edited images depend on: every image with every class, `num` times each.

    `images` are the files' names without their endings, `inputs` is a fingerprint of the files and the mask, and
    `stays` says for each image which tokens stay: one bit each, in hexadecimal.
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
    def groups(self) -> int:  # noqa: D102
        return len(self.images) * max(1, len(self.classes))

    @cached_property
    def entries(self) -> NDArray[np.int64]:  # noqa: D102
        return np.tile(np.repeat(np.arange(max(1, len(self.classes))), self.num), len(self.images))

    @cached_property
    def labels(self) -> NDArray[np.int64]:  # noqa: D102
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

    def subject(self, index: int) -> str:
        """The image and, where there is one, the class."""
        towards = f"_{super().subject(index)}" if self.classes else ""
        return f"{self.images[self.image_of(index)]}{towards}"


@dataclass(frozen=True)
class GivenImage:
    """An image to edit: its file, where its pixels stay (H, W) once it has the model's size, and which tokens (L,)."""

    path: Path
    pixels: Mask
    stays: torch.Tensor
    max_pixels: int

    def read(self) -> Pixels:
        """The image as the model sees it, uint8 (H, W, 3)."""
        shape = (self.pixels.shape[0], self.pixels.shape[1])
        return np.asarray(resize_and_crop(read_rgb(self.path, max_pixels=self.max_pixels), shape))

    def summary(self, config: ModelConfig) -> dict[str, Any]:
        """Its file, and how many tokens stay of how many at each scale."""
        return {
            "image": _text(self.path),
            "kept_by_scale": [int(self.stays[span].sum()) for span in config.pyramid.spans],
            "tokens_by_scale": [grid.tokens for grid in config.pyramid.grids],
        }


def read_given(
    config: ModelConfig,
    images: str | Path | Sequence[str | Path],
    box: Box | None,
    mask: Path | None,
    keep: str,
    coverage: float,
    max_pixels: int | None = None,
) -> list[GivenImage]:
    """Images, and what stays of each, from arguments of `edit`; everything is checked before anything is sampled."""
    paths: list[Path] = []
    for given in [images] if isinstance(images, (str, Path)) else images:
        path = Path(given)
        if path.is_dir() and not any(find_images(path).values()):
            raise DataError(f"{path} holds no images.", "Use an image file, or a folder of them.")
        paths += [path / name for names in find_images(path).values() for name in names] if path.is_dir() else [path]
    if not paths:
        raise DataError("--image names no image.", "Use an image file, or a folder of them.")
    largest = max_pixels or LARGEST_IMAGE
    inside = read_mask(mask, largest) if mask is not None else None
    stays: dict[tuple[int, int], tuple[Mask, torch.Tensor]] = {}  # images of one size share what stays
    found = []
    for path in paths:
        size = check_image(path, max_pixels=largest)
        if size not in stays:
            region = box_mask(box, size) if box is not None else inside
            assert region is not None
            kept = kept_pixels(torch.from_numpy(region), keep).numpy()
            if region.shape == size:
                kept = crop_kept(kept, config.image_shape)
            elif region.shape != config.image_shape:
                raise DataError(
                    f"The mask {mask} is {_size(region.shape)}, but {path} is {_size(size)}.",
                    f"Use a mask of the image's size, or of the model's, {_size(config.image_shape)}.",
                )
            stays[size] = kept, kept_tokens(torch.from_numpy(kept), config.pyramid, coverage)
            what = f"--mask {mask}" if mask is not None else "--box " + ",".join(map(str, box or ()))
            _require_both(config, path, stays[size][1], f"{what} with --keep {keep}", keep)
        found.append(GivenImage(path, *stays[size], largest))
    return found


def _require_both(config: ModelConfig, path: Path, stays: torch.Tensor, what: str, keep: str) -> None:
    """Refuse a region that keeps everything, or nothing."""
    last, grid = stays[config.pyramid.spans[-1]], config.pyramid.latent_grid
    height, width = config.image_shape
    if last.all():
        other = "outside" if keep == "inside" else "inside"
        raise DataError(
            f"Nothing of {path} would change: {what} keeps all that the model sees of it.",
            f"The model sees its centre, resized to {_size((height, width))}; use another region, or --keep {other}.",
        )
    if not last.any():
        raise DataError(
            f"Nothing of {path} would stay: {what} keeps no whole token.",
            f"One covers {_size((height // grid.height, width // grid.width))} of {_size((height, width))}; to"
            " generate without an image, use `mvar sample`.",
        )


def _edited(
    pipeline: Pipeline, given: Sequence[GivenImage], spec: EditSpec, indices: Sequence[int], **options: Any
) -> Iterator[Samples]:
    """Edits with some global numbers, with options of `Pipeline.stream`."""
    images = [spec.image_of(index) for index in indices]
    pixels_of = lru_cache(maxsize=4)(lambda image: given[image].read())
    encoded = {image: pipeline.encode(from_uint8(pixels_of(image)[None])).cpu() for image in dict.fromkeys(images)}
    tokens, stays = [encoded[image] for image in images], [given[image].stays for image in images]
    kept = KeptTokens(torch.cat(tokens), torch.stack(stays))
    conditions = spec.conditions(indices) if spec.classes else {"labels": pipeline.null_conditions(len(indices))}
    done = 0
    for samples in pipeline.stream(**conditions, kept=kept, indices=indices, **options):
        batch = images[done : done + len(samples)]
        done += len(samples)
        if spec.paste:
            own = torch.from_numpy(np.stack([pixels_of(image) for image in batch]))
            unchanged = torch.from_numpy(np.stack([given[image].pixels for image in batch]))
            samples = replace(samples, images=pasted(samples.images, own, unchanged))
        yield samples


def parse_box(text: str) -> Box:
    """A box from text such as 64,64,192,192; ConfigError where it is not four whole numbers."""
    try:
        x0, y0, x1, y1 = (int(part.replace("_", "?")) for part in text.split(","))
    except ValueError:
        problem = f"--box {shown(text)} is not four whole numbers."
        raise ConfigError(problem, "Use x0,y0,x1,y1, as in 64,64,192,192.") from None
    return x0, y0, x1, y1


def _text(path: Path) -> str:
    """A path as text that every file can hold: what is not UTF-8 in it is replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def _size(shape: Sequence[int]) -> str:
    """A size as image programs write it: width first."""
    return f"{shape[1]}×{shape[0]} pixels"
