import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvar_core import Pipeline
from mvar_core.errors import CheckpointError
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
        Pipeline.from_pretrained(copy, device="cpu")
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
        load_tokenizer(copy, read_model_config(copy))
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
