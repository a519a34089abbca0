"""docs/large-images.md says what the cost model and the code say."""

import re
from pathlib import Path

import pytest

from mvar_cli.large_images import ROWS, costs, with_costs
from mvar_core.analysis.cost import plan
from mvar_core.config.presets import load_config
from mvar_core.pyramid import ScalePyramid

FILE = Path(__file__).parents[2] / "docs" / "large-images.md"


@pytest.fixture(scope="module")
def page() -> str:
    return FILE.read_text(encoding="utf-8")


def test_the_table_is_not_stale(page):
    assert page == with_costs(page), "run: python -m mvar_cli.large_images docs/large-images.md"
    assert costs() in page
    assert page.count("|\n") == len(ROWS) + 2


def test_the_example_of_a_pyramid(page):
    pyramid = ScalePyramid.for_image(256, 384)
    assert f"    {pyramid}      {pyramid.num_tokens:,} tokens\n" in page


def test_what_the_page_reads_from_the_table():
    """Windows halve the attention that is left at 1024 px; the cache goes with the earlier scales."""
    windowed, whole, var = (
        plan(load_config("mvar-d24-1024", [], changes), device="cuda")
        for changes in ({}, {"attention": {"windows": []}}, {"attention": {"scale_prefixes": "all", "windows": []}})
    )
    assert 0.45 < windowed.attention_gmacs / whole.attention_gmacs < 0.55
    assert windowed.kv_cache_bytes == whole.kv_cache_bytes == 0 < var.kv_cache_bytes
    assert windowed.parameters == whole.parameters == var.parameters
    parts = windowed.parts_gmacs
    assert (parts["mlp"] + parts["projections"]) / windowed.total_gmacs == pytest.approx(2 / 3, abs=0.03)
    assert parts["decoder"] / windowed.total_gmacs == pytest.approx(1 / 3, abs=0.03)
    smaller = plan(load_config("mvar-d24-512"), device="cuda")
    assert smaller.attention_gmacs < 0.8 * plan(load_config("mvar-d24-512", ["attention.windows=[]"])).attention_gmacs


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([a-z-]+\.md)", page):
        assert (FILE.parent / target).is_file()
