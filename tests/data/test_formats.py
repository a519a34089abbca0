"""Every format of image files: recognised, upright, the first frame, and of the size that its header says."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mvar_core.data.decoding import EXTENSIONS, check_image, read_rgb
from mvar_core.data.images import open_images
from mvar_core.errors import DataError

SIZE = (48, 64)
LOSSLESS = (".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pnm", ".jp2", ".tga", ".icb", ".pcx",
            ".sgi", ".rgb", ".dds", ".qoi")  # fmt: skip
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".avif", ".gif", ".j2k", ".jpx")
GRAY = (".pgm", ".bw")
OPTIONS = {".webp": {"lossless": True}}
NAMES = {".pnm": "PPM", ".mpo": "MPO", ".jpx": "JPEG2000", ".j2k": "JPEG2000", ".dib": "DIB"}


@pytest.fixture(scope="module")
def picture(photographs) -> Image.Image:
    return Image.fromarray(photographs[0][200 : 200 + SIZE[0], 100 : 100 + SIZE[1]])


def error(found: Image.Image, expected: Image.Image) -> float:
    assert found.mode == "RGB"
    return float(np.abs(np.asarray(found, int) - np.asarray(expected.convert("RGB"), int)).mean())


@pytest.mark.parametrize("suffix", [*LOSSLESS, *LOSSY, *GRAY])
def test_a_folder_of_each_format(tmp_path, picture, suffix):
    source = picture.convert("L") if suffix in GRAY else picture
    path = tmp_path / f"IMAGE{suffix.upper()}"
    source.save(path, format=NAMES.get(suffix), **OPTIONS.get(suffix, {}))
    assert open_images(str(tmp_path)).item_names == [path.name]
    assert check_image(path) == SIZE
    assert error(read_rgb(path), source) <= (12 if suffix in LOSSY else 0)


def test_icons(tmp_path, picture):
    square = picture.crop((0, 0, 48, 48))
    for suffix in (".ico", ".icns"):
        path = tmp_path / f"icon{suffix}"
        square.save(path)
        height, width = check_image(path)
        assert read_rgb(path).size == (width, height)
    assert error(read_rgb(tmp_path / "icon.ico"), square) == 0


def test_formats_that_pillow_only_reads(tmp_path):
    red = b"\xff\x00\x00"
    files = {
        "a.xpm": b'/* XPM */\nstatic char *a[] = {\n"2 1 1 1",\n"x c #ff0000",\n"xx"\n};\n',
        "a.ras": struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + red[::-1] * 2,
        "a.psd": b"8BPS\0\1" + struct.pack(">6xHIIHH", 3, 1, 2, 8, 3) + bytes(14) + b"\xff\xff" + bytes(4),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        pixels = np.asarray(read_rgb(tmp_path / name))
        assert check_image(tmp_path / name) == pixels.shape[:2]
        assert (pixels == [255, 0, 0]).all(), name


@pytest.mark.parametrize("suffix", [".gif", ".apng", ".webp", ".tif", ".avif"])
def test_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"film{suffix}"
    frames[0].save(path, format="PNG" if suffix == ".apng" else None, save_all=True, append_images=frames[1:])
    assert error(read_rgb(path), frames[0]) < 3


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_between_header_and_pixels(tmp_path, picture, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned{suffix}"
    picture.save(path, exif=exif, **OPTIONS.get(suffix, {}))
    upright = picture.copy()
    upright.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(upright)
    found = read_rgb(path)
    assert check_image(path) == (found.height, found.width) == (upright.height, upright.width)
    assert error(found, upright) <= (12 if suffix in LOSSY else 0)


def test_16_bit_gray(tmp_path):
    values = np.linspace(0, 65535, 64 * 16).reshape(16, 64).astype(np.uint16)
    expected = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    for suffix in (".png", ".tif", ".pgm", ".jp2"):
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
        assert error(read_rgb(tmp_path / f"a{suffix}"), expected) == 0, suffix


def test_no_programs(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    for suffix in (".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".fits", ".iim", ".h5"):
        assert suffix not in EXTENSIONS
    with pytest.raises(DataError, match=r"a\.png is not an image"):
        open_images(str(tmp_path)).check()


def test_formats_without_a_signature_need_their_name(tmp_path, picture):
    for suffix in (".tga", ".ico", ".pcx", ".sgi"):
        picture.save(tmp_path / f"right{suffix}")
        wrong = (tmp_path / f"right{suffix}").rename(tmp_path / f"wrong{suffix}.png")
        with pytest.raises(DataError, match=r"wrong.*is not an image"):
            read_rgb(wrong)


def test_slow_decoders_have_smaller_limits(tmp_path):
    """QOI's is written in Python: a few bytes could keep it busy for minutes."""
    path = tmp_path / "large.qoi"
    path.write_bytes(b"qoif" + struct.pack(">IIBB", 13_000, 13_000, 3, 0) + b"\xfd" * 3_000_000 + bytes(7) + b"\1")
    with pytest.raises(DataError, match=r"large\.qoi.*13000×13000"):
        read_rgb(path, max_pixels=10**9)


def wide_jpeg(path: Path, kind: str = "JPEG") -> None:
    """An image of 181 megapixels, left half black and right half white."""
    image = Image.new("L", (16_000, 11_300), 0)
    image.paste(255, (8_000, 0, 16_000, 11_300))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, format=kind, exif=exif, quality=30)


def test_images_above_pillows_limit(tmp_path):
    path = tmp_path / "set/large.jpg"
    path.parent.mkdir()
    wide_jpeg(path)
    source = open_images(str(path.parent))
    for attempt in (source.check, lambda: source.read(0, (8, 8))):
        with pytest.raises(DataError, match=r"large\.jpg.*--max-pixels 180800000"):
            attempt()
    source = open_images(str(path.parent), max_pixels=200_000_000)
    assert source.stored_shapes() == [(16_000, 11_300)]
    found = source.read(0, (8, 8))  # upright: the upper half is black
    assert found[:3].max() < 10
    assert found[5:].min() > 245
    # Decoded at half its size, in a process of its own whose memory is measured.
    code = (
        "import resource, sys; from pathlib import Path; from mvar_core.data.decoding import read_rgb\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "image = read_rgb(Path(sys.argv[1]), max_pixels=200_000_000)\n"
        "print(image.width, image.height, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    width, height, kilobytes = map(int, run.stdout.split())
    assert (width, height) == (5650, 8000)
    if sys.platform == "linux":
        assert kilobytes * 1024 < 16_000 * 11_300 * 3  # what RGB of the whole image would take


def test_a_large_image_of_another_format_is_reduced_once_it_is_decoded(tmp_path):
    image = Image.new("L", (16_000, 11_300), 0)
    image.paste(255, (8_000, 0, 16_000, 11_300))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    found = read_rgb(lambda: io.BytesIO(file.getvalue()), "a.png", 200_000_000)
    assert found.size == (8000, 5650)
    assert found.getpixel((3999, 0)) == (0, 0, 0)
    assert found.getpixel((4000, 5649)) == (255, 255, 255)
