import pytest
import torch

from mvar_core.config import Machine
from mvar_core.errors import BackendError, ConfigError
from mvar_core.runtime import (
    generator,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
    sample_uniforms,
)


def test_uniforms_depend_on_seed_and_index_alone() -> None:
    together = sample_uniforms(3, range(6), 50)
    assert together.shape == (6, 50)
    assert torch.equal(sample_uniforms(3, [4], 50)[0], together[4])
    assert not torch.equal(sample_uniforms(4, [4], 50)[0], together[4])
    assert not torch.equal(sample_uniforms(3, [4], 50, stream=1)[0], together[4])
    assert len(torch.unique(together)) == together.numel()
    assert sample_uniforms(0, [], 5).shape == (0, 5)


def test_uniforms_are_frozen() -> None:
    """The stream is part of the promise that a sample can be made again."""
    expected = torch.tensor([0.0115467543, 0.2415491966], dtype=torch.float64)
    assert torch.allclose(sample_uniforms(0, [0], 2)[0], expected, atol=1e-7)


def test_generator() -> None:
    first, again = torch.rand(4, generator=generator("a", 1)), torch.rand(4, generator=generator("a", 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=generator("a", 2)))


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
            patch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert resolve_dtype("auto", torch.device("cuda")) == expected
    assert Machine(device=torch.device("cuda", 1), dtype=torch.bfloat16) == Machine(device="cuda:1", dtype="bfloat16")
    for device in ("gpu:cpu", "cuda:x", "cuda:-1", "cpu:0", "", "\0", 3):
        with pytest.raises(ConfigError, match="device"):
            Machine(device=device)
    with pytest.raises(ConfigError, match="Did you mean float32"):
        Machine(dtype="float23")
    with pytest.raises(BackendError, match="CUDA devices"):
        resolve_device("cuda:99")
    assert peak_memory_bytes(torch.device("cpu")) > 10_000_000
