"""Fuzzers of everything that parses bytes from outside; `make fuzz` runs each for ten minutes."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fuzzing import damaged_bytes, damaged_tree, fuzz
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from tiny import TINY

from mvar_core.config import ModelConfig, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.config.section import validate
from mvar_core.data.decoding import FORMATS, NAMED_FORMATS, check_image, read_rgb
from mvar_core.data.evaluation_images import open_evaluation_images
from mvar_core.data.images import open_images
from mvar_core.data.tokens import MANIFEST, TokenCache
from mvar_core.data.transforms import read_mask
from mvar_core.data.vectors import read_vectors
from mvar_core.errors import LONGEST, CheckpointError, DataError, MvarError
from mvar_core.evaluation.measure import load_reference, read_features
from mvar_core.models import official
from mvar_core.models.directory import load_tokenizer, load_transformer, read_model_config

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def text_of(tree: Any) -> str:
    return json.dumps(tree, allow_nan=True)


def files_like(valid: bytes, *others: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged_bytes(valid), *others)


def json_like(tree: Any) -> st.SearchStrategy[bytes]:
    damaged = damaged_tree(tree).map(lambda value: text_of(value).encode())
    return st.one_of(damaged, damaged, damaged_bytes(text_of(tree).encode()))


def encoded(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind)
    return file.getvalue()


def read_all(source: Any) -> None:
    for index in range(min(len(source), 4)):
        source.read(index, (8, 8))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Callable[[bytes], Path]]:
    """Writes bytes to a file of this name."""

    def named(name: str) -> Callable[[bytes], Path]:
        def write(content: bytes) -> Path:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return path

        return write

    return named


@pytest.fixture
def model_copy(model: Path, tmp_path: Path) -> Path:
    """A model directory that may be damaged."""
    return shutil.copytree(model, tmp_path / "copy")


def test_fuzz_config_json(model_copy: Path) -> None:
    path = model_copy / "config.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        config = read_model_config(model_copy)
        load_transformer(model_copy, config)
        load_tokenizer(model_copy, config)

    fuzz(check, json_like(json.loads(path.read_text())))


def test_fuzz_preset(written: Any) -> None:
    write = written("preset.yaml")
    tree = load_config("digits").model_dump(mode="json", exclude_none=True)
    damaged = st.one_of(damaged_tree(TINY), damaged_tree(tree))
    as_yaml = damaged.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass"))
    plain = damaged_bytes(yaml.safe_dump(TINY).encode())
    fuzz(lambda content: load_config(str(write(content))), st.one_of(as_yaml, as_yaml, plain))


def test_fuzz_settings() -> None:
    keys = st.sampled_from([f"{section}.{key}" for section, values in TINY.items() if isinstance(values, dict)
                            for key in values] + ["patch_sizes", "image_size", "train", "x"])  # fmt: skip
    values = damaged_tree([1]).map(text_of) | st.text(max_size=12)
    fuzz(lambda pair: load_config("digits", [f"{pair[0]}={pair[1]}"]), st.tuples(keys, values))


def test_fuzz_safetensors(model_copy: Path) -> None:
    config = read_model_config(model_copy)
    for name, load in (("transformer", load_transformer), ("tokenizer", load_tokenizer)):
        path = model_copy / f"{name}.safetensors"
        valid = path.read_bytes()
        size = int.from_bytes(valid[:8], "little")
        header = json.loads(valid[8 : 8 + size])

        def with_header(tree: Any, rest: bytes = valid[8 + size :]) -> bytes:
            text = text_of(tree).encode()
            return len(text).to_bytes(8, "little") + text + rest

        def check(content: bytes, path: Path = path, load: Any = load) -> None:
            path.write_bytes(content)
            for value in load(model_copy, config).state_dict().values():
                assert value.isfinite().all()

        fuzz(check, files_like(valid, damaged_tree(header).map(with_header)), 15, share=1 / 2)
        path.write_bytes(valid)


def exported(model: Path, out: Path) -> list[Path]:
    """A model's published files: tokenizer, transformer."""
    out.mkdir()
    official.export_official(model, out)
    return sorted(out.glob("*.pth"), key=lambda path: not path.name.startswith("vae"))


TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: torch.full((16, 4), torch.nan),
    lambda: torch.full((16, 4), torch.inf),
    lambda: torch.zeros(16, 4, dtype=torch.complex64),
    lambda: torch.zeros(16, 4, dtype=torch.int64),
    lambda: torch.zeros(16, 4, dtype=torch.bool),
    lambda: torch.zeros(16, 4).to_sparse(),
    lambda: torch.empty(16, 4, device="meta"),
    lambda: torch.zeros(0, 4),
    lambda: torch.zeros(()),
    lambda: torch.zeros(1).expand(10**9),
    lambda: torch.zeros(16, 4).double(),
    lambda: "text",
    lambda: None,
    lambda: [torch.zeros(16, 4)],
)


def test_fuzz_pth(model: Path, written: Any, tmp_path: Path) -> None:
    """Published files: damaged archives, and whole ones with tensors that cannot be weights."""
    names = exported(model, tmp_path / "out")
    state = official.read_official(names[1])
    write, tokenizer = written("model.pth"), names[0]

    @st.composite
    def states(draw: st.DrawFn) -> bytes:
        damaged: dict[Any, Any] = dict(state)
        key = draw(st.sampled_from(sorted(state)))
        damaged[key] = draw(st.sampled_from(TENSORS))()
        file = io.BytesIO()
        torch.save(draw(st.sampled_from((damaged, {"mvar_wo_ddp": damaged}, {"x": {"model": damaged}}))), file)
        return file.getvalue()

    def check(content: bytes) -> None:
        path = write(content)
        converted = official.convert(path, tokenizer, patch_sizes=(1, 2, 4), windows=(0, 0, 3))
        assert converted.transformer is not None
        assert all(value.isfinite().all() for value in converted.transformer.values())

    fuzz(check, files_like(names[1].read_bytes(), states()))


