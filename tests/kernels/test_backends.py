"""Every backend against the reference: outputs and gradients, then what each promises beyond that."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvar_core.analysis.measure import allocation_peak
from mvar_core.kernels import BACKEND_NAMES, attend, available_backends, natten, tiled
from mvar_core.kernels.tiled import cut
from mvar_core.pyramid import AttentionPattern, Grid, ScalePyramid

SIDES = (*range(1, 18), 24, 32)
WINDOWS = (1, 3, 5, 7, 9)
WIDTHS = (8, 16, 24, 32, 48, 64)
PREFIXES = (0, 5, 0, 1, 14)
GRIDS = (Grid(1, 7), Grid(9, 1), Grid(4, 13), Grid(17, 6), Grid(12, 31), Grid(2, 2))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def cases(grids, windows_per_grid):
    """A covering set: heads, widths and prefixes cycle at different paces through grids and windows."""
    index = 0
    for grid in grids:
        for window in windows_per_grid(index):
            pattern = AttentionPattern(grid, window, PREFIXES[index % len(PREFIXES)])
            yield pytest.param(
                pattern, 1 + index % 4, WIDTHS[index % len(WIDTHS)], id=f"{pattern.grid}-k{window}-{index}"
            )
            index += 1


SQUARES = tuple(Grid(side, side) for side in SIDES)
FULL = [*cases((*SQUARES, *GRIDS), lambda index: WINDOWS), *cases((*SQUARES[:12], *GRIDS[:4]), lambda index: (0,))]
# NATTEN without compiled kernels spends its time on preparing each new shape.
SPARSE = [*cases((*SQUARES, *GRIDS), lambda index: (WINDOWS[(index + 1) % len(WINDOWS)],))]
SPARSE += [*cases((Grid(1, 1), Grid(5, 5), Grid(4, 7)), lambda index: (0, 3, 9))]

on_devices = pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
needs_natten = pytest.mark.skipif(
    dict(available_backends())["natten"] is not None, reason=str(dict(available_backends())["natten"])
)


def assert_near(found, expected, tolerance):
    assert len(found) == len(expected)
    for name, value, wanted in zip(("output", "dq", "dk", "dv"), found, expected, strict=False):
        error = (value.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def assert_equals_reference(make_inputs, attend_with_gradients):
    def check(backend, pattern, heads, width, dtype, device="cpu"):
        inputs = make_inputs(pattern, heads=heads, width=width, dtype=dtype, device=device)
        scale = 1.5 / width**0.5
        expected = attend_with_gradients([x.float() for x in inputs], pattern, scale, "reference")
        found = attend_with_gradients(inputs, pattern, scale, backend)
        assert all(x.dtype == dtype for x in found)
        assert_near(found, expected, TOLERANCE[dtype])

    return check


@on_devices
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize(("pattern", "heads", "width"), FULL)
def test_equals_reference_in_float32(assert_equals_reference, backend, pattern, heads, width, device):
    assert_equals_reference(backend, pattern, heads, width, torch.float32, device)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize(("pattern", "heads", "width"), SPARSE)
def test_equals_reference_in_half_precision(assert_equals_reference, backend, pattern, heads, width, dtype, device):
    assert_equals_reference(backend, pattern, heads, width, dtype, device)


@on_devices
@pytest.mark.parametrize(
    "pattern",
    [
        *ScalePyramid.for_image(256, 384).attention_patterns(1, (0,) * 7 + (7, 7, 7))[7:],
        ScalePyramid.for_image(256, 384).attention_patterns("all", (0,) * 9 + (7,))[9],
        ScalePyramid.for_image(128, 1024).attention_patterns(1, (0,) * 9 + (11,))[9],  # longer than the height
    ],
    ids=lambda pattern: f"{pattern.grid}-k{pattern.window}-{pattern.prefix_tokens}",
)
def test_scales_of_wide_images_equal_the_reference(assert_equals_reference, backend, pattern, device):
    assert_equals_reference(backend, pattern, 2, 16, torch.float32, device)


@needs_natten
@on_devices
@pytest.mark.parametrize(("pattern", "heads", "width"), SPARSE)
def test_natten_equals_reference(assert_equals_reference, pattern, heads, width, device):
    for dtype in (torch.float32, torch.bfloat16):
        assert_equals_reference("natten", pattern, heads, width, dtype, device)


# FlexAttention prepares itself again for each shape, as NATTEN without kernels does, which runs on it.
@on_devices
@pytest.mark.parametrize(("pattern", "heads", "width"), SPARSE[::3])
def test_flex_equals_reference(assert_equals_reference, pattern, heads, width, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_equals_reference("flex", pattern, heads, width, dtype, device)


@needs_natten
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested")
@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:return_lse is deprecated")
@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(1, 9), Grid(9, 1), Grid(3, 3)])
@pytest.mark.parametrize("prefix", [0, 6])
def test_what_nattens_kernels_are_given(make_inputs, monkeypatch, grid, prefix):
    """The call for compiled kernels, answered by NATTEN's stand-in for a CPU: layout, padding, additional keys."""
    monkeypatch.setattr(natten, "_has_kernels", lambda device: True)
    pattern = AttentionPattern(grid, 3, prefix)
    q, k, v, _ = make_inputs(pattern, width=16)
    output = attend(q, k, v, pattern, scale=0.6, backend="natten")
    expected = attend(q, k, v, pattern, scale=0.6, backend="reference")
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_works_on_strided_inputs_without_gradients(make_inputs, backend):
    """Queries, keys and values as a fused projection leaves them: (B, L, 3, H, D), cut and permuted."""
    pattern = AttentionPattern(Grid(6, 9), 5)
    packed = torch.randn(2, pattern.queries, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    output = attend(q, k, v, pattern, scale=0.7, backend=backend)
    expected = attend(q.contiguous(), k.contiguous(), v.contiguous(), pattern, scale=0.7, backend="reference")
    assert not output.requires_grad
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_only_those_who_ask(make_inputs, backend):
    pattern = AttentionPattern(Grid(5, 5), 3, prefix_tokens=2)
    q, k, v, gradient = make_inputs(pattern)
    v.requires_grad_()
    attend(q, k, v, pattern, scale=0.7, backend=backend).backward(gradient)
    assert v.grad is not None
    assert q.grad is None
    assert k.grad is None


def test_keys_outside_the_window_weigh_nothing(make_inputs, backend):
    """Huge keys and values outside a query's window leave its output as it was."""
    pattern = AttentionPattern(Grid(8, 7), 3, prefix_tokens=3)
    q, k, v, _ = make_inputs(pattern)
    clean = attend(q, k, v, pattern, scale=0.5, backend=backend)
    for query in (0, 27, 55):
        hidden = torch.ones(pattern.keys, dtype=torch.bool)
        hidden[pattern.visible_keys(query)] = False
        huge = [x.masked_fill(hidden[:, None], 1e4) for x in (k, v)]
        found = attend(q, *huge, pattern, scale=0.5, backend=backend)
        torch.testing.assert_close(found[:, :, query], clean[:, :, query], rtol=1e-5, atol=1e-6)


def force_tiles(monkeypatch, tile_rows, tile_columns):
    """Tiles of a given size, whatever is expected to be fast."""

    def plan(pattern, heads):
        return cut(pattern, min(tile_rows, pattern.grid.height), -(-pattern.grid.width // tile_columns))

    monkeypatch.setattr(tiled, "plan_tiling", plan)


TILES = ((1, 1), (2, 3), (3, 16), (4, 4), (5, 2), (8, 8), (16, 1))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("grid", [Grid(13, 13), Grid(16, 9), Grid(5, 18)], ids=str)
def test_tiled_equals_reference_with_tiles_of_every_size(
    make_inputs, attend_with_gradients, monkeypatch, grid, window, tile
):
    """Also where the last tile reaches beyond the map, and tiles are smaller than half a window."""
    force_tiles(monkeypatch, *tile)
    pattern = AttentionPattern(grid, window, prefix_tokens=(window + tile[0]) % 4)
    inputs = make_inputs(pattern, width=8)
    expected = attend_with_gradients(inputs, pattern, 0.6, "reference")
    assert_near(attend_with_gradients(inputs, pattern, 0.6, "tiled"), expected, 1e-5)


def test_tiled_never_reads_beyond_a_tiles_halo(make_inputs, monkeypatch):
    """With tiles of 8×8 and windows of 3×3, the first tile of a map reads rows and columns 0 … 8 and no others."""
    force_tiles(monkeypatch, 8, 8)
    pattern = AttentionPattern(Grid(24, 24), 3)
    q, k, v, _ = make_inputs(pattern)
    position = torch.arange(24)
    beyond = ((position[:, None] > 8) | (position[None, :] > 8)).flatten()
    tile = ((position[:, None] < 8) & (position[None, :] < 8)).flatten()
    poisoned = [x.masked_fill(beyond[:, None], torch.nan) for x in (k, v)]
    clean = attend(q, k, v, pattern, scale=0.5, backend="tiled")
    found = attend(q, *poisoned, pattern, scale=0.5, backend="tiled")
    assert found.isnan().any()
    assert torch.equal(found[:, :, tile], clean[:, :, tile])


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_sample_of_nan_spoils_no_other(make_inputs, backend, prefix):
    """The memory that pieces are copied to is used again; no image or head may leave anything in it."""
    pattern = AttentionPattern(Grid(18, 18), 7, prefix)
    q, k, v, _ = make_inputs(pattern, batch=3)
    clean = attend(q, k, v, pattern, scale=0.5, backend=backend)
    for x in (q, k, v):
        x[1] = torch.nan
    found = attend(q, k, v, pattern, scale=0.5, backend=backend)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_tiled_work_grows_with_tokens_and_not_with_their_square(make_inputs, monkeypatch):
    scores = 0
    inner = F.scaled_dot_product_attention

    def counting(q, k, v, **options):
        nonlocal scores
        scores += q.shape[:-1].numel() * k.shape[-2]
        return inner(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    work = []
    for side in (16, 32, 64):
        pattern = AttentionPattern(Grid(side, side), 7)
        scores = 0
        attend(*make_inputs(pattern, batch=1, heads=1, width=8)[:3], pattern, scale=1.0, backend="tiled")
        work.append(scores / side**2)
    assert max(work) <= (8 + 7 - 1) ** 2
    assert work[2] <= 1.2 * work[1]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_tiled_memory_of_the_largest_scale_of_1024_pixels_is_bounded(make_inputs, needs_grad):
    """64×64 tokens, 7×7 windows: beside what is as large as the inputs, a few pieces; never a matrix of scores."""
    pattern = AttentionPattern(Grid(64, 64), 7)
    inputs = make_inputs(pattern, batch=2, heads=4, width=64)
    *leaves, gradient = [x.requires_grad_(needs_grad) for x in inputs[:3]] + [inputs[3]]

    def call(backend):
        output = attend(*leaves, pattern, scale=0.125, backend=backend)
        return torch.autograd.grad(output, leaves, gradient) if needs_grad else output

    call("tiled")  # masks are made once
    piece = 4 * tiled.PIECE_ELEMENTS
    as_large_as_an_input = 6 if needs_grad else 1
    with allocation_peak() as live:
        result = call("tiled")
    del result
    assert (
        gradient.nbytes < live.peak_bytes <= as_large_as_an_input * gradient.nbytes + (5 if needs_grad else 2) * piece
    )
    assert live.peak_bytes < 4 * pattern.queries * pattern.keys, "a matrix of scores"


def test_tiled_memory_does_not_grow_with_the_batch(make_inputs):
    """Beyond the output, 2 and 8 images of 32×32 tokens and 16 heads take the same."""
    pattern = AttentionPattern(Grid(32, 32), 7)
    beyond = []
    for batch in (2, 8):
        q, k, v, _ = make_inputs(pattern, batch=batch, heads=16, width=32)
        attend(q, k, v, pattern, scale=0.125, backend="tiled")
        with allocation_peak() as live:
            output = attend(q, k, v, pattern, scale=0.125, backend="tiled")
        beyond.append(live.peak_bytes - output.nbytes)
    assert 0 < beyond[1] <= 1.02 * beyond[0]


@pytest.mark.parametrize("window", [3, 9])
@pytest.mark.parametrize("piece_elements", [1, 40_000])
def test_tiled_equals_reference_in_small_pieces(
    make_inputs, attend_with_gradients, monkeypatch, piece_elements, window
):
    pattern = AttentionPattern(Grid(19, 11), window, prefix_tokens=4)
    inputs = make_inputs(pattern)
    expected = attend_with_gradients(inputs, pattern, 0.6, "reference")
    monkeypatch.setattr(tiled, "PIECE_ELEMENTS", piece_elements)
    assert_near(attend_with_gradients(inputs, pattern, 0.6, "tiled"), expected, 1e-5)
    with torch.no_grad():
        assert_near([attend(*inputs[:3], pattern, scale=0.6, backend="tiled")], expected[:1], 1e-5)


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(5, 2)])
def test_tiled_gradients_equal_finite_differences(make_inputs, monkeypatch, grid):
    force_tiles(monkeypatch, 2, 2)
    pattern = AttentionPattern(grid, 3, prefix_tokens=1)
    leaves = [x.double().requires_grad_() for x in make_inputs(pattern, batch=1, heads=1, width=2)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, pattern, scale=0.8, backend="tiled"), leaves)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("side", [4, 13, 24])
def test_a_sample_does_not_depend_on_its_batch(make_inputs, backend, side):
    pattern = AttentionPattern(Grid(side, side), 7, prefix_tokens=side)
    q, k, v, _ = make_inputs(pattern, batch=8, width=64)
    together = attend(q, k, v, pattern, scale=0.5, backend=backend)
    for first, last in ((0, 1), (2, 5), (7, 8)):
        part = slice(first, last)
        assert torch.equal(attend(q[part], k[part], v[part], pattern, scale=0.5, backend=backend), together[part])


def test_what_was_made_in_inference_mode_serves_training(make_inputs, attend_with_gradients, backend):
    """Masks and tiles are kept between calls; the first call may have been one without gradients."""
    # A pattern of its own for each backend: one may use what another keeps.
    pattern = AttentionPattern(Grid(6, 11), 3, prefix_tokens=20 + BACKEND_NAMES.index(backend))
    inputs = make_inputs(pattern)
    with torch.inference_mode():
        attend(*inputs[:3], pattern, scale=0.5, backend=backend)
    output, *_ = attend_with_gradients(inputs, pattern, 0.5, backend)
    assert output.isfinite().all()


def test_autocast_decides_the_dtype(make_inputs, backend):
    """L2-normalised queries and keys leave autocast in float32 while values are in bfloat16."""
    pattern = AttentionPattern(Grid(5, 5), 3)
    q, k, v, _ = make_inputs(pattern)
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(q, k, v.bfloat16(), pattern, scale=0.5, backend=backend)
    assert output.dtype == torch.bfloat16
