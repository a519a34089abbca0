from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.errors import DataError
from mvar_core.evaluation.features import Features
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.evaluation.statistics import BLOCK_ROWS, StreamingStatistics, collect, content_keys


class PixelExtractor:
    """Features that are an image's first pixels."""

    name = "pixels"
    dim = 6
    comparable_to_papers = False
    weights_hash = "none"

    def __call__(self, images: Tensor) -> Features:
        pixels = images.flatten(1).float()
        return Features(pixels[:, :6], pixels[:, 6:9], pixels[:, 3:7])


def rows(count: int, dim: int = 6, offset: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count)) + offset


def streamed(features: Tensor, batch: int) -> StreamingStatistics:
    statistics = StreamingStatistics()
    for part in features.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("count", [2, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 7])
def test_equals_torch_fidelity_on_all_rows_at_once(count: int) -> None:
    features = rows(count, offset=1000.0)
    expected = fidelity_module("metric_fid").fid_features_to_statistics(features.double())
    result = streamed(features, 50).result()
    assert result["mu"].dtype == result["sigma"].dtype == np.float64
    np.testing.assert_allclose(result["mu"], expected["mu"], rtol=1e-13)
    np.testing.assert_allclose(result["sigma"], expected["sigma"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 256, 10_000])
def test_is_bit_equal_for_every_batch_size(batch: int) -> None:
    features = rows(600)
    expected, result = streamed(features, 64).result(), streamed(features, batch).result()
    assert np.array_equal(result["mu"], expected["mu"])
    assert np.array_equal(result["sigma"], expected["sigma"])


def test_does_not_depend_on_the_order() -> None:
    features = rows(600)
    expected, result = streamed(features, 64).result(), streamed(features.flip(0), 64).result()
    np.testing.assert_allclose(result["sigma"], expected["sigma"], rtol=1e-11, atol=1e-14)


def test_asking_for_the_result_does_not_disturb_what_follows() -> None:
    features = rows(600)
    statistics = StreamingStatistics()
    for part in features.split(100):
        statistics.update(part)
        early = statistics.result()
    assert np.array_equal(early["sigma"], streamed(features, 600).result()["sigma"])


def test_refuses_one_row_and_numbers_that_are_not_finite() -> None:
    with pytest.raises(DataError, match="at least 2 images, found 1"):
        streamed(rows(1), 1).result()
    with pytest.raises(DataError, match="not finite"):
        streamed(torch.tensor([[1.0, float("nan")]]), 1)


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_collect_keeps_features_in_order_and_reports_progress() -> None:
    pictures = images(10)
    seen: list[tuple[int, int]] = []
    result = collect(PixelExtractor(), pictures.split(4), 10, lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert result.count == result.num_images == 10
    assert (result.extractor, result.weights_hash) == ("pixels", "none")
    assert result.features is not None
    assert result.logits is not None
    assert torch.equal(result.features, pictures.flatten(1)[:, :6].float())
    assert torch.equal(result.logits, pictures.flatten(1)[:, 6:9].float())
    assert result.spatial is not None
    np.testing.assert_allclose(result.spatial["mu"], pictures.flatten(1)[:, 3:7].double().mean(dim=0).numpy())


def test_collect_of_one_image_has_no_covariance_and_of_none_is_refused() -> None:
    single = collect(PixelExtractor(), [images(1)], 1)
    assert single.statistics is None
    assert single.spatial is None
    nothing: Iterator[Tensor] = iter(())
    with pytest.raises(DataError, match="0 images"):
        collect(PixelExtractor(), nothing, 0)


def test_collect_without_features_keeps_what_the_other_metrics_need() -> None:
    pictures = images(600)
    kept = collect(PixelExtractor(), pictures.split(50), 600)
    slim = collect(PixelExtractor(), pictures.split(50), 600, keep_features=False)
    assert slim.features is None
    assert (slim.count, slim.num_images, slim.width) == (600, 600, 6)
    assert slim.statistics is not None
    assert kept.statistics is not None
    assert slim.logits is not None
    assert np.array_equal(slim.statistics["sigma"], kept.statistics["sigma"])
    assert torch.equal(slim.logits, kept.logits)  # type: ignore[arg-type]
    scores = evaluate_features(slim, kept)
    assert all(scores[name] is not None for name in ("fid", "sfid", "inception_score"))
    assert set(scores["reasons"]) == {"precision", "recall", "kid"}


@pytest.mark.parametrize("total", [0, 3, 50])
def test_another_number_of_images_is_an_error(total: int) -> None:
    with pytest.raises(DataError, match=str(total)):
        collect(PixelExtractor(), images(10).split(4), total)


@pytest.mark.parametrize("part", ["pool", "logits", "spatial"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_the_first_such_image(part: str, value: float) -> None:
    class Broken(PixelExtractor):
        def __call__(self, images: Tensor) -> Features:
            found = super().__call__(images)
            damaged = {"pool": found.pool, "logits": found.logits, "spatial": found.spatial}[part]
            assert damaged is not None
            damaged[images.flatten(1)[:, 0] == 7] = value
            return found

    pictures = images(10)
    pictures[:, 0, 0, 0] = 1
    pictures[[6, 8], 0, 0, 0] = 7
    for batch in (1, 4, 10):
        with pytest.raises(DataError, match=r"image 6 \(counted from 0\) are not finite"):
            collect(Broken(), pictures.split(batch), 10)
    with pytest.raises(DataError, match=r"image 106 \(counted from 0\) are not finite"):
        collect(Broken(), pictures.split(4), 10, first=100)


def test_measures_without_tensorfloat_and_restores_the_settings() -> None:
    seen: list[tuple[object, object]] = []

    class Looking(PixelExtractor):
        def __call__(self, images: Tensor) -> Features:
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            seen.append((torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
            return super().__call__(images)

    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        collect(Looking(), [images(2)], 2)
        assert seen == [(False, False), ("ieee", "highest")]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with pytest.raises(DataError):
            collect(Looking(), [], 0)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_content_keys_follow_the_image_and_hardly_its_last_levels() -> None:
    images = torch.randint(0, 250, (200, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = content_keys(images)
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == 200
    assert torch.equal(content_keys(images[7:9]), keys[7:9])
    nearly = images.flatten(1).clone()
    nearly[torch.arange(200), torch.arange(200) % 192] += 1
    assert (content_keys(nearly.view_as(images)).argsort() == keys.argsort()).float().mean() > 0.8


POOL = torch.rand(4, 6)


@pytest.mark.parametrize(
    "found",
    [
        None,
        POOL,
        Features(POOL[:3]),
        Features(POOL[:, :5]),
        Features(POOL.long()),
        Features(POOL.numpy()),
        Features(POOL.to("meta")),
        Features(POOL.to_sparse()),
        Features(POOL, torch.rand(3)),
        Features(POOL, None, torch.rand(4, 2, 2)),
    ],
)
def test_what_is_not_features_of_the_images_is_refused(found: Any) -> None:
    class Wrong(PixelExtractor):
        def __call__(self, images: Tensor) -> Features:
            return found

    with pytest.raises(DataError, match="network pixels returns"):
        collect(Wrong(), [images(4)], 4)


def test_features_that_change_their_width_are_refused() -> None:
    class Changing(PixelExtractor):
        def __call__(self, images: Tensor) -> Features:
            found = super().__call__(images)
            return found if len(images) == 4 else Features(found.pool)

    with pytest.raises(DataError, match="other widths"):
        collect(Changing(), images(7).split(4), 7)
