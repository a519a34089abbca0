"""FlexAttention: the blocks it visits, and that a warm model never compiles again."""

from __future__ import annotations

import functools
import importlib.machinery
import shutil
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from mvar_core.kernels import attend, check_backend, flex, natten, select
from mvar_core.kernels.backend import AttentionCall
from mvar_core.pyramid import AttentionPattern, Grid

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PATTERNS = (
    AttentionPattern(Grid(16, 16), 7),
    AttentionPattern(Grid(24, 24), 3, prefix_tokens=300),
    AttentionPattern(Grid(9, 40), 13, prefix_tokens=5),
    AttentionPattern(Grid(64, 3), 5),
    AttentionPattern(Grid(5, 4), 3, prefix_tokens=128),
)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What is kept per process is made again by each test, and forgotten after it."""
    kept = (select.select_backend, select._log_once, flex._compiled)
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


@pytest.fixture
def with_triton(monkeypatch):
    """A machine whose GPU can be compiled for, as far as the predicate sees."""
    module = type(sys)("triton")
    module.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", module)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_are_those_that_torch_finds_in_the_whole_matrix(pattern):
    found = flex.block_mask(pattern, CPU)
    expected = create_block_mask(
        flex._visibility(pattern), None, None, pattern.queries, pattern.keys, device="cpu", BLOCK_SIZE=flex.BLOCK
    )
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for row, count in enumerate(getattr(found, counts)[0, 0].tolist()):
            visited = (getattr(mask, indices)[0, 0, row, :count].sort().values for mask in (found, expected))
            assert torch.equal(*visited)
    visited = (found.kv_num_blocks + found.full_kv_num_blocks).sum()
    assert flex.visited_share(pattern) == pytest.approx(visited.item() / found.kv_indices.numel())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_question_who_sees_whom_is_the_patterns(pattern):
    query, key = torch.arange(pattern.queries)[:, None], torch.arange(pattern.keys)[None, :]
    seen = flex._visibility(pattern)(torch.tensor(0), torch.tensor(0), query, key)
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        pattern.visible_keys(index) for index in range(pattern.queries)
    ]


def test_a_warm_model_never_compiles_again(make_inputs, monkeypatch):
    """More patterns than PyTorch would compile one function for, each with several batch sizes."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    patterns = [AttentionPattern(Grid(side, 7), 3, side % 3) for side in range(4, 13)]

    def run(batches):
        for pattern in patterns:
            for batch in batches:
                q, k, v, _ = make_inputs(pattern, batch=batch, width=12)
                found = flex._attend_compiled(q, k, v, pattern, 0.5)
                expected = attend(q, k, v, pattern, scale=0.5, backend="reference")
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    run((2, 3))
    compiled = counter.frame_count
    assert len(patterns) <= compiled <= 2 * len(patterns)
    run((2, 3, 5, 6))
    assert counter.frame_count == compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_what_is_compiled_equals_reference(make_inputs, pattern):
    """The compiled kernel for a CPU, which is not what a CPU gets: the same graph is compiled for CUDA."""
    q, k, v, _ = make_inputs(pattern, width=24)
    with torch.no_grad():
        found = flex._attend_compiled(q, k, v, pattern, 0.5)
    expected = attend(q, k, v, pattern, scale=0.5, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_auto_takes_flex_on_cuda_where_it_skips_blocks(monkeypatch, with_triton):
    monkeypatch.setitem(sys.modules, "natten", None)
    picked = {
        side: select.select_backend("auto", AttentionCall(AttentionPattern(Grid(side, side), 7), CUDA, torch.bfloat16))
        for side in (16, 32, 64)
    }
    assert {side: backend.name for side, backend in picked.items()} == {16: "dense", 32: "flex", 64: "flex"}
    whole = AttentionCall(AttentionPattern(Grid(64, 64)), CUDA, torch.bfloat16)
    assert select.select_backend("auto", whole).name == "dense"


def test_reasons(monkeypatch):
    def reason(device, dtype=torch.float32):
        return flex.BACKEND.cannot_run(AttentionCall(PATTERNS[0], device, dtype))

    assert reason(CPU) is None
    assert "does not run in float64" in reason(CPU, torch.float64)
    assert "mps" in reason(torch.device("mps"))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "triton, which is not installed" in reason(CUDA)
    check_backend("flex", PATTERNS, CPU, torch.bfloat16, needs_grad=True)
    assert "whole matrix of scores" in flex.BACKEND.not_chosen(AttentionCall(PATTERNS[0], CPU, torch.float32))


@pytest.mark.parametrize("backend", [flex, natten])
def test_gradients_are_those_of_tiles(make_inputs, attend_with_gradients, backend):
    name = backend.BACKEND.name
    if reason := backend.BACKEND.cannot_run(AttentionCall(PATTERNS[0], CPU, torch.float32)):
        pytest.skip(reason)
    pattern = AttentionPattern(Grid(6, 5), 3, prefix_tokens=2)
    inputs = make_inputs(pattern)
    expected = attend_with_gradients(inputs, pattern, 0.5, "tiled")[1:]
    for found, wanted in zip(attend_with_gradients(inputs, pattern, 0.5, name)[1:], expected, strict=True):
        assert torch.equal(found, wanted)
