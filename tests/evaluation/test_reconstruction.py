from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.reconstruction import ReconstructionMeter, ssim


def pictures(count: int, seed: int = 0, side: int = 20) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side + 4), generator=source, dtype=torch.uint8)


def noisy(images: Tensor, spread: int = 20) -> Tensor:
    noise = torch.randint(-spread, spread + 1, images.shape, generator=torch.Generator().manual_seed(9))
    return (images.long() + noise).clamp(0, 255).to(torch.uint8)


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two channels, window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
            )
    return float(np.mean(values))


def test_ssim_is_that_of_its_definition() -> None:
    originals = pictures(2)
    others = noisy(originals)
    found = ssim(originals, others)
    assert found.dtype == torch.float64
    for image in range(2):
        channels = [by_hand(originals[image, c].double().numpy(), others[image, c].double().numpy()) for c in range(3)]
        assert float(found[image]) == pytest.approx(np.mean(channels), rel=1e-10)


def test_ssim_of_equal_and_of_flat_images() -> None:
    images = pictures(3)
    assert torch.allclose(ssim(images, images), torch.ones(3, dtype=torch.float64), atol=1e-12)
    flat = torch.full((1, 3, 11, 11), 100, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert float(ssim(flat, flat + 50)) == pytest.approx(expected, rel=1e-9)


def test_refuses_pairs_that_do_not_match_and_images_below_the_window() -> None:
    with pytest.raises(DataError, match="pair by pair"):
        ssim(pictures(2), pictures(3))
    with pytest.raises(DataError, match="at least 11×11"):
        ssim(pictures(1, side=10), pictures(1, side=10))
    with pytest.raises(DataError, match="uint8"):
        ssim(pictures(1).float(), pictures(1).float())


SPANS = (slice(0, 1), slice(1, 5))


def test_measures_images_and_codes_batch_by_batch() -> None:
    originals = pictures(5)
    others = noisy(originals)
    tokens = torch.tensor([[0, 1, 1, 2, 2], [0, 2, 2, 2, 2], [3, 1, 1, 1, 1], [0, 1, 2, 1, 2], [3, 2, 2, 2, 1]])
    meters = []
    for batch in (2, 5):
        meter = ReconstructionMeter(SPANS, 8)
        for start in range(0, 5, batch):
            rows = slice(start, start + batch)
            meter.update(originals[rows], others[rows], tokens[rows])
        meters.append(meter.result())
    for name, value in meters[1].items():
        assert meters[0][name] == pytest.approx(value, rel=1e-12), name
    result = meters[0]
    errors = [float(((a - b) ** 2).mean()) for a, b in zip(originals.double(), others.double(), strict=True)]
    assert result["psnr"] == pytest.approx(np.mean([10 * math.log10(255**2 / error) for error in errors]), rel=1e-12)
    assert result["ssim"] == pytest.approx(float(ssim(originals, others).mean()))
    assert result["usage_per_scale"] == [2 / 8, 2 / 8]
    assert result["code_usage"] == 4 / 8
    assert result["images"] == 5


def test_images_without_an_error_have_no_finite_ratio() -> None:
    meter = ReconstructionMeter(SPANS, 8)
    meter.update(pictures(1), pictures(1), torch.zeros(1, 5, dtype=torch.int64))
    assert meter.result()["psnr"] == math.inf
    assert meter.result()["ssim"] == pytest.approx(1)


def test_refuses_tokens_that_do_not_fit_and_no_images() -> None:
    meter = ReconstructionMeter(SPANS, 8)
    with pytest.raises(DataError, match="no images"):
        meter.result()
    with pytest.raises(DataError, match=r"int64 \(1, 4\); expected int64 \(1, 5\)"):
        meter.update(pictures(1), pictures(1), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(DataError, match="from 0 to 8; expected 0 to 7"):
        meter.update(pictures(1), pictures(1), torch.tensor([[0, 0, 0, 0, 8]]))
