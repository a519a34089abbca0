"""The generated pages of docs/ are up to date and say what presets, cost model and code say."""

import re

import pytest
from generate import DOCS, LARGE_MODELS, large_image_costs, pages, recipes

from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine
from mvar_core.config.presets import load_config, preset_names
from mvar_core.pyramid import ScalePyramid
from mvar_core.training.transformer import build_curriculum

CUDA = Machine(device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def page() -> str:
    return recipes()


@pytest.fixture(scope="module")
def large_images() -> str:
    return (DOCS / "large-images.md").read_text(encoding="utf-8")


def test_no_page_is_stale():
    assert [path.name for path, text in pages().items() if path.read_text(encoding="utf-8") != text] == [], "make docs"


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


def test_every_model_is_a_row(large_images):
    assert large_image_costs() in large_images
    assert large_images.count("|\n") == len(LARGE_MODELS) + 2


def test_the_example_of_a_pyramid(large_images):
    pyramid = ScalePyramid.for_image(256, 384)
    assert f"    {pyramid}      {pyramid.num_tokens:,} tokens\n" in large_images


def test_what_the_page_reads_from_the_table():
    """Windows halve the attention that is left at 1024 px; the cache goes with the earlier scales."""
    windowed, whole, var = (
        cost_of(load_config("mvar-d24-1024", [], changes), CUDA)
        for changes in ({}, {"attention": {"windows": []}}, {"attention": {"scale_prefixes": "all", "windows": []}})
    )
    assert 0.45 < windowed.attention_gmacs / whole.attention_gmacs < 0.55
    assert windowed.kv_cache_bytes == whole.kv_cache_bytes == 0 < var.kv_cache_bytes
    assert windowed.parameters == whole.parameters == var.parameters
    parts = windowed.parts_gmacs
    assert (parts["mlp"] + parts["projections"]) / windowed.total_gmacs == pytest.approx(2 / 3, abs=0.03)
    assert parts["decoder"] / windowed.total_gmacs == pytest.approx(1 / 3, abs=0.03)
    smaller = cost_of(load_config("mvar-d24-512"), CUDA)
    whole = cost_of(load_config("mvar-d24-512", ["attention.windows=[]"]), CUDA)
    assert smaller.attention_gmacs < 0.8 * whole.attention_gmacs


def test_links_lead_somewhere(large_images):
    for target in re.findall(r"\]\(([a-z-]+\.md)", large_images):
        assert (DOCS / target).is_file()
