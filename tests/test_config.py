from pathlib import Path

import pytest

from mvar_core.errors import ConfigError
from mvar_core.presets import load_config, merge, read_preset


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: digits\ntrain: {batch_size: 7, steps: 11}\n")
    config = load_config(
        str(file), ["train.steps=12", "train.batch_size=8"], {"train": {"batch_size": 9, "steps": None}}
    )
    assert (config.train.batch_size, config.train.steps) == (9, 12)
    assert config.name == "mine"
    assert config.patch_sizes == load_config("digits").patch_sizes


def test_the_result_is_frozen() -> None:
    config = load_config("digits")
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("attention.windos=3", r"unknown key 'attention.windos'. Did you mean windows\?"),
        ("trian.steps=3", "Did you mean train"),
        ("train.optimizer.lrr=3", r"Did you mean lr\?"),
        ("transformer.depth=0", "transformer.depth.*greater than or equal to 1.*found 0"),
        ("attention.windows=[0,0,0,4]", "must be odd"),
        ("attention.windows=[3,3]", "2 entries"),
        ("attention.scale_prefixes=9", "1 … 4"),
        ("attention.scale_prefixes=some", "found 'some'"),
        ("image_size=48", "48.*does not fit"),
        ("tokenizer.norm_groups=7", "does not divide"),
        ("transformer.num_heads=7", "does not divide"),
        ("train.steps", "has no value"),
        ("train.steps=[", "not a YAML value"),
    ],
)
def test_bad_settings(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config("digits", [setting])
    assert "\n" not in str(error.value)


def test_bad_presets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean digits"):
        load_config("digit")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))
    for text, message in (("a: [", "not YAML"), ("- 1", "expected a mapping"), ("extends: nothing", "no preset")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(str(file))


def test_one_window_keeps_the_windowed_scales() -> None:
    assert load_config("digits", ["attention.windows=5"]).windows == (0, 0, 0, 5)
    assert load_config("mvar-d16-256", ["attention.windows=9"]).windows == (0,) * 8 + (9, 9)
    assert load_config("var-d16-256", ["attention.windows=9"]).windows == (0,) * 8 + (9, 9)
    assert load_config("mvar-d16-256", ["attention.windows=null"]).windows == (0,) * 10


def test_merge_copies() -> None:
    base = {"a": {"b": [1], "c": 2}}
    merged = merge(base, {"a": {"c": 3}})
    merged["a"]["b"].append(2)
    assert base == {"a": {"b": [1], "c": 2}}
    assert merged == {"a": {"b": [1, 2], "c": 3}}


def test_extends_is_not_a_key() -> None:
    assert "extends" not in read_preset("digits-var")


def test_part_of_a_section_keeps_the_rest() -> None:
    changed = load_config("digits", ["train_tokenizer.optimizer.warmup=20"]).train_tokenizer.optimizer
    default = load_config("digits").train_tokenizer.optimizer
    assert changed == default.model_copy(update={"warmup": 20.0})
    assert default.schedule == "cosine"


def test_derived_values_follow_a_changed_copy() -> None:
    config = load_config("digits")
    assert config.pyramid.num_tokens == 85
    changed = config.model_copy(update={"patch_sizes": (1, 8)})
    assert changed.pyramid.num_tokens == 65
