import os
import re
import time
from pathlib import Path

import pytest

from mvar_core.config.presets import load_config, merge, read_preset
from mvar_core.errors import ConfigError
from mvar_core.pyramid import ScalePyramid, paying_windows


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
        ("image_size=50", "50×50 does not fit.*multiples of 4"),
        ("image_size=32x", "'32x' is not a size"),
        ("patch_sizes=[1,2]", "image_size 32 does not fit: the last scale 2×2"),
        ("patch_sizes=1,a", "'a' is not a size"),
        ("patch_sizes=null", "not a list of sizes"),
        ("attention.windows=some", "'some'; expected one number"),
        ("attention.windows=auto:4", "must be odd"),
        ("tokenizer.norm_groups=7", "does not divide"),
        ("transformer.num_heads=7", "does not divide"),
        ("train.steps", "has no value"),
        ("train.steps=[", "is not YAML"),
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


def test_presets_that_are_no_configuration(tmp_path: Path) -> None:
    """Each is refused at once, and the message names the file."""
    bomb = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    contents = {
        "latin": "name: caf\u00e9".encode("latin-1"),
        "itself": f"extends: {tmp_path / 'itself.yaml'}".encode(),
        "circle": f"extends: {tmp_path / 'other.yaml'}".encode(),
        "other": f"extends: {tmp_path / 'circle.yaml'}".encode(),
        "number": b"extends: 3",
        "nested": b"[" * 10_000,
        "bomb": "\n".join(bomb).encode(),
        "tag": b"name: !!python/object/apply:os.system [touch /tmp/never]",
        "zero": b"name: \0",
        "twice": b"seed: 1\nseed: 2",
        "list": b"train: [1, 2]",
    }
    paths = [tmp_path / f"{name}.yaml" for name in (*contents, "directory", "pipe", "away")]
    for path, content in zip(paths, contents.values(), strict=False):
        path.write_bytes(content)
    (tmp_path / "directory.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    began = time.process_time()
    for path in paths:
        with pytest.raises(ConfigError, match=re.escape(str(path))) as error:
            load_config(str(path))
        assert len(str(error.value)) < 1000
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "value", ["!!python/object:os.system x", "&a [*a]", "[" * 10_000, "{a: {b: [}", "2020-01-01", "\0"]
)
def test_values_of_set_that_are_no_settings(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        load_config("digits", [f"train.steps={value}"])


def test_one_window_keeps_the_windowed_scales() -> None:
    assert load_config("digits", ["attention.windows=5"]).windows == (0, 0, 0, 5)
    assert load_config("mvar-d16-256", ["attention.windows=9"]).windows == (0,) * 8 + (9, 9)
    assert load_config("var-d16-256", ["attention.windows=9"]).windows == (0,) * 8 + (9, 9)
    assert load_config("mvar-d16-256", ["attention.windows=null"]).windows == (0,) * 10


def test_sizes_in_any_spelling_are_equal() -> None:
    size, patches = (64, 96), (1, (2, 3), 4, (16, 24))
    for one, several in (
        ("image_size=[64,96]", "patch_sizes=[1,[2,3],[4,4],[16,24]]"),
        ("image_size=64x96", "patch_sizes=1,2x3,4,16x24"),
        ("image_size=64×96", "patch_sizes=[1,2x3,4x4,[16,24]]"),
    ):
        config = load_config("digits", [one, several])
        assert (config.image_size, config.patch_sizes) == (size, patches)
        assert config.pyramid.spelled == "1,2x3,4,16x24"
        assert config.windows == (0, 0, 0, 3)


def test_the_pyramid_follows_the_image_size_and_the_windows_follow_the_pyramid(tmp_path: Path) -> None:
    wide = load_config("mvar-d24-256", ["image_size=256x384"])
    assert wide.pyramid == ScalePyramid.for_image(256, 384)
    assert wide.windows == paying_windows(wide.pyramid)
    assert load_config("mvar-d24-256", [], {"image_size": 512}).model == load_config("mvar-d24-512").model.model_copy(
        update={"name": "mvar-d24-256"}
    )
    assert load_config("var-d16-256", ["image_size=512"]).windows == (0,) * 10
    # One number still goes to the scales that have windows; a list, and a pyramid, stand as they are given.
    assert load_config("mvar-d24-256", ["image_size=512", "attention.windows=5"]).windows == (0,) * 6 + (5,) * 4
    assert load_config("mvar-d24-256", ["attention.windows=[0,0,5]", "attention.windows=3", "patch_sizes=1,2,16"]
                       ).windows == (0, 0, 3)  # fmt: skip
    own = load_config("mvar-d24-256", ["patch_sizes=1,2x3,16x24"], {"image_size": (256, 384)})
    assert (own.pyramid.spelled, own.windows) == ("1,2x3,16x24", (0, 0, 7))
    # The preset's own size, in whatever spelling, is no change.
    assert load_config("digits", ["image_size=32x32"]) == load_config("digits")
    file = tmp_path / "wide.yaml"
    file.write_text("extends: mvar-d24-256\nimage_size: 256x384\n")
    assert load_config(str(file)).model_copy(update={"name": wide.name}) == wide


def test_windows_where_they_pay() -> None:
    assert load_config("mvar-d16-256", ["attention.windows=auto"]) == load_config("mvar-d16-256")
    assert load_config("var-d16-256", ["attention.windows=auto:5"]).windows == (0,) * 7 + (5,) * 3
    assert load_config("digits", ["attention.windows=auto:3"]).windows == (0, 0, 0, 3)


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
