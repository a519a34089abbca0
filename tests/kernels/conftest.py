"""Random queries, keys and values, and attention with its gradients, for the tests of every backend."""

from __future__ import annotations

import pytest
import torch

from mvar_core.kernels import attend, available_backends


@pytest.fixture
def make_inputs():
    """(q, k, v, output gradient) that fit a pattern."""

    def make(pattern, *, batch=2, heads=2, width=16, dtype=torch.float32, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(tokens):
            return torch.randn(batch, heads, tokens, width, generator=generator).to(device, dtype)

        return normal(pattern.queries), normal(pattern.keys), normal(pattern.keys), normal(pattern.queries)

    return make


@pytest.fixture
def attend_with_gradients():
    """(output, gradients of q, k and v) of one backend."""

    def run(inputs, pattern, scale, backend):
        q, k, v, gradient = inputs
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        output = attend(*leaves, pattern, scale=scale, backend=backend)
        return (output.detach(), *torch.autograd.grad(output, leaves, gradient))

    return run


@pytest.fixture(params=[name for name, _ in available_backends()])
def backend(request):
    """Each backend that can run on a CPU, in turn."""
    reason = dict(available_backends())[request.param]
    if reason:
        pytest.skip(reason)
    return request.param
