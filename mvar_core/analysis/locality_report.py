"""What was measured of a model's attention: which scales it goes to, how near, how spread, by layer and head."""

# Shape suffixes: N layers, H heads, S scales (the first S the queries', the second the keys'), W windows.

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mvar_core.analysis.neighbourhoods import displacement_counts, displacement_grid, displacements
from mvar_core.analysis.recommendation import WINDOWS, Recommendation, part_of
from mvar_core.pyramid import AttentionPattern, ScalePrefixes, ScalePyramid


@dataclass(frozen=True)
class LocalityReport:
    """Attention statistics, averaged over images and the queries of each scale.

    Attributes:
        patch_sizes: The model's scales.
        scale_prefixes: How many scales the model sees.
        model_windows: The model's own windows.
        num_images: Images measured.
        scale_mass_by_head: Mass (N, H, S, S) by layer, head, query scale and key scale; rows sum to 1.
        window_mass_by_head: Mass (N, H, S, S, W) likewise, in the k×k window around the query's matching position in
            the scale of the keys (mvar_core.analysis.neighbourhoods), for each k of WINDOWS.
        entropy_by_head: Entropy (N, H, S) of a query's attention over all its keys, in nats.
        distance_by_head: Distance (N, H, S) between a query and the keys of its own scale in tokens, averaged by mass.
        last_scale_keys: Where the attention of the last scale's queries goes: one map per key scale (height, width),
            averaged over layers and heads; all of them sum to 1.
        last_scale_displacements: The same by where the key stands from the query's matching position: one map per key
            scale (2·height - 1, 2·width - 1), the matching position in its centre.
        recommended: Smallest settings that keep the wanted part.
    """

    patch_sizes: tuple[int | tuple[int, int], ...]
    scale_prefixes: ScalePrefixes
    model_windows: tuple[int, ...]
    num_images: int
    scale_mass_by_head: np.ndarray
    window_mass_by_head: np.ndarray
    entropy_by_head: np.ndarray
    distance_by_head: np.ndarray
    last_scale_keys: tuple[np.ndarray, ...]
    last_scale_displacements: tuple[np.ndarray, ...]
    recommended: Recommendation

    @cached_property
    def pyramid(self) -> ScalePyramid:
        """The model's scales."""
        return ScalePyramid.from_patch_sizes(self.patch_sizes)

    @cached_property
    def patterns(self) -> tuple[AttentionPattern, ...]:
        """What the model lets each scale see."""
        return self.pyramid.attention_patterns(self.scale_prefixes, self.model_windows)

    @property
    def scale_names(self) -> list[str]:
        """Each scale as its side, or height×width."""
        return [f"{size[0]}×{size[1]}" if isinstance(size, tuple) else str(size) for size in self.patch_sizes]

    @property
    def scale_mass(self) -> np.ndarray:
        """Mass by query scale and key scale (S, S), averaged over layers and heads."""
        mean: np.ndarray = self.scale_mass_by_head.mean(axis=(0, 1))
        return mean

    @property
    def window_mass_by_scale(self) -> dict[int, np.ndarray]:
        """For each k, the mass in the k×k window around the matching position, by query and key scale (S, S)."""
        means_SSW = self.window_mass_by_head.mean(axis=(0, 1))
        return {window: means_SSW[..., index] for index, window in enumerate(WINDOWS)}

    @property
    def window_mass(self) -> dict[int, np.ndarray]:
        """For each k, the part of all mass that falls in the k×k window of the query's own scale (S,)."""
        return {window: np.diagonal(mass_SS).copy() for window, mass_SS in self.window_mass_by_scale.items()}

    @property
    def window_share(self) -> dict[int, np.ndarray]:
        """For each k, the part of the own scale's mass that falls in the k×k window (S,)."""
        own_S = np.diagonal(self.scale_mass)
        return {window: part_of(mass_S, own_S) for window, mass_S in self.window_mass.items()}

    @cached_property
    def even_scale_mass(self) -> np.ndarray:
        """`scale_mass` of attention that were spread evenly over all that each query sees (S, S)."""
        return self._even(max(max(grid) for grid in self.pyramid) | 1)

    @cached_property
    def even_window_mass(self) -> dict[int, np.ndarray]:
        """`window_mass_by_scale` of such an even spread."""
        return {window: self._even(window) for window in WINDOWS}

    @property
    def even_entropy(self) -> np.ndarray:
        """Entropy of such an even spread, the most there can be: the logarithm of the keys that a query sees (S,)."""
        most: np.ndarray = np.log([pattern.keys_per_query for pattern in self.patterns])
        return most

    def even_keys(self, scale: int) -> np.ndarray:
        """`last_scale_keys` of such an even spread, of one key scale."""
        return self._even_map(scale)[0]

    def even_displacements(self, scale: int) -> np.ndarray:
        """`last_scale_displacements` of such an even spread, of one key scale."""
        return self._even_map(scale)[1]

    def _even_map(self, scale: int) -> tuple[np.ndarray, np.ndarray]:
        last, grid, pattern = self.pyramid.grids[-1], self.pyramid.grids[scale], self.patterns[-1]
        if scale < self.pyramid.first_visible_scale(len(self.patch_sizes) - 1, self.scale_prefixes):
            return np.zeros(grid), np.zeros(displacement_grid(grid))
        if scale < len(self.patch_sizes) - 1 or not pattern.is_windowed:
            keys, places = np.full(grid, last.tokens), displacement_counts(last, grid)
        else:
            keys, places = np.zeros(grid, np.int64), np.zeros(displacement_grid(grid), np.int64)
            positions = torch.arange(last.tokens)
            where_qG = displacements(positions, last, grid).numpy()
            for query in range(last.tokens):
                seen = np.array(pattern.visible_keys(query)[pattern.prefix_tokens :]) - pattern.prefix_tokens
                keys.flat[seen] += 1
                places.flat[where_qG[query, seen]] += 1
        pairs = last.tokens * pattern.keys_per_query
        return keys / pairs, places / pairs

    def _even(self, window: int) -> np.ndarray:
        grids = self.pyramid.grids
        mass_SS = np.zeros((len(grids), len(grids)))
        for scale, pattern in enumerate(self.patterns):
            first = self.pyramid.first_visible_scale(scale, self.scale_prefixes)
            for earlier in range(first, scale):
                mass_SS[scale, earlier] = min(window, grids[earlier].height) * min(window, grids[earlier].width)
            own = pattern.window_grid
            mass_SS[scale, scale] = min(window, own.height) * min(window, own.width)
            mass_SS[scale] /= pattern.keys_per_query
        return mass_SS

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the figures rightly."""
        notes = []
        if self.scale_prefixes != "all" and self.scale_prefixes < self.pyramid.num_scales:
            notes.append(
                f"The model sees {self.scale_prefixes} of its scales: mass on earlier ones is 0 by construction."
            )
        pairs = zip(self.patch_sizes, self.model_windows, strict=True)
        windowed = [f"{size} (window {window})" for size, window in pairs if window]
        if windowed:
            notes.append(f"Mass outside the model's own windows is 0 by construction: {', '.join(windowed)}.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The report as a mapping of plain values."""
        previous_NHS = np.zeros(self.entropy_by_head.shape)
        previous_NHS[..., 1:] = np.diagonal(self.scale_mass_by_head, offset=-1, axis1=2, axis2=3)
        figures = {
            "own_scale_mass": np.diagonal(self.scale_mass_by_head, axis1=2, axis2=3),
            "previous_scale_mass": previous_NHS,
            "entropy": self.entropy_by_head,
            "distance": self.distance_by_head,
        }
        layers, heads = self.entropy_by_head.shape[:2]
        return {
            "patch_sizes": [list(size) if isinstance(size, tuple) else size for size in self.patch_sizes],
            "scale_prefixes": self.scale_prefixes,
            "model_windows": list(self.model_windows),
            "num_images": self.num_images,
            "scale_mass": self.scale_mass.tolist(),
            "even_scale_mass": self.even_scale_mass.tolist(),
            "window_mass": _plain(self.window_mass),
            "window_share": _plain(self.window_share),
            "window_mass_by_scale": _plain(self.window_mass_by_scale),
            "even_window_mass_by_scale": _plain(self.even_window_mass),
            "last_scale": {
                "keys": [map_yx.tolist() for map_yx in self.last_scale_keys],
                "displacements": [map_yx.tolist() for map_yx in self.last_scale_displacements],
            },
            "layers": [
                {
                    "layer": layer,
                    **{name: values[layer].mean(axis=0).tolist() for name, values in figures.items()},
                    "heads": [
                        {"head": head, **{name: values[layer, head].tolist() for name, values in figures.items()}}
                        for head in range(heads)
                    ],
                }
                for layer in range(layers)
            ],
            "recommended": self.recommended.to_dict(),
            "notes": self.notes,
        }


def _plain(by_window: dict[int, np.ndarray]) -> dict[str, Any]:
    return {str(window): values.tolist() for window, values in by_window.items()}
