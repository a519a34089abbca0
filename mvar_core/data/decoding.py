"""From an image file's bytes to upright RGB pixels, and the cheap look whether a file is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mvar_core.errors import DataError
from mvar_core.untrusted import open_regular

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may recognise in a file's content, whatever its name says: raster formats that it decodes itself.

Left to itself it would also open EPS, which it hands to Ghostscript: a program from a stranger's file would run.
Formats without a signature, such as TGA, would make images of damaged files.
"""

LARGEST_FILE = 2**30
LARGEST_IMAGE = 178_956_970
"""Pixels, Pillow's own limit for images that are not attacks."""
LONGEST_SHAPE = 200
"""How many times longer than the other a side may be: the shorter side is brought to the model's size."""
MOST_SCANS = 100
"""Passes over all pixels in a progressive JPEG; encoders write about ten, and a few bytes are enough for one more."""

_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)

Opener = Callable[[], IO[bytes]]
"""Opens an image file wherever it is stored: on its own, within an archive, or in memory."""


def read_rgb(file: Path | Opener, where: str | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    The EXIF orientation is applied; gray, palette and CMYK images are converted; transparent regions become white;
    16-bit gray is scaled to 8 bits.

    Args:
        file: The file's path, or what opens it.
        where: What messages call the file; its path by default.

    Raises:
        DataError: The file is missing, damaged, or not an image.
    """
    with _opened(file, where) as (image, content):
        _load(image, content)
        return _to_rgb(ImageOps.exif_transpose(image), image.format)


def check_image(file: Path | Opener, where: str | None = None) -> tuple[int, int]:
    """Height and width of an image file as it will be shown, from its header; a file cut off short is noticed too.

    The arguments and errors are those of `read_rgb`.
    """
    with _opened(file, where) as (image, content):
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF data behind the pixels; what comes before them is enough here.
        has_exif = image.format != "PNG" or "exif" in image.info
        if has_exif and image.getexif().get(_ORIENTATION) in _SWAPS_SIDES:
            width, height = height, width
        place = content.tell()
        whole = _has_its_end(content, image.format)
        content.seek(place)
        if not whole:
            _load(image, content)
    return height, width


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(file: Path | Opener, where: str | None) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    try:
        content = open_regular(file) if isinstance(file, Path) else file()
        with content:
            if content.seek(0, 2) > LARGEST_FILE:
                raise ValueError(f"it has {content.tell():,} bytes")
            content.seek(0)
            with Image.open(content, formats=_formats()) as image:
                short, long = sorted(image.size)
                if short * long > LARGEST_IMAGE or long > LONGEST_SHAPE * short:
                    raise ValueError(f"it has {image.width}×{image.height} pixels")
                yield image, content
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{where or file} is not an image in a format that mvar reads, whatever its name says.",
            "Remove or replace it.",
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything when given damaged bytes.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where or file} cannot be read as an image: {reason}.", "Remove or replace it.") from None


def _load(image: Image.Image, content: IO[bytes]) -> None:
    """Decode the pixels, unless that would take long beyond measure."""
    if image.format in ("JPEG", "MPO"):
        place = content.tell()
        content.seek(0)
        scans = content.read().count(b"\xff\xda")
        content.seek(place)
        if scans > MOST_SCANS:
            raise ValueError(f"it has {scans} scans")
    image.load()


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # PNG has no more than 16 bits
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode!r}; convert it to 8 or 16 bits a channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _has_its_end(file: IO[bytes], kind: str | None) -> bool:
    """Whether the file surely ends as its format says; where that cannot be told cheaply, the answer is no."""
    marker = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if marker is None:
        return False
    size = file.seek(0, 2)
    file.seek(max(0, size - 64))
    return marker in file.read()
