"""The tables of an ablation take their place in docs/ablations.md, and only theirs."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_replace_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("ablation_benchmark", ROOT / "benchmarks" / "ablation.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sys.modules.pop("machine", None)
    page = (ROOT / "docs" / "ablations.md").read_text()
    once = benchmark.embed(page, "| a |\n\n![x](ablation.png)\n")
    assert "![x](images/ablation.png)" in once
    assert benchmark.embed(once, "| a |\n\n![x](ablation.png)\n") == once
    assert "| a |" not in benchmark.embed(once, "| b |")
    assert once.split(benchmark.BEGIN)[0] == page.split(benchmark.BEGIN)[0]
