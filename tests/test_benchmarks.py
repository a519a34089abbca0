"""Every script in benchmarks/ runs: in smoke mode, which takes seconds and writes no results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = ("attention", "editing", "faults", "output", "plan_memory", "token_cache", "words")
SLOW = (
    "ablation",
    "attention_report",
    "distributed",
    "evaluation",
    "published_size",
    "quickstart",
    "sampling",
    "startup",
    "tokenizer",
    "training_step",
)


@pytest.mark.parametrize("script", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_benchmark_runs(script: str) -> None:
    results = BENCHMARKS / "results" / f"{script}.json"
    before = results.read_bytes() if results.exists() else None
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--smoke"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (results.read_bytes() if results.exists() else None) == before
