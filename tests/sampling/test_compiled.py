"""Compiled blocks sample the same tokens as plain ones, and a warm model compiles nothing again."""

import subprocess
import sys
from pathlib import Path

import pytest

from mvar_core import Pipeline
from mvar_core.errors import BackendError

# In a process of its own, for the annotations that the tests enforce stand in the compiler's way.
PROGRAM = """
import sys
import torch
import torch._dynamo.config
from mvar_core import Pipeline
from mvar_core.models.compilation import is_compiled

plain = Pipeline.from_pretrained(sys.argv[1], device="cpu", dtype="float32")
compiled = Pipeline.from_pretrained(sys.argv[1], device="cpu", dtype="float32", compile=True)
assert is_compiled(compiled.transformer) and not is_compiled(plain.transformer)
labels, settings = [1, 2, 3, 4, 5, 6, 7], {"cfg": 1.5, "top_k": 1, "top_p": 0.0}
expected = plain.sample(labels, **settings).tokens
first = compiled.sample(labels[:4], batch_size=4, **settings).tokens
assert (first == expected[:4]).float().mean() > 0.99
with torch._dynamo.config.patch(error_on_recompile=True):
    more = compiled.sample(labels, batch_size=4, **settings).tokens
assert (more == expected).float().mean() > 0.99
"""


@pytest.mark.slow
def test_compiled_sampling(mvar_directory: Path) -> None:
    program = [sys.executable, "-c", PROGRAM, str(mvar_directory)]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_without_a_compiler(mvar_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        Pipeline.from_pretrained(mvar_directory, device="cpu", compile=True)
