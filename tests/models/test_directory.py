import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvar_core import Pipeline
from mvar_core.config import Machine
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models.directory import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    load_tokenizer,
    load_transformer,
    read_model_config,
    tokenizer_hash,
)


@pytest.fixture
def copy(mvar_directory: Path, tmp_path: Path) -> Path:
    Pipeline.from_pretrained(mvar_directory, device="cpu").save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_is_the_same_model(mvar_directory: Path, copy: Path) -> None:
    assert {path.name for path in copy.iterdir()} == {CONFIG_FILE, TRANSFORMER_FILE, TOKENIZER_FILE, "README.md"}
    for file in (TRANSFORMER_FILE, TOKENIZER_FILE):
        first, second = load_file(mvar_directory / file), load_file(copy / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert tokenizer_hash(copy) == tokenizer_hash(mvar_directory)
    config = json.loads((copy / CONFIG_FILE).read_text())
    assert config["patch_sizes"] == [1, 2, 3, 4]
    assert config["attention"] == {"scale_prefixes": 1, "windows": [0, 0, 3, 3]}
    assert config["provenance"]["tokenizer_hash"] == tokenizer_hash(copy)


def test_a_config_that_was_written_before_min_p_loads(copy: Path) -> None:
    values = json.loads((copy / CONFIG_FILE).read_text())
    del values["sampling"]["min_p"]
    (copy / CONFIG_FILE).write_text(json.dumps(values))
    assert read_model_config(copy).sampling.min_p == 0


def test_the_hash_follows_the_values(copy: Path) -> None:
    before = tokenizer_hash(copy)
    state = load_file(copy / TOKENIZER_FILE)
    save_file(dict(reversed(state.items())), copy / TOKENIZER_FILE, metadata={"any": "thing"})
    assert tokenizer_hash(copy) == before
    state["quantizer.codebook"][3, 2] += 1e-3
    save_file(state, copy / TOKENIZER_FILE)
    assert tokenizer_hash(copy) != before


def test_half_precision_loads_into_the_same_places(copy: Path) -> None:
    config = read_model_config(copy)
    exact, half = load_transformer(copy, config), load_transformer(copy, config, dtype=torch.bfloat16)
    for name, tensor in half.state_dict().items():
        expected = exact.state_dict()[name]
        assert tensor.dtype == (torch.float32 if name.startswith("head") else torch.bfloat16)
        assert torch.equal(tensor, expected.to(tensor.dtype))
    assert not any(parameter.requires_grad for parameter in half.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.weight"), "missing head.weight"),
        (lambda state: state.update(surplus=torch.zeros(1)), "unexpected surplus"),
        (
            lambda state: state.update({"head.bias": torch.zeros(7)}),
            r"wrong shape: head.bias is \(7,\), expected \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy: Path, change: object, message: str) -> None:
    state = load_file(copy / TRANSFORMER_FILE)
    change(state)  # type: ignore[operator]
    save_file(state, copy / TRANSFORMER_FILE)
    with pytest.raises(CheckpointError, match=message) as error:
        Pipeline.from_pretrained(copy, device="cpu", verify=False)
    assert str(copy / TRANSFORMER_FILE) in str(error.value)


def test_damaged_directories(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a model directory"):
        Pipeline.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Pipeline.from_pretrained(tmp_path / "empty")
    whole = (copy / TOKENIZER_FILE).read_bytes()
    (copy / TOKENIZER_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_tokenizer(copy, read_model_config(copy), verify=False)
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps({**config, "patch_size": [1]}))
    with pytest.raises(CheckpointError, match="Did you mean patch_sizes"):
        read_model_config(copy)


def test_a_tokenizer_alone(copy: Path) -> None:
    (copy / TRANSFORMER_FILE).unlink()
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps({**config, "transformer": None}))
    pipeline = Pipeline.from_pretrained(copy, device="cpu")
    tokens = pipeline.encode(torch.zeros(1, 3, 64, 64))
    assert pipeline.decode(tokens).shape == (1, 3, 64, 64)
    with pytest.raises(CheckpointError, match="without a transformer"):
        pipeline.sample([0])
    with pytest.raises(CheckpointError, match="holds a tokenizer but no transformer"):
        load_transformer(copy, pipeline.config)


def test_weights_are_compared_with_what_was_saved(copy: Path) -> None:
    path = copy / TRANSFORMER_FILE
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="--no-verify") as error:
        Pipeline.from_pretrained(copy, device="cpu")
    assert str(path) in str(error.value)
    assert Pipeline.from_pretrained(copy, device="cpu", verify=False).transformer is not None
    config = json.loads((copy / CONFIG_FILE).read_text())
    del config["provenance"]["sha256"]  # as directories were that older versions wrote
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    assert Pipeline.from_pretrained(copy, device="cpu").transformer is not None


@pytest.mark.parametrize(
    "change",
    [
        {"transformer": {"depth": 100_000}},
        {"transformer": {"embed_dim": 10**12, "num_heads": 1}},
        {"transformer": {"num_classes": 10**10}},
        {"transformer": {"mlp_ratio": 1e300}},
        {"transformer": {"mlp_ratio": 1e-9}},
        {"tokenizer": {"codebook_size": 2**40}},
        {"tokenizer": {"channel_multipliers": [1] * 60}},
        {"tokenizer": {"channel_multipliers": []}},
        {"tokenizer": {"encoder_blocks": 10**6}},
        {"tokenizer": {"residual_convs": 10**9}},
        {"patch_sizes": [1, 10**9]},
        {"patch_sizes": [1, 2**70]},
        {"patch_sizes": list(range(1, 17)) * 1000 + [16]},
        {"patch_sizes": [[1, 1], [1, 10**6]]},
        {"image_size": 10**9},
        {"image_size": [10**300, 8]},
        {"conditioning": {"kind": "vector", "dim": 10**9}},
        {"attention": {"windows": [10**400, 3, 3, 3]}},
    ],
    ids=lambda change: str(change)[:60],
)
def test_sizes_that_cannot_exist_are_refused_at_once(copy: Path, change: dict[str, object]) -> None:
    values = json.loads((copy / CONFIG_FILE).read_text())
    for section, value in change.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    (copy / CONFIG_FILE).write_text(json.dumps(values))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=re.escape(str(copy))) as error:
        Pipeline.from_pretrained(copy)
    assert time.monotonic() - start < 5
    assert len(str(error.value)) < 1000


def test_devices_and_dtypes_of_torch_are_accepted(copy: Path) -> None:
    pipeline = Pipeline.from_pretrained(copy, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert pipeline.transformer.blocks[0].mlp.up.weight.dtype == torch.bfloat16
    assert Machine(device=torch.device("cuda", 1), dtype=torch.float16) == Machine(device="cuda:1", dtype="float16")
    with pytest.raises(ConfigError, match="int8"):
        Pipeline.from_pretrained(copy, device="cpu", dtype=torch.int8)
