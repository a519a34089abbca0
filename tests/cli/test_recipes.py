"""The page of recipes says what the presets and the cost model say."""

from pathlib import Path

from mvar_cli.recipes import recipes
from mvar_core.presets import load_config, preset_names
from mvar_core.training.curriculum import build_curriculum

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_is_not_stale():
    assert PAGE.read_text(encoding="utf-8") == recipes(), "run: python -m mvar_cli.recipes docs/recipes.md"


def test_every_published_preset_is_on_it():
    page = recipes()
    for name in preset_names():
        assert (f"`{name}`" in page) == (not name.startswith("digits"))


def test_what_the_page_says_of_the_curricula():
    config = load_config("mvar-d16-256")
    assert config.train.curriculum == "joint"
    assert config.pyramid.num_tokens == 680
    interleaved = load_config("mvar-d16-256", ["train.curriculum=interleaved"])
    assert round(build_curriculum(interleaved.train, config.pyramid, config.patterns).tokens_per_step(), 1) == 246.5
