"""From an image file's bytes to upright RGB pixels, and the cheap look whether a file is whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from os.path import splitext
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mvar_core.errors import DataError
from mvar_core.untrusted import open_regular

FORMATS = {
    "PNG": ".png .apng", "JPEG": ".jpg .jpeg .jpe .jfif", "MPO": ".mpo", "WEBP": ".webp", "BMP": ".bmp", "DIB": ".dib",
    "TIFF": ".tif .tiff", "GIF": ".gif", "PPM": ".ppm .pgm .pbm .pnm .pfm", "AVIF": ".avif .avifs", "ICNS": ".icns",
    "JPEG2000": ".jp2 .j2k .jpc .jpf .jpx .j2c", "DDS": ".dds", "QOI": ".qoi", "PSD": ".psd", "XPM": ".xpm",
    "SUN": ".ras", "BLP": ".blp",
}  # fmt: skip
"""What Pillow may recognise in a file's content, whatever its name says, and how such files usually end: raster formats
that it decodes itself; of several frames, the first.

Left to itself it would also open EPS, which it hands to Ghostscript: a program from a stranger's file would run. IPTC
opens what it contains, as whatever that is; compressed FITS has no bounds."""

NAMED_FORMATS = {
    "TGA": ".tga .icb .vda .vst", "ICO": ".ico", "CUR": ".cur", "PCX": ".pcx", "DCX": ".dcx", "MSP": ".msp",
    "SGI": ".sgi .rgb .rgba .bw", "FLI": ".fli .flc", "PCD": ".pcd", "PIXAR": ".pxr", "GBR": ".gbr",
    "FTEX": ".ftc .ftu", "XBM": ".xbm",
}  # fmt: skip
"""Formats with little or no signature, which would make images of damaged files: their names must end so, too."""

EXTENSIONS = tuple(" ".join([*FORMATS.values(), *NAMED_FORMATS.values()]).split())

LARGEST_FILE = 2**30
LARGEST_IMAGE = 178_956_970
"""Pixels, Pillow's own limit for images that are not attacks. Larger ones are read where `max_pixels` allows them, at a
reduced size and one at a time."""
LARGEST_QOI = 2**25
"""Pixels: the decoder is written in Python, and 62 of them fit into a byte."""
LONGEST_SHAPE = 200
"""How many times longer than the other a side may be: the shorter side is brought to the model's size."""
MOST_SCANS = 100
"""Passes over all pixels in a progressive JPEG; encoders write about ten, and a few bytes are enough for one more."""

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)
_one_large_image = Lock()

Opener = Callable[[], IO[bytes]]
"""Opens an image file wherever it is stored: on its own, within an archive, or in memory."""


def read_rgb(file: Path | Opener, where: str | None = None, max_pixels: int = LARGEST_IMAGE) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    The EXIF orientation is applied; gray, palette and CMYK images are converted; transparent regions become white;
    16-bit gray is scaled to 8 bits. An image of more than `LARGEST_IMAGE` pixels is returned at a half, a quarter or an
    eighth of its size, and decoded so where its format can (JPEG, JPEG 2000).

    `file` is a path, or what opens one, and `where` what messages call it. DataError where it is missing, damaged, of
    more than `max_pixels`, or not an image.
    """
    with _opened(file, where, max_pixels) as (image, content):
        factor = _reduction(image)
        _load(image, content)
        ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies what is upright
        picture = _to_rgb(image, image.format)
        return picture.reduce(factor) if _reduction(picture) > 1 else picture


def check_image(file: Path | Opener, where: str | None = None, max_pixels: int = LARGEST_IMAGE) -> tuple[int, int]:
    """Height and width of an image file as it will be shown, from its header; a file cut off short is noticed too.

    The arguments and errors are those of `read_rgb`.
    """
    with _opened(file, where, max_pixels) as (image, content):
        width, height = image.size
        place = content.tell()
        whole = _has_its_end(content, image.format)
        content.seek(place)
        if not whole:
            _load(image, content)
            if image.format in ("ICO", "CUR", "ICNS"):  # the image within may have another size than its directory says
                width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF data behind the pixels; what comes before them is enough here.
        has_exif = image.format != "PNG" or "exif" in image.info
        # A TIFF's size is that of the image upright; its orientation is gone once it is loaded.
        if has_exif and image.getexif().get(_ORIENTATION) in _SWAPS_SIDES:
            width, height = height, width
    return height, width


@cache
def _formats(suffix: str) -> tuple[str, ...]:
    """What a file with this suffix may hold, of the formats that this build of Pillow has."""
    Image.init()
    named = (name for name, suffixes in NAMED_FORMATS.items() if suffix in suffixes.split())
    return tuple(name for name in (*FORMATS, *named) if name in Image.OPEN)


@contextmanager
def _opened(file: Path | Opener, where: str | None, max_pixels: int) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    where = where or str(file)
    if max_pixels > LARGEST_IMAGE:  # the only limit that Pillow knows is one for all of its users
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        content = open_regular(file) if isinstance(file, Path) else file()
        with content:
            if content.seek(0, 2) > LARGEST_FILE:
                raise ValueError(f"it has {content.tell():,} bytes")
            content.seek(0)
            suffix = splitext(where)[1].lower()  # of a row of a table it is that of no image
            with Image.open(content, formats=_formats(suffix if suffix in EXTENSIONS else "")) as image:
                short, long = sorted(image.size)
                limit = min(max_pixels, LARGEST_QOI) if image.format == "QOI" else max_pixels
                if short * long > limit or long > LONGEST_SHAPE * short:
                    is_final = long > LONGEST_SHAPE * short or limit < max_pixels
                    hint = "" if is_final else f", or allow it: --max-pixels {short * long}"
                    problem = f"{where} cannot be read as an image: it has {image.width}×{image.height} pixels."
                    raise DataError(problem, f"Remove it{hint}.")
                with _one_large_image if _reduction(image) > 1 else nullcontext():
                    yield image, content
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{where} is not an image in a format that mvar reads, whatever its name says.", "Remove or replace it."
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything when given damaged bytes.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} cannot be read as an image: {reason}.", "Remove or replace it.") from None


def _reduction(image: Image.Image) -> int:
    """By how much the sides of an image are divided, so that it takes no more memory than ordinary ones."""
    pixels = math.prod(image.size)
    return (
        1 if pixels <= LARGEST_IMAGE else 2 if pixels <= 4 * LARGEST_IMAGE else 4 if pixels <= 16 * LARGEST_IMAGE else 8
    )


def _load(image: Image.Image, content: IO[bytes]) -> None:
    """Decode the pixels, unless that would take long beyond measure; at a reduced size where that is needed."""
    factor = _reduction(image)
    if image.format in ("JPEG", "MPO"):
        place = content.tell()
        content.seek(0)
        scans = content.read().count(b"\xff\xda")
        content.seek(place)
        if scans > MOST_SCANS:
            raise ValueError(f"it has {scans} scans")
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
    elif image.format == "JPEG2000" and factor > 1:
        image.reduce = factor.bit_length() - 1  # type: ignore[method-assign,assignment]
    image.load()


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # no more than 16 bits
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
    if kind not in _ENDS:
        return False
    size = file.seek(0, 2)
    file.seek(max(0, size - 64))
    return _ENDS[kind] in file.read()
