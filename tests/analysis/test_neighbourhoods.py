from __future__ import annotations

import math

import pytest
import torch

from mvar_core.analysis.attention import (
    displacement_grid,
    displacements,
    distances,
    matching_positions,
    needed_windows,
)
from mvar_core.pyramid import AttentionPattern, Grid

GRIDS = [Grid(1, 1), Grid(2, 2), Grid(5, 5), Grid(8, 8), Grid(3, 6), Grid(7, 4)]


@pytest.mark.parametrize("grid", GRIDS)
def test_needed_windows_agree_with_the_pattern(grid):
    needed = needed_windows(torch.arange(grid.tokens), grid)
    for window in range(1, max(grid) + 3, 2):
        pattern = AttentionPattern(grid, window)
        for query in range(grid.tokens):
            assert (needed[query] <= window).nonzero().flatten().tolist() == pattern.visible_keys(query)


@pytest.mark.parametrize(("queries", "keys"), [(16, 13), (13, 16), (5, 5), (4, 1), (2, 8), (3, 2)])
def test_matching_positions_hold_the_centre(queries, keys):
    found = matching_positions(queries, keys)
    assert found == tuple(math.floor((y + 0.5) * keys / queries) for y in range(queries))
    assert min(found) >= 0
    assert max(found) < keys
    if queries == keys:
        assert found == tuple(range(keys))


def test_windows_in_another_scale_stand_around_the_matching_position():
    # Query (3, 5) of 4×6 has its centre at (3.5·2/4, 5.5·3/6) = (1.75, 2.75) of 2×3: position (1, 2).
    needed = needed_windows(torch.tensor([3 * 6 + 5]), Grid(4, 6), Grid(2, 3))
    # Of width 3 the window shifts inward and covers all; of height 2 a window of 3 covers all.
    assert needed.view(2, 3).tolist() == [[3, 3, 3], [3, 3, 1]]


@pytest.mark.parametrize(("of", "to"), [(Grid(4, 6), Grid(2, 3)), (Grid(3, 3), Grid(3, 3)), (Grid(2, 5), Grid(4, 1))])
def test_displacements_are_counted_from_the_matching_position(of, to):
    found = displacements(torch.arange(of.tokens), of, to)
    wide = displacement_grid(to)
    assert wide == (2 * to.height - 1, 2 * to.width - 1)
    for query in range(of.tokens):
        y, x = divmod(query, of.width)
        my, mx = math.floor((y + 0.5) * to.height / of.height), math.floor((x + 0.5) * to.width / of.width)
        for key in range(to.tokens):
            dy, dx = key // to.width - my, key % to.width - mx
            assert divmod(int(found[query, key]), wide.width) == (dy + to.height - 1, dx + to.width - 1)


def test_distances_are_euclidean():
    found = distances(torch.tensor([0, 5]), Grid(2, 3))
    assert found[0].tolist() == pytest.approx([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)])
    assert found[1].tolist() == pytest.approx([math.sqrt(5), math.sqrt(2), 1, 2, 1, 0])
