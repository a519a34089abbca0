"""Files made to harm and files broken by accident: each is refused by name, quickly, and runs nothing."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.data.images import open_images, pixel_batches
from mvar_core.data.shards import expand_braces
from mvar_core.data.transforms import read_mask
from mvar_core.errors import DataError, MvarError

SECONDS = 10


def encoded(kind: str, size: tuple[int, int] = (8, 8), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(file, format=kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    content = encoded("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 5000 + b"\xff\xd9"


IMAGES: dict[str, bytes] = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (w) file\n%%EOF\n",
    "binary eps": b"\xc5\xd0\xd3\xc6" + bytes(40),
    "postscript": b"%!PS\nshowpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "emf": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "tga": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HH", 8, 8) + bytes([24, 0]) + bytes(192),
    "empty": b"",
    "zeros": bytes(1000),
    "noise": np.random.default_rng(0).bytes(1000),
    "pickle": b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.",
    "png of a billion pixels": png_of(32_000, 32_000),
    "png of no pixels": png_of(0, 0),
    "png of a line": png_of(1, 100_000),
    "png larger than numbers": png_of(2**31 - 1, 2**31 - 1),
    "png without pixels": png_of(100, 100),
    "jpeg of many scans": many_scans(),
    "bmp of negative sizes": encoded("BMP")[:18] + struct.pack("<ii", -8, -8) + encoded("BMP")[26:],
    "bmp of huge sizes": encoded("BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + encoded("BMP")[26:],
    "ppm of no pixels": b"P6 0 0 255\n",
    "ppm of huge sizes": b"P6 99999999 99999999 255\n",
    "ppm with a sign": b"P6 -8 8 255\n" + bytes(192),
    "tiff that leads to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "tiff of tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(300),
    "gif of nothing": b"GIF89a\xff\xff\xff\xff\0\0\0;",
    "webp of nothing": b"RIFF\x10\0\0\0WEBPVP8X" + bytes(20),
    "avif of nothing": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
    "jpeg 2000 of nothing": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
    **{
        f"half a {kind}": encoded(kind, (64, 64))[:-30] for kind in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
    },
}


def refused(act: Callable[[], object], named: str = ".") -> None:
    start = time.monotonic()
    with pytest.raises(MvarError, match=named) as failure:
        act()
    assert time.monotonic() - start < SECONDS
    assert len(str(failure.value)) < 3000
    assert "\n" not in str(failure.value)


def whole_or_refused(act: Callable[[], object], named: str) -> None:
    start = time.monotonic()
    try:
        act()
    except DataError as error:
        if named not in str(error):
            raise
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("kind", IMAGES)
def test_images(tmp_path, kind):
    path = tmp_path / "0.png"
    path.write_bytes(IMAGES[kind])
    source = open_images(str(tmp_path))
    refused(lambda: source.read(0, (16, 16)), r"0\.png")
    refused(lambda: read_mask(path), r"0\.png")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(path, "0.png")
    shards = open_images(str(tmp_path / "0.tar"))
    refused(lambda: shards.read(0, (16, 16)), r"0\.tar: 0\.png")


def test_files_that_are_not_regular(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    (tmp_path / "in/absent.png").symlink_to("nowhere")
    (tmp_path / "in/device.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "in/pipe.png")
    source = open_images(str(tmp_path))
    assert len(source) == 4
    assert len(source.fingerprint()) == 64
    for index in range(4):
        refused(lambda index=index: source.read(index, (8, 8)), r"in/\w+\.png")
    refused(source.check, r"in/\w+\.png")
    for name in ("pipe.tar", "pipe.parquet", "pipe.npz"):
        os.mkfifo(tmp_path / name)
        refused(lambda name=name: open_evaluation_images(str(tmp_path / name)), "pipe")
        refused(lambda name=name: open_images(f"{tmp_path}/{{{name}}},{name}"), "pipe")
    refused(lambda: read_mask(tmp_path / "in/pipe.png"), "pipe")


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 100_000, "a\0b", "", ".", "~nobody/x", "/dev/null", "/dev/zero", "/proc/self/mem"]
)
def test_names_of_data(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: open_images(name))
    refused(lambda: open_evaluation_images(name))


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/set/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder) + "/1.png").write_bytes(encoded("PNG"))
    refused(lambda: open_images(str(tmp_path / "set")), r"caf.*Rename")
    refused(lambda: open_images(os.fsdecode(folder)), r"caf.*Rename")


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(encoded("PNG"))
    scandir = os.scandir

    def forbidden(path: str) -> object:
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # root, who may run the tests, may read everything
    refused(lambda: open_images(str(tmp_path)), "Permission denied")


@pytest.mark.parametrize(
    "pattern",
    ["{000..999999999}.tar", "{1..99999}{1..99999}.tar", "{a,b}" * 5000 + ".tar", "{0.." + "9" * 5000 + "}.tar"],
)
def test_patterns_that_name_too_much(pattern):
    refused(lambda: expand_braces(pattern))
    refused(lambda: open_images(pattern))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def labelled(label: bytes, extension: str = "cls") -> bytes:
    return tar_of(("0.png", encoded("PNG")), (f"0.{extension}", label))


def with_size(size: bytes, kind: bytes = b"0") -> bytes:
    """A tar whose first header claims a size, which twelve bytes hold."""
    header = bytearray(tar_of(("0.png", encoded("PNG"))))
    header[124:136] = size
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


TARS: dict[str, bytes] = {
    "a billion classes": labelled(b"1000000000"),
    "a class of many digits": labelled(b"9" * 15),
    "a negative class": labelled(b"-1"),
    "a label that is an image": labelled(encoded("PNG")),
    "a long label": labelled(b"x" * 2**25),
    "deep json": labelled(b"[" * 100_000, "json"),
    "json with a key twice": labelled(b'{"label": 1, "label": 2}', "json"),
    "a huge json number": labelled(b'{"label": 1' + b"0" * 5000 + b"}", "json"),
    "json that is not utf-8": labelled(b"\xff\xfe{}", "json"),
    "a size beyond the file": with_size(b"77777777777\0"),
    "a negative size": with_size(b"\xff" * 12),
    "a negative size that leads back": with_size(b"\xff" * 10 + b"\xfe\x00"),
    "a huge size": with_size(b"\x80" + b"\xff" * 11),
    "a long name": with_size(b"77777777777\0", b"L"),
    "a long pax header": with_size(b"77777777777\0", b"x"),
    "many long names": (tar_of(("x", b""))[:156] + b"L" + tar_of(("x", b""))[157:512]) * 3000,
    "a link": with_size(b"00000000000\0", b"2"),
    "a device": with_size(b"00000000000\0", b"3"),
    "a sparse file": with_size(b"00000000000\0", b"S"),
    "zeros": bytes(10240),
    "noise": np.random.default_rng(0).bytes(10240),
    "a zip": b"PK\x03\x04" + bytes(10240),
}


@pytest.mark.parametrize("kind", TARS)
def test_tars(tmp_path, kind):
    (tmp_path / "0.tar").write_bytes(TARS[kind])
    refused(lambda: open_images(str(tmp_path / "0.tar")), r"0\.tar")


def test_a_name_in_a_tar_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(tar_of(("../../out.png", encoded("PNG")), ("/abs.png", encoded("PNG"))))
    source = open_images(str(tmp_path / "in/0.tar"))
    assert source.read(1, (8, 8)).shape == (8, 8, 3)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "in"]


@pytest.mark.parametrize(
    "content",
    ["{", "[" * 100_000, '{"a": [1]}', '{"x": "y"}', "3", '["a", {}]', '{"0": "a", "0": "b"}', b"\xff\xfe", "[1e999]"],
)
def test_lists_of_classes(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(labelled(b"0"))
    (tmp_path / "classes.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: open_images(str(tmp_path / "0.tar")), r"classes\.json")


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


def described(shape: str, dtype: str = "|u1", order: bool = False) -> bytes:
    return npy(f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}}}\n".encode(), bytes(48))


NPZS: dict[str, bytes] = {
    "images of no pixels": described("(1000000000, 0, 0, 3)"),
    "images without height": described("(4, 0, 8, 3)"),
    "no images": described("(0, 4, 4, 3)"),
    "negative sizes": described("(-1, 4, 4, 3)"),
    "a billion images": described("(1000000000, 1, 1, 3)"),
    "more than exist": described("(99999999999999999999, 4, 4, 3)"),
    "objects": described("(1, 4, 4, 3)", "|O"),
    "a pickle": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", b"cos\nsystem\n(S'touch ran'\ntR."),
    "floats": described("(1, 4, 4, 3)", "<f4"),
    "booleans as sizes": described("(True, 4, 4, 3)"),
    "a deep header": npy(b"(" * 9000 + b")" * 9000 + b"\n"),
    "a long header": npy(b" " * 2**25, version=b"\x02\x00"),
    "a header beyond the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "another version": npy(b"{}", version=b"\x09\x09"),
    "code": npy(b"__import__('os').system('touch ran')\n"),
    "no numpy": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", NPZS)
def test_npzs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile("a.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", NPZS[kind])
        refused(lambda: list(open_evaluation_images("a.npz").batches()), r"a\.npz")
    assert not Path("ran").exists()


def test_damaged_npzs(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(content), 3):
            content[place] = random.integers(256)
        path.write_bytes(content[: random.integers(1, len(content) + 1)])
        whole_or_refused(lambda: list(open_evaluation_images(str(path)).batches()), "a.npz")


def test_parquet_with_odd_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    image, path = encoded("PNG"), tmp_path / "a.parquet"
    odd = [
        [[1, 2]], [1.5], [float("nan")], [b"\xff"], [{"x": 1}], ["1" * 30], [10**15], [-(10**15)], [True], [None], [""],
        pyarrow.array([10**18], pyarrow.timestamp("ns")), pyarrow.array(["x"]).dictionary_encode(),
        pyarrow.array([2**64 - 1], pyarrow.uint64()), pyarrow.nulls(1),
    ]  # fmt: skip
    for label in odd:
        parquet.write_table(pyarrow.table({"image": [{"bytes": image}], "label": label}), path)
        whole_or_refused(lambda: open_images(str(path)).read(0, (8, 8)), "a.parquet")
    columns = [
        {"image": [1]}, {"image": ["text"]}, {"image": [{"bytes": 1}]}, {"image": [{"bytes": "text"}]},
        {"image": [{"bytes": None}]}, {"image": [[image]]}, {"image": [{"bytes": [1]}]}, {"image": []}, {"label": [1]},
        {"image": [{"bytes": {"bytes": image}}]}, {"image": pyarrow.nulls(1)},
    ]  # fmt: skip
    for values in columns:
        parquet.write_table(pyarrow.table(values), path)
        refused(lambda: open_images(str(path)).read(0, (8, 8)), r"a\.parquet")
    for metadata in (
        b"{",
        b"[" * 9999,
        b"[]",
        b'{"info": 1}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
        b"\xff",
    ):
        made = pyarrow.table({"image": [{"bytes": image}], "label": [0]}).replace_schema_metadata(
            {"huggingface": metadata}
        )
        parquet.write_table(made, path)
        assert open_images(str(path)).class_names == ("0",)
    packed = pyarrow.table({"image": pyarrow.nulls(10**7, pyarrow.struct([("bytes", pyarrow.binary())]))})
    parquet.write_table(packed, path)
    refused(lambda: open_images(str(path)), r"a\.parquet claims to have 10,000,000 rows")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_damaged_shards(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        path.write_bytes(
            tar_of(*((f"{n}.{e}", c) for n in range(3) for e, c in (("png", encoded("PNG")), ("cls", b"0"))))
        )
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        table = pyarrow.table({"image": [{"bytes": encoded("PNG"), "path": "x"}] * 3, "label": [0, 1, 0]})
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        content = bytearray(whole)
        for place in random.integers(0, len(content), random.integers(1, 6)):
            content[place] = random.integers(256)
        path.write_bytes(content[: random.integers(1, len(content) + 1)] if random.random() < 0.3 else content)
        whole_or_refused(lambda: list(pixel_batches(open_images(str(path)), (8, 8))), path.name)
