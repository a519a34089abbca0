"""The list of faults fits the code: each line is found once, and each fault changes it."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "mutation.py"
SPEC = importlib.util.spec_from_file_location("mutation", PATH)
assert SPEC is not None
assert SPEC.loader is not None
mutation = importlib.util.module_from_spec(SPEC)
sys.modules["mutation"] = mutation
SPEC.loader.exec_module(mutation)


@pytest.mark.parametrize("fault", mutation.FAULTS, ids=lambda fault: fault.line[:40])
def test_each_fault_has_its_line_and_tests(fault) -> None:
    path, _ = mutation.locate(fault, mutation.ROOT)
    assert fault.line != fault.instead
    assert all((mutation.ROOT / tests).exists() for tests in mutation.tests_of(path, mutation.ROOT))
