from __future__ import annotations

import re

import pytest
import torch
import yaml

from mvar_core.analysis.cost import cost_of
from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config, preset_names, read_preset
from mvar_core.errors import ConfigError
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import mvar_windows, paying_windows

EXPECTED = {
    "digits",
    "digits-var",
    "digits-words",
    *(f"{kind}-d{depth}-256" for kind in ("var", "mvar") for depth in (16, 20, 24, 30)),
    *(f"mvar-d{depth}-256-ft" for depth in (16, 20, 24)),
    "var-d36-512",
    "mvar-d24-512",
    "mvar-d24-1024",
    "mvar-64",
    "mvar-128",
    "tokenizer-64",
    "tokenizer-128",
    "tokenizer-256",
    "tokenizer-512",
}
TOKENIZERS = {name for name in EXPECTED if name.startswith("tokenizer-")}
OWN = {"digits", "digits-var", "digits-words", "mvar-64", "mvar-128", "tokenizer-64", "tokenizer-128"}
"""Presets for small data, of our own network."""
PUBLISHED_PARAMETERS = {"d16": 310e6, "d20": 600e6, "d24": 1.0e9, "d30": 2.0e9, "d36": 2.3e9}
PUBLISHED_FID = {
    "var-d16-256": 3.55,
    "var-d20-256": 2.95,
    "var-d24-256": 2.33,
    "var-d30-256": 1.97,
    "var-d36-512": 2.63,
    "mvar-d16-256": 3.09,
    "mvar-d16-256-ft": 3.40,
    "mvar-d20-256-ft": 2.87,
    "mvar-d24-256-ft": 2.23,
}


def test_the_folder_holds_exactly_the_promised_presets():
    assert set(preset_names()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_preset_loads_describes_itself_and_round_trips(name, tmp_path):
    config = load_config(name)
    assert config.name == name
    assert config.description.strip()
    assert config.source.strip()
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    again = load_config(str(file))
    assert again == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    fid = None if config.result is None else config.result.fid
    assert fid == PUBLISHED_FID.get(name)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_preset_builds_with_the_predicted_and_published_parameters(name):
    config = load_config(name)
    with torch.device("meta"):
        transformer = None if name in TOKENIZERS else Transformer(config)
        tokenizer = VQVAE(config.tokenizer, config.pyramid)
    predicted = cost_of(config)
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) if transformer else 0
    assert parameters == predicted.parameters
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == predicted.tokenizer_parameters
    if name in TOKENIZERS:
        assert config.transformer is None
        if name not in OWN:
            assert round(predicted.tokenizer_parameters / 1e6, 2) == 108.95
    elif name not in OWN:
        published = PUBLISHED_PARAMETERS[name.split("-")[1]]
        assert predicted.parameters == pytest.approx(published, rel=0.05)
        assert round(predicted.tokenizer_parameters / 1e6, 2) == 108.95


def test_published_sizes_hold_for_every_published_model():
    for name in EXPECTED - OWN - TOKENIZERS:
        transformer = load_config(name).transformer
        assert transformer.embed_dim == 64 * transformer.depth
        assert transformer.num_heads == transformer.depth
        assert transformer.num_classes == 1000
        assert transformer.drop_path == pytest.approx(0.1 * transformer.depth / 24, abs=1e-6)
        assert transformer.shared_adaln == (name == "var-d36-512")


def test_mvar_sees_one_scale_and_windows_the_last_ones_and_var_sees_all():
    for name in EXPECTED - TOKENIZERS:
        config = load_config(name)
        if name in ("digits", "digits-words") or name.startswith("mvar-"):
            assert config.attention.scale_prefixes == 1, name
            windows = mvar_windows(config.pyramid) if name in OWN else paying_windows(config.pyramid)
            assert config.windows == ((0, 0, 0, 3) if name.startswith("digits") else windows), name
        else:
            assert config.attention.scale_prefixes == "all", name
            assert not any(config.windows), name


def test_digits_var_differs_from_digits_in_attention_alone():
    ignored = {"name", "description", "attention"}
    assert load_config("digits").model_dump(exclude=ignored) == load_config("digits-var").model_dump(exclude=ignored)


def test_settings_without_a_published_result_say_whose_choice_they_are():
    for name in EXPECTED:
        config = load_config(name)
        if config.result is None:
            assert "our choice" in config.description, name


def test_parents_are_merged_away():
    for name in EXPECTED:
        assert "extends" not in read_preset(name)


def test_tokenizers_fit_the_models_of_their_size():
    for side, model in ((64, "mvar-64"), (128, "mvar-128"), (256, "mvar-d16-256"), (512, "mvar-d24-512")):
        tokenizer, config = load_config(f"tokenizer-{side}"), load_config(model)
        assert tokenizer.tokenizer == config.tokenizer
        assert tokenizer.pyramid == config.pyramid
        assert tokenizer.image_size == config.image_size
        assert (tokenizer.train_tokenizer.perceptual.weight > 0) == (side > 128)
        assert (tokenizer.train_tokenizer.adversarial.start > 0) == (side > 128)


def test_an_empty_name_is_no_preset():
    with pytest.raises(ConfigError, match="''"):
        load_config("")


@pytest.mark.parametrize(
    "setting",
    [
        "patch_sizes=1_2_4_8", "patch_sizes='1_2_4_8'", "train.steps=1_000", "train.steps='1_000'", "seed=1:30",
        "sampling.cfg_scales='4_9'", "sampling.cfg_schedule='1_0,1,1,1'", "attention.windows='1_1'", "train.ema='0_1'",
        "train={steps: 1, steps: 2}", "attention.scale_prefixes='1_2'", "train.optimizer.lr=nan", "sampling.cfg=inf",
        "seed=9223372036854775808", "seed=-1", "seed=1e300",
    ],
)  # fmt: skip
def test_numbers_that_could_be_misread_are_refused_by_name(setting):
    key = re.findall(r"\w+", setting.partition("=")[0])[-1]
    with pytest.raises(ConfigError, match=key):
        load_config("digits", [setting])


def test_numbers_are_what_people_write(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("extends: digits\nname: no\ntrain: {steps: 1e2, optimizer: {lr: 1e-4}, compile: false}\n")
    config = load_config(str(path), ["train_tokenizer.optimizer.lr=2e-3", "patch_sizes=1,2,8", "train.wandb=on"])
    assert (config.name, config.train.steps, config.train.optimizer.lr) == ("no", 100, 1e-4)
    assert (config.train_tokenizer.optimizer.lr, config.patch_sizes, config.train.wandb) == (2e-3, (1, 2, 8), True)
    path.write_text("extends: digits\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"own\.yaml, line 3.*seed"):
        load_config(str(path))
