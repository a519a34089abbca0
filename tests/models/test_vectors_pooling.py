import pytest
import torch

from mvar_core.errors import DataError
from mvar_core.models.vectors import pool_sequence


def test_the_mean_is_over_what_the_mask_keeps() -> None:
    sequence = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    expected = torch.stack([sequence[0, :2].mean(0), sequence[1].mean(0), sequence[2, 2]])
    assert torch.allclose(pool_sequence(sequence, mask, normalise=False), expected)
    assert torch.allclose(pool_sequence(sequence, mask.bool()), torch.nn.functional.normalize(expected, dim=1))
    assert torch.allclose(pool_sequence(sequence, normalise=False), sequence.mean(1))


def test_masked_positions_may_hold_anything() -> None:
    sequence = torch.ones(1, 3, 2)
    sequence[0, 2] = torch.nan
    assert torch.equal(pool_sequence(sequence, torch.tensor([[1, 1, 0]]), normalise=False), torch.ones(1, 2))


def test_half_precision_is_averaged_in_float32() -> None:
    sequence = torch.full((1, 3000, 2), 1.5, dtype=torch.float16)
    assert torch.equal(pool_sequence(sequence, normalise=False), torch.full((1, 2), 1.5))


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="Sequence 1 has no position"):
        pool_sequence(torch.ones(2, 3, 2), torch.tensor([[1, 0, 0], [0, 0, 0]]))
