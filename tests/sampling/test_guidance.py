import pytest
import torch

from mvar_core.config import SamplingConfig
from mvar_core.errors import ConfigError
from mvar_core.pyramid import ScalePyramid
from mvar_core.sampling.guidance import (
    guidance_strengths,
    guide,
    keep_likely,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample_codes,
    sample_likely_codes,
    soft_embeddings,
    unconditional_scales,
)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)) * 2


def published_filter(row: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The published rule for one row, entry by entry."""
    kept = row.clone()
    if top_k:
        kept[row < row.sort(descending=True).values[top_k - 1]] = -torch.inf
    if 0 < top_p < 1:
        probabilities, total = kept.softmax(0), 0.0
        order = probabilities.argsort(stable=True)
        for entry in order[:-1]:
            total += probabilities[entry].item()
            if total <= 1 - top_p:
                kept[entry] = -torch.inf
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (7, 0.5), (1, 0.96), (40, 1.0), (12, 0.96)])
def test_filters_follow_the_published_rule(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    found = keep_likely(logits, SamplingConfig(top_k=top_k, top_p=top_p))
    expected = torch.stack([published_filter(row, top_k, top_p) for row in logits.flatten(0, 1)])
    assert torch.equal(found.flatten(0, 1), expected)


def test_ties_with_the_kth_stay() -> None:
    assert torch.equal(
        keep_top_k(torch.tensor([[[3.0, 2.0, 2.0, 1.0]]]), 2), torch.tensor([[[3.0, 2.0, 2.0, -torch.inf]]])
    )


def test_the_most_likely_always_stays() -> None:
    filtered = keep_top_p(torch.tensor([[[0.0, 0.1, 0.2]]]), 1e-9)
    assert filtered.isfinite().sum() == 1
    assert filtered.argmax() == 2


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = probabilities.log().expand(1, 10_000, 4).float()
    counts = sample_codes(logits, uniforms[None])[0].bincount(minlength=4)
    assert counts.tolist() == [5000, 0, 2000, 3000]


def test_extreme_uniforms_never_draw_a_filtered_entry() -> None:
    logits = torch.tensor([[[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]]).expand(1, 2, 5)
    uniforms = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert sample_codes(logits, uniforms).tolist() == [[1, 3]]


def test_guidance_is_linear() -> None:
    conditional, unconditional = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    assert torch.equal(guide(conditional, unconditional, 0), conditional)
    assert torch.allclose(guide(conditional, unconditional, 1.5), 2.5 * conditional - 1.5 * unconditional)


def test_soft_embeddings_mix_kept_codes(logits: torch.Tensor) -> None:
    codebook = torch.eye(40)
    uniforms = torch.rand(3, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    uniforms[0, 0, 0] = 0.0
    filtered = keep_top_k(logits, 3)
    weights = soft_embeddings(filtered, uniforms, codebook, 0.5)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 5), atol=1e-6)
    assert weights[filtered == -torch.inf].abs().max() == 0
    last = soft_embeddings(filtered, uniforms, codebook, 1.0)
    assert (last.amax(-1) > weights.amax(-1) - 1e-6).float().mean() > 0.9


FILTERS = [(0, 0.0), (5, 0.0), (0, 0.8), (7, 0.5), (1, 0.96), (40, 1.0), (39, 0.9), (12, 0.96), (40, 0.3)]


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_the_quick_draw_is_the_draw_of_what_the_filters_keep(top_k: int, top_p: float) -> None:
    """Equal tokens where the filtered codes are laid out in descending order, in which the quick one draws."""
    logits = torch.randn(50, 8, 40, generator=torch.Generator().manual_seed(2)) * 3
    uniforms = torch.rand(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    filtered = keep_likely(logits, SamplingConfig(top_k=top_k, top_p=top_p))
    if top_k in (0, 40) and top_p in (0, 1):
        expected = sample_codes(filtered, uniforms)
    else:
        descending, order = filtered.sort(dim=-1, descending=True)
        expected = order.gather(-1, sample_codes(descending, uniforms).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(sample_likely_codes(logits, uniforms, SamplingConfig(top_k=top_k, top_p=top_p)), expected)


MIN_P = [1e-3, 0.05, 0.3, 1.0]


@pytest.mark.parametrize("min_p", MIN_P)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_min_p_keeps_a_fraction_of_the_likeliest(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    found = keep_likely(logits, SamplingConfig(top_k=top_k, top_p=top_p, min_p=min_p)).flatten(0, 1)
    for row, kept in zip(logits.flatten(0, 1), found, strict=True):
        expected = published_filter(row, top_k, top_p)
        probabilities = expected.double().softmax(0).tolist()
        for code, probability in enumerate(probabilities):
            if probability < min_p * max(probabilities):
                expected[code] = -torch.inf
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("min_p", MIN_P)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_the_quick_draw_keeps_min_p(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(50, 8, 40, generator=torch.Generator().manual_seed(2)) * 3
    uniforms = torch.rand(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    settings = SamplingConfig(top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = keep_likely(logits, settings)
    if top_k in (0, 40) and top_p in (0, 1):
        expected = sample_codes(filtered, uniforms)
    else:
        descending, order = filtered.sort(dim=-1, descending=True)
        expected = order.gather(-1, sample_codes(descending, uniforms).unsqueeze(-1)).squeeze(-1)
    given = logits.clone()
    assert torch.equal(sample_likely_codes(logits, uniforms, settings), expected)
    assert torch.equal(logits, given), "what was passed is left as it is"


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_min_p_of_zero_changes_no_bit(logits: torch.Tensor, top_k: int, top_p: float) -> None:
    """Against the sampling and the filters as they were before there was the setting."""
    settings = SamplingConfig(top_k=top_k, top_p=top_p, min_p=0)
    assert torch.equal(keep_likely(logits, settings), keep_top_p(keep_top_k(logits, top_k), top_p))
    uniforms = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    limited, nucleus = 0 < top_k < 40, 0 < top_p < 1
    values, order = (
        logits.topk(top_k if limited else 40) if limited or nucleus else (logits, torch.arange(40).expand_as(logits))
    )
    cumulative = values.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    if nucleus:
        total = cumulative.gather(-1, torch.searchsorted(cumulative, top_p * total))
    below = torch.nextafter(total, torch.zeros_like(total))
    ranks = torch.searchsorted(cumulative, torch.minimum(uniforms.unsqueeze(-1) * total, below), right=True)
    assert torch.equal(sample_likely_codes(logits, uniforms, settings), order.gather(-1, ranks).squeeze(-1))


def test_min_p_counts_ties() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, 1.0, 1.0, -4.0]).expand(1, 4000, 6)
    uniforms = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[None]
    assert keep_min_p(logits, 1.0)[0, 0].isfinite().tolist() == [False, True, True, False, False, False]
    for top_k in (0, 1, 2, 3):  # the first and the last are cut within a tie
        for top_p in (0.0, 0.9999):
            settings = SamplingConfig(top_k=top_k, top_p=top_p, min_p=1.0)
            assert sample_likely_codes(logits, uniforms, settings)[0].bincount(minlength=6).tolist()[1:3] == [
                2000,
                2000,
            ]


def test_ties_with_the_kth_are_drawn_too() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 1.0, 1.0, -4.0]).expand(1, 4000, 6)
    uniforms = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[None]
    for top_p in (0.0, 1.0, 0.9999):
        counts = sample_likely_codes(logits, uniforms, SamplingConfig(top_k=2, top_p=top_p))[0].bincount(minlength=6)
        assert counts[[0, 5]].tolist() == [0, 0]
        expected = 4000 * logits[0, 0, 1:5].softmax(0)
        assert (counts[1:5] - expected).abs().max() <= 2
    assert set(
        sample_likely_codes(torch.zeros(1, 4000, 6), uniforms, SamplingConfig(top_k=1, top_p=0.0))[0].tolist()
    ) == set(range(6))


def test_the_quick_draw_at_the_ends() -> None:
    logits = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]]).expand(1, 2, 4)
    uniforms = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert sample_likely_codes(logits, uniforms, SamplingConfig(top_k=3, top_p=0.0)).tolist() == [[1, 2]]
    assert sample_likely_codes(logits, uniforms, SamplingConfig(top_k=3, top_p=1e-9)).tolist() == [[1, 1]]
    assert sample_likely_codes(logits, uniforms, SamplingConfig(top_k=0, top_p=0.9)).tolist() == [[1, 2]]


def test_guidance_schedules() -> None:
    pyramid = ScalePyramid.from_patch_sizes((1, 2, 3, 4, 5))
    assert guidance_strengths(SamplingConfig(cfg=2), pyramid) == (0, 0.5, 1, 1.5, 2)
    assert guidance_strengths(SamplingConfig(cfg=2, cfg_schedule="constant"), pyramid) == (2,) * 5
    cosine = guidance_strengths(SamplingConfig(cfg=2, cfg_schedule="cosine"), pyramid)
    assert cosine == pytest.approx((0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2))
    assert guidance_strengths(SamplingConfig(cfg_schedule=(0, 0, 1, 0, 3)), pyramid) == (0, 0, 1, 0, 3)
    assert guidance_strengths(SamplingConfig(cfg=2, cfg_scales=(2, 3)), pyramid) == (0, 0, 1, 1.5, 0)
    with pytest.raises(ConfigError, match="cfg-schedule has 2 numbers; the pyramid has 5 scales"):
        guidance_strengths(SamplingConfig(cfg_schedule=(0, 1)), pyramid)
    with pytest.raises(ConfigError, match="ends at scale 7; the model has scales 0 … 4"):
        guidance_strengths(SamplingConfig(cfg_scales=(2, 7)), pyramid)
    with pytest.raises(ConfigError, match="negative"):
        SamplingConfig(cfg_schedule=(0, -1))
    with pytest.raises(ConfigError, match="first and a last"):
        SamplingConfig(cfg_scales=(3, 2))


def test_the_unconditional_half_runs_where_it_is_needed() -> None:
    markov, two, everything = (0, 1, 2, 3, 4), (0, 0, 1, 2, 3), (0,) * 5
    strengths = (0.0, 0.0, 0.0, 1.0, 0.0)
    assert unconditional_scales(strengths, markov) == (False, False, False, True, False)
    assert unconditional_scales(strengths, two) == (True, True, True, True, False), "through the scales between"
    assert unconditional_scales(strengths, everything) == (True, True, True, True, False)
    assert unconditional_scales((0.0,) * 5, everything) == (False,) * 5
