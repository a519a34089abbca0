import os
import re
from pathlib import Path

import pytest
import torch
from golden_models import GoldenCase

from mvar_core.config.presets import load_config
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models import official
from mvar_core.models.transformer import Transformer


class Explosive:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"mvar_wo_ddp": Explosive()}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil.pth is refused.*would run code"):
        official.read_official(Path("evil.pth"))
    assert not Path("exploded").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        official.read_official(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text.pth"):
        official.read_official(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        official.read_official(tmp_path / "other.pth")


def test_keys_that_do_not_fit_are_named(golden_mvar: GoldenCase, tmp_path: Path) -> None:
    state = dict(official.read_official(golden_mvar.model))
    state["surplus"] = torch.zeros(1)
    del state["blocks.1.ffn.fc2.bias"]
    state["blocks.0.attn.q_bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as error:
        official.convert(tmp_path / "bad.pth", golden_mvar.tokenizer, **golden_mvar.options)
    for part in ("bad.pth", "missing blocks.1.ffn.fc2.bias", "unexpected surplus", "blocks.0.attn.q_bias is (5,)"):
        assert part in str(error.value)


def test_what_does_not_belong_together(golden_mvar: GoldenCase, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none of the published pyramids.*--pyramid"):
        official.convert(golden_mvar.model, golden_mvar.tokenizer)
    with pytest.raises(ConfigError, match="3 scales and 14 tokens, but the file was trained with 4 scales and 30"):
        official.convert(golden_mvar.model, golden_mvar.tokenizer, patch_sizes=(1, 2, 3))
    with pytest.raises(ConfigError, match="must be odd"):
        official.convert(golden_mvar.model, golden_mvar.tokenizer, patch_sizes=(1, 2, 3, 4), windows=4)
    with pytest.raises(ConfigError, match="2 entries"):
        official.convert(golden_mvar.model, golden_mvar.tokenizer, patch_sizes=(1, 2, 3, 4), windows=(3, 3))
    tokenizer = dict(official.read_official(golden_mvar.tokenizer))
    tokenizer["quantize.embedding.weight"] = torch.zeros(32, 16)
    torch.save(tokenizer, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="do not belong together"):
        official.convert(golden_mvar.model, tmp_path / "vae.pth", **golden_mvar.options)


@pytest.mark.parametrize("preset", ["var-d16-256", "mvar-d24-256", "var-d36-512", "mvar-d24-1024"])
def test_published_shapes_tell_the_configuration(preset: str) -> None:
    config = load_config(preset).model
    with torch.device("meta"):
        named = {official.transformer_name(name): x for name, x in Transformer(config).state_dict().items()}
        state = {name: tensor.reshape(official.published_shape(name, tensor)) for name, tensor in named.items()}
        tokenizer_state = {
            "encoder.conv_in.weight": torch.empty(160, 3, 3, 3),
            "quantize.embedding.weight": torch.empty(4096, 32),
            **{
                f"encoder.down.{level}.block.{block}.conv1.weight": torch.empty(160 * multiplier, 1, 3, 3)
                for level, multiplier in enumerate((1, 1, 2, 2, 4))
                for block in range(2)
            },
            **{f"decoder.up.0.block.{block}.conv1.weight": torch.empty(1) for block in range(3)},
            **{f"encoder.mid.block_{block}.conv1.weight": torch.empty(1) for block in (1, 2)},
            "encoder.mid.attn_1.qkv.weight": torch.empty(1),
            **{f"quantize.quant_resi.qresi_ls.{index}.weight": torch.empty(1) for index in range(4)},
        }
    kind = "var" if preset.startswith("var") else "mvar"
    inferred = official.infer_config(state, tokenizer_state, kind)
    assert inferred.patch_sizes == config.patch_sizes
    assert inferred.image_size == config.image_size
    assert inferred.tokenizer == config.tokenizer
    assert inferred.patterns == config.patterns
    assert inferred.transformer is not None
    assert config.transformer is not None
    assert inferred.class_names is not None
    assert len(inferred.class_names) == 1000
    assert inferred.class_names[207] == "golden retriever"
    training_only = {"drop_path", "gate_init", "class_dropout"}
    assert inferred.transformer.model_dump(exclude=training_only) == config.transformer.model_dump(
        exclude=training_only
    )


def test_the_tokenizer_next_to_a_model(golden_mvar: GoldenCase, tmp_path: Path) -> None:
    assert official.tokenizer_next_to(golden_mvar.model) == golden_mvar.tokenizer
    (tmp_path / "model.pth").write_bytes(golden_mvar.model.read_bytes())
    with pytest.raises(CheckpointError, match="none lies next to it"):
        official.tokenizer_next_to(tmp_path / "model.pth")
    for name in ("vae_a.pth", "vqvae_b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="2 of them lie next to it"):
        official.tokenizer_next_to(tmp_path / "model.pth")


def test_export_and_back(golden: GoldenCase, tmp_path: Path) -> None:
    converted = official.convert(golden.model, golden.tokenizer, **golden.options)
    assert converted.transformer is not None
    wrapper = "mvar_wo_ddp" if golden.is_mvar else None
    exported = official.transformer_to_official(converted.transformer, converted.config)
    official.save_official(exported, tmp_path / "m.pth", wrapper=wrapper)
    official.save_official(official.tokenizer_to_official(converted.tokenizer, converted.config), tmp_path / "vae.pth")
    again = official.convert(tmp_path / "m.pth", tmp_path / "vae.pth", **golden.options)
    assert again.transformer is not None
    assert again.config.patterns == converted.config.patterns
    for first, second in ((converted.transformer, again.transformer), (converted.tokenizer, again.tokenizer)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
        ("encoder.conv_in.weight", (3,)),
        ("encoder.conv_in.weight", (10**6, 1, 1, 1)),
        ("encoder.down.0.block.0.conv1.weight", ()),
        ("encoder.down.0.block.0.conv1.weight", (1, 1, 1, 1)),
        ("quantize.embedding.weight", (64,)),
        ("quantize.embedding.weight", (1, 32)),
        ("word_embed.weight", (0, 0)),
        ("word_embed.weight", (1, 32)),
        ("blocks.0.ffn.fc1.weight", (1, 1)),
        ("blocks.0.attn.scale_mul_1H11", (2,)),
        ("class_emb.weight", (1, 64)),
        ("pos_1LC", (30,)),
        ("lvl_embed.weight", (4,)),
        ("blocks.100000.attn.q_bias", (64,)),
    ],
)
def test_shapes_that_cannot_be_are_refused_with_the_files_name(
    name: str, shape: tuple[int, ...], golden_mvar: GoldenCase, tmp_path: Path
) -> None:
    files = {"model.pth": golden_mvar.model, "vae.pth": golden_mvar.tokenizer}
    for file, source in files.items():
        state = official.read_official(source)
        if name in state or (name.startswith("blocks") and file == "model.pth"):
            state[name] = torch.zeros(shape)
        torch.save(state, tmp_path / file)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(str(tmp_path))) as error:
        official.convert(tmp_path / "model.pth", tmp_path / "vae.pth", **golden_mvar.options)
    assert len(str(error.value)) < 1000
