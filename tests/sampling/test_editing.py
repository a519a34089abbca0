"""Editing keeps exactly the tokens that it promises, at every scale, and samples the rest."""

import golden_models
import numpy as np
import pytest
import torch
from golden_models import GoldenCase

from mvar_core import Pipeline
from mvar_core.config import ModelConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import ConfigError, DataError
from mvar_core.io.pixels import from_uint8, to_uint8
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import ScalePyramid
from mvar_core.sampling.editing import KeptTokens, kept_pixels, kept_tokens

SETTINGS = {"cfg": 1.5, "top_k": 30, "top_p": 0.96, "seed": 5}
LABELS = [3, 1, 4]


@pytest.fixture(scope="module", params=["all", 2, 1])
def pipeline(request: pytest.FixtureRequest, golden_mvar: GoldenCase) -> Pipeline:
    """The golden weights as a VAR, as a model of two prefixes, and as an MVAR, windows included."""
    return golden_models.pipeline(golden_mvar, request.param)


@pytest.fixture(scope="module")
def wide() -> Pipeline:
    """A model of random weights whose images are 16 pixels high and 32 wide."""
    tokenizer = {"codebook_size": 64, "latent_channels": 4, "base_channels": 8, "channel_multipliers": [1, 2]}
    blocks = {"encoder_blocks": 1, "decoder_blocks": 1, "middle_blocks": 1, "attention": False, "norm_groups": 4}
    config = ModelConfig.model_validate(
        {
            "image_size": (16, 32),
            "patch_sizes": [1, (2, 3), (3, 5), (8, 16)],
            "tokenizer": {**tokenizer, **blocks},
            "transformer": {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 5},
            "attention": {"scale_prefixes": 1, "windows": [0, 0, 3, 5]},
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = Transformer(config)
        transformer.head.weight.data.mul_(50)
        return Pipeline(config, VQVAE(config.tokenizer, config.pyramid), transformer)


def pictures(count: int, shape: tuple[int, int] = (64, 64)) -> torch.Tensor:
    random = np.random.default_rng(1)
    return from_uint8(random.integers(0, 256, (count, *shape, 3), np.uint8))


def box(shape: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def expected_tokens(pixels: np.ndarray, pyramid: ScalePyramid, coverage: float = 0.5) -> np.ndarray:
    """Which tokens stay, cell by cell: each grid enlarged to whole units, and units counted."""
    last = pyramid.latent_grid
    cell = pixels.shape[0] // last.height, pixels.shape[1] // last.width
    finest = np.array(
        [
            [pixels[y * cell[0] : (y + 1) * cell[0], x * cell[1] : (x + 1) * cell[1]].all() for x in range(last.width)]
            for y in range(last.height)
        ]
    )
    kept = []
    for grid in pyramid.grids:
        units = finest.repeat(grid.height, 0).repeat(grid.width, 1)
        for y in range(grid.height):
            for x in range(grid.width):
                part = units[
                    y * last.height : (y + 1) * last.height,
                    x * last.width : (x + 1) * last.width,
                ]
                kept.append(part.all() if grid == last else part.sum() >= coverage * part.size)
    return np.array(kept)


def masks(shape: tuple[int, int]) -> list[np.ndarray]:
    height, width = shape
    random = np.random.default_rng(0)
    return [
        box(shape, 0, 0, height, width // 2),
        box(shape, height // 4, width // 4, 3 * height // 4, 3 * width // 4),
        box(shape, 3, 5, height - 7, width - 2),
        box(shape, height // 2, 0, height // 2 + 1, 1),
        random.random((height // 4, width // 4)).repeat(4, 0).repeat(4, 1) < 0.6,
        random.random(shape) < 0.995,
    ]


@pytest.mark.parametrize("coverage", [0.01, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("keep", ["inside", "outside"])
@pytest.mark.parametrize("name", ["mvar-d16-256", "wide"])
def test_masks_are_resized_by_area(name: str, keep: str, coverage: float) -> None:
    if name == "wide":
        pyramid, shape = ScalePyramid.from_patch_sizes([1, (2, 3), (4, 6), (6, 9), (8, 12)]), (32, 48)
    else:
        config = load_config(name).model
        pyramid, shape = config.pyramid, config.image_shape
    for mask in masks(shape):
        pixels = kept_pixels(torch.from_numpy(mask), keep)
        assert np.array_equal(pixels.numpy(), mask if keep == "inside" else ~mask)
        found = kept_tokens(pixels, pyramid, coverage)
        assert np.array_equal(found.numpy(), expected_tokens(pixels.numpy(), pyramid, coverage))


def test_what_changes_is_sampled_at_the_last_scale() -> None:
    pyramid = load_config("mvar-d16-256").model.pyramid
    last = pyramid.spans[-1]
    one_pixel = torch.ones(256, 256, dtype=torch.bool)
    one_pixel[100, 37] = False
    kept = kept_tokens(one_pixel, pyramid)
    assert not kept[last].view(16, 16)[6, 2]
    assert kept[last].sum() == 255
    assert kept[: last.start].all(), "a hole of one cell is less than half of any coarser cell"
    assert not kept_tokens(one_pixel, pyramid, coverage=1)[0], "the first token sees every pixel"


@pytest.mark.parametrize("keep", ["inside", "outside"])
def test_editing_keeps_the_tokens_it_promises(pipeline: Pipeline, keep: str) -> None:
    images, pyramid = pictures(3), pipeline.config.pyramid
    given = torch.cat([pipeline.encode(image) for image in images.split(1)])
    for mask, paste in zip(masks((64, 64))[:3], (False, True, True), strict=True):
        edited = pipeline.edit(images, mask, labels=LABELS, keep=keep, paste=paste, **SETTINGS)
        pixels = torch.from_numpy(mask if keep == "inside" else ~mask)
        stays = torch.from_numpy(expected_tokens(pixels.numpy(), pyramid)).expand(3, -1)
        assert edited.kept is not None
        assert torch.equal(edited.kept, stays)
        for span in pyramid.spans:
            assert torch.equal(edited.tokens[:, span][stays[:, span]], given[:, span][stays[:, span]])
        if paste:
            assert torch.equal(edited.images[:, pixels], to_uint8(images)[:, pixels])
        decoded = torch.cat([to_uint8(pipeline.decode(tokens)) for tokens in edited.tokens.split(1)])
        shown = ~pixels if paste else torch.ones_like(pixels)
        assert (edited.images[:, shown].int() - decoded[:, shown].int()).abs().max() <= 1


def test_sampled_tokens_follow_from_kept_ones(pipeline: Pipeline) -> None:
    """Greedy tokens are those of teacher-forced logits given the edited tokens: what is sampled sees what stays."""
    mask = box((64, 64), 16, 16, 48, 64)
    edited = pipeline.edit(pictures(3), mask, labels=LABELS, cfg=0, top_k=1, top_p=0)
    likeliest = pipeline.logits(edited.tokens, LABELS).argmax(-1)
    assert edited.kept is not None
    assert torch.equal(likeliest[~edited.kept], edited.tokens[~edited.kept])
    assert not torch.equal(likeliest[edited.kept], edited.tokens[edited.kept])


@pytest.mark.parametrize("more_smooth", [False, True])
def test_nothing_kept_is_sampling_and_everything_kept_is_the_image(pipeline: Pipeline, more_smooth: bool) -> None:
    images, whole = pictures(3), np.ones((64, 64), bool)
    settings = {**SETTINGS, "more_smooth": more_smooth, "indices": [7, 0, 2]}
    sampled = pipeline.sample(LABELS, **settings)
    edited = pipeline.edit(images, whole, labels=LABELS, **settings)
    assert torch.equal(edited.tokens, sampled.tokens)
    assert torch.equal(edited.images, sampled.images)
    same = pipeline.edit(images, whole, labels=LABELS, keep="inside", **settings)
    assert torch.equal(same.tokens, torch.cat([pipeline.encode(image) for image in images.split(1)]))
    decoded = torch.cat([to_uint8(pipeline.decode(tokens)) for tokens in same.tokens.split(1)])
    assert (same.images.int() - decoded.int()).abs().max() <= 1


def test_without_a_class_nothing_guides(pipeline: Pipeline) -> None:
    images, mask = pictures(2), box((64, 64), 0, 0, 64, 40)
    free = pipeline.edit(images, mask, **SETTINGS)
    nothing = [pipeline.transformer.null_label] * 2
    assert free.labels == tuple(nothing)
    assert torch.equal(free.tokens, pipeline.edit(images, mask, labels=nothing, **SETTINGS).tokens)
    guided = pipeline.edit(images, mask, labels=[1, 2], **SETTINGS)
    assert not torch.equal(free.tokens, guided.tokens)


@pytest.mark.parametrize("more_smooth", [False, True])
def test_an_edit_does_not_depend_on_its_batch(pipeline: Pipeline, more_smooth: bool) -> None:
    images, mask = pictures(3), box((64, 64), 10, 20, 50, 64)
    settings = {**SETTINGS, "more_smooth": more_smooth}
    together = pipeline.edit(images, mask, labels=LABELS, num=2, stages=True, **settings)
    assert together.labels == (3, 3, 1, 1, 4, 4)
    assert together.stages is not None
    assert torch.equal(together.stages[:, -1], together.images)
    assert not torch.equal(together.tokens[0], together.tokens[1]), "variants differ"
    again = pipeline.edit(images, mask, labels=LABELS, num=2, batch_size=4, **settings)
    assert torch.equal(again.tokens, together.tokens)
    assert torch.equal(again.images, together.images)
    alone = pipeline.edit(images[2:], mask, labels=[4], indices=[5], **settings)
    assert torch.equal(alone.images[0], together.images[5])
    if not more_smooth:
        bounded = pipeline.edit(images, mask, labels=LABELS, num=2, memory=375_000_000, **settings)
        assert torch.equal(bounded.tokens, together.tokens)


def test_a_mask_for_each_image(pipeline: Pipeline) -> None:
    images, each = pictures(2), np.stack(masks((64, 64))[:2])
    together = pipeline.edit(images, each, labels=LABELS[:2], paste=True, **SETTINGS)
    for row in range(2):
        alone = pipeline.edit(
            images[row : row + 1], each[row], labels=[LABELS[row]], indices=[row], paste=True, **SETTINGS
        )
        assert torch.equal(alone.images[0], together.images[row])


@pytest.mark.parametrize("keep", ["inside", "outside"])
def test_images_that_are_not_square(wide: Pipeline, keep: str) -> None:
    images, pyramid = pictures(2, (16, 32)), wide.config.pyramid
    given = torch.cat([wide.encode(image) for image in images.split(1)])
    for mask in masks((16, 32)):
        edited = wide.edit(images, mask, labels=[1, 2], keep=keep, cfg=1.0, top_k=0, top_p=0, paste=True)
        pixels = mask if keep == "inside" else ~mask
        stays = torch.from_numpy(expected_tokens(pixels, pyramid)).expand(2, -1)
        assert torch.equal(edited.tokens[stays], given[stays])
        assert torch.equal(edited.images[:, pixels], to_uint8(images)[:, pixels])
        if not stays.any():
            continue
        sampled = wide.sample([1, 2], cfg=1.0, top_k=0, top_p=0)
        first = pyramid.spans[0]
        if not stays[:, first].any():
            assert torch.equal(edited.tokens[:, first], sampled.tokens[:, first])


def test_a_stream_of_edits(pipeline: Pipeline) -> None:
    kept = pipeline.kept_tokens(pictures(3), torch.from_numpy(box((64, 64), 0, 0, 32, 64)))
    whole = pipeline.sample(LABELS, kept=kept, **SETTINGS)
    parts = list(pipeline.stream(LABELS, kept=kept, batch_size=2, **SETTINGS))
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_what_cannot_be_edited(pipeline: Pipeline) -> None:
    images, mask = pictures(2), box((64, 64), 0, 0, 32, 64)
    with pytest.raises(DataError, match=r"mask is bool of \(64, 64\) or \(2, 64, 64\); found bool of shape \(32, 64\)"):
        pipeline.edit(images, mask[:32])
    with pytest.raises(DataError, match="mask .* found float64"):
        pipeline.edit(images, mask.astype(float))
    with pytest.raises(DataError, match=r"images .* found float32 of shape .2, 3, 32, 32"):
        pipeline.edit(images[:, :, :32, :32], mask)
    with pytest.raises(ConfigError, match="coverage is 0"):
        pipeline.edit(images, mask, coverage=0)
    with pytest.raises(ConfigError, match="2 labels but 1 images of kept tokens"):
        pipeline.sample([1, 2], kept=pipeline.kept_tokens(images[:1], torch.from_numpy(mask)))
    with pytest.raises(DataError, match="the codebook has 64"):
        kept = KeptTokens(torch.full((1, 30), 64), torch.ones(1, 30, dtype=torch.bool))
        pipeline.sample([1], kept=kept)
    with pytest.raises(ConfigError, match="keep is 'around'"):
        kept_pixels(torch.from_numpy(mask), "around")
    with pytest.raises(DataError, match="does not divide"):
        kept_tokens(torch.ones(63, 64, dtype=torch.bool), pipeline.config.pyramid)
    assert pipeline.edit(images[:0], mask).images.shape == (0, 64, 64, 3)
