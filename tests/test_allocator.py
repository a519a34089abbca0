"""The C library's allocator keeps what it is told to keep."""

import subprocess
import sys

import pytest

from mvar_core.allocator import c_library

# In a process of its own: what a test allocated before may lie where this one's blocks would grow.
PROGRAM = """
import resource
from mvar_core.allocator import keeping_all_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * (300 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
with keeping_all_freed_memory():
    print(min(page_faults() for _ in range(6)))  # where a block is put settles within a few allocations
print(page_faults())
"""


@pytest.mark.skipif(c_library() is None, reason="adjusts glibc's allocator")
def test_freed_memory_is_kept_only_while_asked_for() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, within, after = map(int, run.stdout.split())
    assert before > 10_000
    assert within < 1000
    assert after > 10_000
