"""The C library's allocator keeps what it is told to keep."""

import resource

import pytest
import torch

from mvar_core.allocator import c_library, keeping_all_freed_memory


@pytest.mark.skipif(c_library() is None, reason="adjusts glibc's allocator")
def test_freed_memory_is_kept_only_while_asked_for() -> None:
    def page_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(300 << 20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert page_faults() > 10_000
    with keeping_all_freed_memory():
        # Where a block is put settles within a few allocations.
        assert min(page_faults() for _ in range(6)) < 1000
    assert page_faults() > 10_000
