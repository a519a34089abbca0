"""The page of recipes says what the presets and the cost model say."""

from pathlib import Path

import pytest

from mvar_cli.recipes import recipes
from mvar_core.config.presets import load_config, preset_names
from mvar_core.training.curriculum import build_curriculum

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def page() -> str:
    return recipes()


def test_the_page_is_not_stale(page):
    assert PAGE.read_text(encoding="utf-8") == page, "run: python -m mvar_cli.recipes docs/recipes.md"


def test_every_published_preset_is_on_it(page):
    for name in preset_names():
        assert (f"`{name}`" in page) == (not name.startswith("digits"))


def test_a_tokenizer_has_no_figures_of_a_transformer(page):
    models, tokenizers = page.split("## Tokenizers")
    assert "`tokenizer-256` |" not in models
    assert "| `tokenizer-256` | 109 M | 4096 | 680 of 32 channels |" in tokenizers
    assert "take 0 B" not in tokenizers


def test_what_the_page_says_of_the_curricula():
    config = load_config("mvar-d16-256")
    assert config.train.curriculum == "joint"
    assert config.pyramid.num_tokens == 680
    interleaved = load_config("mvar-d16-256", ["train.curriculum=interleaved"])
    assert round(build_curriculum(interleaved.train, config.pyramid, config.patterns).tokens_per_step(), 1) == 246.5
