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


def test_every_script_is_listed() -> None:
    shared, of_two_checkouts, of_the_tests = "machine", "same_numbers", "mutation"
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {shared, of_two_checkouts, of_the_tests}
    assert sorted(scripts) == sorted([*QUICK, *SLOW])


@pytest.mark.slow
def test_a_checkout_has_the_numbers_of_itself() -> None:
    command = [sys.executable, str(BENCHMARKS / "same_numbers.py"), *[str(BENCHMARKS.parent)] * 2, "--smoke"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


@pytest.mark.parametrize("script", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_benchmark_runs(script: str) -> None:
    results = BENCHMARKS / "results" / f"{script}.json"
    before = results.read_bytes() if results.exists() else None
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--smoke"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (results.read_bytes() if results.exists() else None) == before