def test_fuzz_images(written: Any) -> None:
    Image.init()
    suffixes = {kind: text.split()[0] for kind, text in (FORMATS | NAMED_FORMATS).items()}
    valid = [(".png", encoded("PNG", mode)) for mode in ("L", "LA", "P", "RGBA", "I;16", "1")]
    valid += [(suffix, encoded(kind, {"MSP": "1", "XBM": "1", "BLP": "P"}.get(kind, "RGB")))
              for kind, suffix in suffixes.items() if kind in Image.SAVE]  # fmt: skip
    valid += [
        (".xpm", b'/* XPM */\nstatic char *a[] = {\n"2 1 1 1",\n"x c #ff0000",\n"xx"\n};\n'),
        (".ras", struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0) + bytes(6)),
        (".psd", b"8BPS\0\1" + struct.pack(">6xHIIHH", 3, 1, 2, 8, 3) + bytes(20)),
        (".fli", struct.pack("<IHHHHHH", 300, 0xAF12, 1, 8, 8, 8, 3) + bytes(300)),
        (".pxr", b"\200\350\0\0" + bytes(412) + struct.pack("<6H", 2, 2, 0, 0, 14, 0) + bytes(800)),
        (".gbr", struct.pack(">7I", 30, 2, 2, 2, 4, 0x47494D50, 10) + b"a\0" + bytes(16)),
        (".ftc", b"FTEX" + struct.pack("<7I", 0, 2, 2, 1, 1, 1, 36) + struct.pack("<I", 12) + bytes(12)),
        (".pcd", bytes(2048) + b"PCD_" + bytes(4000)),
        (".dcx", struct.pack("<4I", 987654321, 12, 0, 0) + encoded("PCX")),
    ]

    def check(file: tuple[str, bytes]) -> None:
        path = written(f"picture{file[0]}")(file[1])
        read_rgb(path)
        read_mask(path)
        check_image(path)

    def variants(file: tuple[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
        return st.tuples(st.just(file[0]), st.one_of(st.just(file[1]), damaged_bytes(file[1])))

    fuzz(check, st.sampled_from(valid).flatmap(variants), 100)


def test_fuzz_tar(written: Any) -> None:
    write, image = written("shards/train-0.tar"), encoded("PNG")

    def packed(labels: list[tuple[str, bytes]]) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number, (kind, label) in enumerate(labels):
                for name, content in ((f"{number}.png", image), (f"{number}.{kind}", label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return file.getvalue()

    labels = st.tuples(st.sampled_from(("cls", "json")), damaged_tree({"label": 1}).map(lambda v: text_of(v).encode()))
    valid = packed([("cls", b"0"), ("json", b'{"label": 1, "class_name": "x"}'), ("cls", b"1")])
    fuzz(lambda content: read_all(open_images(str(write(content)))),
         files_like(valid, st.lists(labels, min_size=1, max_size=3).map(packed)))  # fmt: skip


def test_fuzz_class_lists(written: Any, tmp_path: Path) -> None:
    """classes.json and classes.txt next to tar files."""
    written("shards/train-0.tar")(b"")
    with tarfile.open(tmp_path / "shards" / "train-0.tar", "w") as archive:
        for name, content in (("0.png", encoded("PNG")), ("0.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    for name, files in (
        (
            "classes.json",
            st.one_of(json_like(["a", "b"]), json_like({"0": "a", "1": "b"}), json_like({"a": 0, "b": 1})),
        ),
        ("classes.txt", damaged_bytes("a\nb\nçé\n".encode())),
    ):
        write = written(f"shards/{name}")

        def check(content: bytes, write: Any = write) -> None:
            write(content)
            source = open_images(str(tmp_path / "shards"))
            assert all(isinstance(name, str) for name in source.class_names)

        fuzz(check, files, share=1 / 2)
        (tmp_path / "shards" / name).unlink()


def test_fuzz_parquet_and_arrow(written: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    image = encoded("PNG")

    def packed(kind: str, metadata: Any, labels: list[Any]) -> bytes:
        table = pyarrow.table({"image": [{"bytes": image, "path": "a.png"}] * len(labels), "label": labels})
        table = table.replace_schema_metadata({"huggingface": text_of(metadata)})
        file = io.BytesIO()
        if kind == "parquet":
            parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        return file.getvalue()

    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b"]}}}}
    labels = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3), min_size=1, max_size=3)
    for kind in ("parquet", "arrow"):
        write = written(f"{kind}/train-0.{kind}")
        damaged = st.builds(packed, st.just(kind), damaged_tree(features), labels)
        files = files_like(packed(kind, features, [0, 1, 1]), damaged)
        fuzz(lambda content, write=write: read_all(open_images(str(write(content)))), files, 20, share=1 / 2)


def test_fuzz_names_of_shards(written: Any) -> None:
    """Ranges in braces, and names that no file can have."""
    folder = written("shards/a.tar")(b"").parent
    ends = st.one_of(st.integers(-5, 10**12).map(str), st.text("0129.-", max_size=12))
    braces = st.builds("{{{}..{}}}".format, ends, ends)
    names = st.lists(st.one_of(braces, st.text(max_size=5)), min_size=1, max_size=3).map("".join)
    fuzz(lambda name: open_images(f"{folder}/{name}.tar"), names)


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


DTYPES = st.sampled_from(
    (np.uint8, np.float16, np.float32, np.float64, np.int64, np.bool_, np.complex64, "U3", "M8[s]")
)
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)


@st.composite
def odd_arrays(draw: st.DrawFn, *names: str) -> bytes:
    """An npz of arrays of any dtype and shape, some of them missing."""
    chosen = draw(st.lists(st.sampled_from(names), unique=True))
    return saved(**{name: np.zeros(draw(SHAPES), draw(DTYPES)) for name in chosen})


def test_fuzz_npz_images(written: Any) -> None:
    write = written("images.npz")

    def check(content: bytes) -> None:
        for batch in open_evaluation_images(str(write(content))).batches(2):
            assert batch.isfinite().all()

    valid = saved(arr_0=np.stack([PIXELS] * 3), labels=np.arange(3))
    fuzz(check, files_like(valid, odd_arrays("arr_0", "images", "labels", "arr_1")))


def test_fuzz_npz_references(written: Any) -> None:
    write = written("reference.npz")
    record = {"format": "mvar-reference", "set": {"extractor": "demo", "weights_hash": "x", "count": 3},
              "description": {"kind": "mvar-reference"}}  # fmt: skip

    def check(content: bytes) -> None:
        path = write(content)
        read_features(path)
        load_reference(path)

    def described(tree: Any) -> bytes:
        return saved(mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((3, 4), np.float32), record=text_of(tree))

    arrays = odd_arrays("mu", "sigma", "mu_s", "sigma_s", "record", "features", "labels")
    fuzz(check, files_like(described(record), damaged_tree(record).map(described), arrays))


def test_fuzz_vectors(written: Any) -> None:
    array = io.BytesIO()
    np.save(array, np.ones((3, 4), np.float32))
    packed = saved(vectors=np.ones((3, 2, 4), np.float32), mask=np.ones((3, 2), np.bool_), encoder="me")
    for name, files in (
        ("v.npy", damaged_bytes(array.getvalue())),
        ("v.npz", files_like(packed, odd_arrays("vectors", "mask", "encoder"))),
        ("v.safetensors", damaged_bytes(save({"vectors": torch.ones(3, 4)}, {"encoder": "me"}))),
    ):
        write = written(name)

        def check(content: bytes, write: Any = write) -> None:
            vectors, _ = read_vectors(write(content))
            assert np.isfinite(vectors).all()

        fuzz(check, files, share=1 / 3)


def test_fuzz_token_cache(tokens: Path, tmp_path: Path) -> None:
    """The manifest, and each kind of file next to it."""
    cache = shutil.copytree(tokens, tmp_path / "cache")
    manifest = json.loads((cache / MANIFEST).read_text())

    def check_file(path: Path) -> Callable[[bytes], None]:
        def check(content: bytes) -> None:
            path.write_bytes(content)
            opened = TokenCache.open(cache)
            rows = np.arange(min(len(opened), 8))
            found, labels = opened.batch(rows)
            assert int(found.max()) < opened.manifest.codebook_size
            assert 0 <= int(labels.min()) <= int(labels.max()) < len(opened.class_names)

        return check

    kinds = {path.suffix + path.name.split("-")[0]: path for path in sorted(cache.rglob("*")) if path.is_file()}
    for path in kinds.values():
        valid = path.read_bytes()
        fuzz(
            check_file(path),
            json_like(manifest) if path.name == MANIFEST else damaged_bytes(valid),
            15,
            share=1 / len(kinds),
        )
        path.write_bytes(valid)


def test_fuzz_records() -> None:
    """Configurations that arrive as values."""
    model = {key: value for key, value in TINY.items() if key in ModelConfig.model_fields}
    for section, values in ((ModelConfig, model), (RunConfig, TINY)):
        trees = damaged_tree(values).filter(lambda tree: isinstance(tree, dict))
        fuzz(lambda tree, section=section: validate(section, tree, "a record"), trees, share=1 / 2)


def test_a_value_of_any_length_makes_a_short_message() -> None:
    """Found by `test_fuzz_records`: a size of five thousand letters was quoted whole."""
    with pytest.raises(MvarError) as refused:
        validate(ModelConfig, {"image_size": "a" * 5000}, "a record")
    assert len(refused.value.message) < LONGEST
    assert len(str(DataError("x" * 10**6))) < LONGEST


def test_a_mask_of_complex_numbers_is_refused(written: Any) -> None:
    """Found by `test_fuzz_vectors`."""
    path = written("v.npz")(saved(vectors=np.zeros((1, 3, 2), np.float32), mask=np.zeros((1, 3), np.complex64)))
    with pytest.raises(DataError, match="complex64"):
        read_vectors(path)


def test_published_weights_of_too_few_axes_are_refused(model: Path, tmp_path: Path) -> None:
    """Found by `test_fuzz_pth`: sizes are inferred from shapes."""
    tokenizer, path = exported(model, tmp_path / "out")
    state = official.read_official(path)
    for name in ("word_embed.weight", "pos_1LC", "class_emb.weight", "blocks.0.attn.scale_mul_1H11"):
        for odd in (torch.zeros(()), torch.zeros(0, 4, 1, 1)):
            torch.save({**state, name: odd}, tmp_path / "odd.pth")
            with pytest.raises(CheckpointError, match=name):
                official.convert(tmp_path / "odd.pth", tokenizer, patch_sizes=(1, 2, 4))
