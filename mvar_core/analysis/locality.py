"""Where a model's attention goes: to which scales, and how near in its own scale.

The statistics are gathered while the model runs, from the queries and keys of one layer and scale at a time; no L×L map
is ever held. All sums are float64. "Mass" is attention probability; each query has a total mass of 1.
"""

# Shape suffixes: B images, H heads, Q queries of one scale, K keys of one scale (those of earlier scales first),
# D head width, S scales, N layers, W windows; q a chunk of the queries, G the positions of the scale's own grid.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mvar_core.config import ModelConfig
from mvar_core.errors import DataError
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.scales import AttentionPattern, Grid, ScalePrefixes, window_start

WINDOWS = (1, 3, 5, 7, 9, 11, 13, 15)
"""Sides k of the windows whose mass is measured."""

CHUNK_NUMBERS = 1 << 22
"""Attention probabilities that are held at once."""


@dataclass(frozen=True)
class Recommendation:
    """The smallest settings that keep a wanted part of the attention.

    Attributes:
        scale_prefixes: Scales a token must see, its own included.
        windows: One window per scale, 0 for the whole scale.
        keep: The wanted part.
        kept_by_prefixes: Mass within the recommended prefixes, per scale.
        kept_by_windows: Part of a scale's own mass within its recommended window, per scale.
    """

    scale_prefixes: ScalePrefixes
    windows: tuple[int, ...]
    keep: float
    kept_by_prefixes: tuple[float, ...]
    kept_by_windows: tuple[float, ...]


@dataclass(frozen=True)
class LocalityReport:
    """Attention statistics, averaged over images and the queries of each scale.

    Attributes:
        patch_sizes: The model's scales.
        scale_prefixes: How many scales the model sees.
        model_windows: The model's own windows.
        num_images: Images measured.
        scale_mass_by_head: Mass (N, H, S, S) by layer, head, query scale and key scale; rows sum to 1.
        window_mass_by_head: Mass (N, H, S, W) in the k×k window around the query in its own scale, for each k of
            WINDOWS. Windows are shifted inward at the borders, so all have k×k keys; a window larger than the scale is
            the whole scale.
        entropy_by_head: Entropy (N, H, S) of a query's attention over all its keys, in nats.
        distance_by_head: Distance (N, H, S) between a query and the keys of its own scale in tokens, averaged by mass.
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
    recommended: Recommendation

    @property
    def scale_mass(self) -> np.ndarray:
        """Mass by query scale and key scale (S, S), averaged over layers and heads."""
        mean: np.ndarray = self.scale_mass_by_head.mean(axis=(0, 1))
        return mean

    @property
    def window_mass(self) -> dict[int, np.ndarray]:
        """For each k, the part of all mass that falls in the k×k window of the query's own scale (S,)."""
        means_SW = self.window_mass_by_head.mean(axis=(0, 1))
        return {window: means_SW[:, index] for index, window in enumerate(WINDOWS)}

    @property
    def window_share(self) -> dict[int, np.ndarray]:
        """For each k, the part of the own scale's mass that falls in the k×k window (S,)."""
        own_S = np.diagonal(self.scale_mass)
        return {window: _share(mass_S, own_S) for window, mass_S in self.window_mass.items()}

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the figures rightly."""
        notes = []
        if self.scale_prefixes != "all":
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
        return {
            "patch_sizes": [list(size) if isinstance(size, tuple) else size for size in self.patch_sizes],
            "num_images": self.num_images,
            "scale_mass": self.scale_mass.tolist(),
            "window_mass": {str(window): mass_S.tolist() for window, mass_S in self.window_mass.items()},
            "window_share": {str(window): share_S.tolist() for window, share_S in self.window_share.items()},
            "layers": [
                {
                    "layer": layer,
                    "own_scale_mass": np.diagonal(self.scale_mass_by_head[layer].mean(axis=0)).tolist(),
                    "entropy": self.entropy_by_head[layer].mean(axis=0).tolist(),
                    "distance": self.distance_by_head[layer].mean(axis=0).tolist(),
                }
                for layer in range(len(self.entropy_by_head))
            ],
            "recommended": {
                "scale_prefixes": self.recommended.scale_prefixes,
                "windows": list(self.recommended.windows),
                "keep": self.recommended.keep,
                "kept_by_prefixes": list(self.recommended.kept_by_prefixes),
                "kept_by_windows": list(self.recommended.kept_by_windows),
            },
            "notes": self.notes,
        }


class LocalityProbe:
    """Gathers attention statistics; an instance is what a Transformer takes as `probe`.

    Args:
        config: The model that will be probed; `config.transformer` must be there.
    """

    def __init__(self, config: ModelConfig):
        assert config.transformer is not None
        self.config = config
        sizes, scales = config.transformer, config.pyramid.num_scales
        shape = (sizes.depth, sizes.num_heads, scales)
        self._scale_mass_NHSS = torch.zeros(*shape, scales, dtype=torch.float64)
        self._window_mass_NHSW = torch.zeros(*shape, len(WINDOWS), dtype=torch.float64)
        self._entropy_NHS = torch.zeros(shape, dtype=torch.float64)
        self._distance_NHS = torch.zeros(shape, dtype=torch.float64)
        self._images_NS = torch.zeros(sizes.depth, scales, dtype=torch.int64)

    @torch.no_grad()
    def __call__(
        self,
        layer: int,
        scale: int,
        q_BHQD: Float[Tensor, "B H Q D"],
        k_BHKD: Float[Tensor, "B H K D"],
        pattern: AttentionPattern,
        softmax_scale: float,
    ) -> None:
        """Add the attention of one layer and scale.

        Args:
            layer: Index of the block.
            scale: Index of the scale.
            q_BHQD: Queries as they enter the attention.
            k_BHKD: Keys as they enter the attention, earlier scales first.
            pattern: What the queries see.
            softmax_scale: Multiplies the products of queries and keys.
        """
        if q_BHQD.device.type == "mps":  # has no float64
            q_BHQD, k_BHKD = q_BHQD.cpu(), k_BHKD.cpu()
        dtype = torch.promote_types(q_BHQD.dtype, torch.float32)
        q_BHQD, k_BHKD = q_BHQD.detach().to(dtype) * softmax_scale, k_BHKD.detach().to(dtype)
        batch, heads, queries, _ = q_BHQD.shape
        chunk = max(1, CHUNK_NUMBERS // (batch * heads * pattern.keys))
        for start in range(0, queries, chunk):
            positions = torch.arange(start, min(start + chunk, queries), device=q_BHQD.device)
            needed_qG = needed_windows(pattern.grid, positions)
            with torch.autocast(q_BHQD.device.type, enabled=False):
                scores_BHqK = q_BHQD[:, :, positions] @ k_BHKD.transpose(-1, -2)
            if pattern.is_windowed:
                hidden_qG = needed_qG > pattern.window
                scores_BHqK[..., pattern.prefix_tokens :].masked_fill_(hidden_qG, -math.inf)
            mass_BHqK = scores_BHqK.softmax(dim=-1)
            entropy_BHq = torch.special.entr(mass_BHqK).sum(dim=-1)
            self._entropy_NHS[layer, :, scale] += entropy_BHq.sum(dim=(0, 2), dtype=torch.float64).cpu()
            self._add_mass(layer, scale, mass_BHqK.sum(dim=0, dtype=torch.float64), positions, needed_qG, pattern)
        self._images_NS[layer, scale] += batch

    def report(self, keep: float = 0.95) -> LocalityReport:
        """Averages of what was gathered.

        Args:
            keep: Part of the attention that recommended settings must keep.

        Raises:
            DataError: Some layer or scale saw no image, or `keep` is not between 0 and 1.
        """
        if not 0 < keep <= 1:
            raise DataError(
                f"keep is {keep}; expected a part of the attention above 0 and at most 1, for example 0.95."
            )
        if not bool((self._images_NS > 0).all()):
            raise DataError("No attention was measured: there were no images.", "Give at least one image or token row.")
        tokens_S = torch.tensor([grid.tokens for grid in self.config.pyramid], dtype=torch.float64)
        queries_NS = self._images_NS * tokens_S
        queries_N1S = queries_NS.unsqueeze(1)
        scale_mass_NHSS = (self._scale_mass_NHSS / queries_N1S.unsqueeze(-1)).numpy()
        window_mass_NHSW = (self._window_mass_NHSW / queries_N1S.unsqueeze(-1)).numpy()
        own_NHS = self._scale_mass_NHSS.diagonal(dim1=2, dim2=3)
        return LocalityReport(
            patch_sizes=self.config.pyramid.patch_sizes,
            scale_prefixes=self.config.attention.scale_prefixes,
            model_windows=tuple(p.window if p.is_windowed else 0 for p in self.config.patterns),
            num_images=int(self._images_NS[0, 0]),
            scale_mass_by_head=scale_mass_NHSS,
            window_mass_by_head=window_mass_NHSW,
            entropy_by_head=(self._entropy_NHS / queries_N1S).numpy(),
            distance_by_head=(self._distance_NHS / own_NHS).nan_to_num(0.0).numpy(),
            recommended=recommend(
                scale_mass_NHSS.mean(axis=(0, 1)), window_mass_NHSW.mean(axis=(0, 1)), tuple(self.config.pyramid), keep
            ),
        )

    def _add_mass(
        self,
        layer: int,
        scale: int,
        mass_HqK: Tensor,
        positions: Tensor,
        needed_qG: Tensor,
        pattern: AttentionPattern,
    ) -> None:
        """Add what is linear in the mass, so that images can be summed first."""
        by_key_HK = mass_HqK.sum(dim=1)
        spans = self.config.pyramid.spans
        offset = spans[scale].start - pattern.prefix_tokens
        for earlier in range(scale + 1):
            if spans[earlier].start >= offset:
                keys = slice(spans[earlier].start - offset, spans[earlier].stop - offset)
                self._scale_mass_NHSS[layer, :, scale, earlier] += by_key_HK[:, keys].sum(dim=-1).cpu()
        own_HqG = mass_HqK[..., pattern.prefix_tokens :]
        # Windows are nested, so the mass of window k is what needs a window of at most k.
        inside_WqG = torch.stack([needed_qG <= window for window in WINDOWS]).to(own_HqG.dtype)
        window_mass_HW = own_HqG.flatten(1) @ inside_WqG.flatten(1).T
        self._window_mass_NHSW[layer, :, scale] += window_mass_HW.cpu()
        distances_qG = _distances(pattern.grid, positions).to(own_HqG.dtype)
        self._distance_NHS[layer, :, scale] += torch.einsum("hqg,qg->h", own_HqG, distances_qG).cpu()


def measure_locality(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: ModelConfig,
    *,
    keep: float = 0.95,
    attention: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> LocalityReport:
    """Run a model over token maps with teacher forcing and report where its attention goes.

    Args:
        transformer: The model.
        quantizer: Makes the model's inputs from tokens.
        batches: Pairs of tokens (B, L) and conditions (labels (B,) or vectors), on any device.
        config: The model's configuration.
        keep: Part of the attention that recommended settings must keep.
        attention: Attention backend.
        progress: Called with the number of images done.

    Raises:
        DataError: There is no image.
    """
    probe = LocalityProbe(config)
    device = transformer.position_embedding.device
    was_training = transformer.training
    transformer.eval()
    done = 0
    try:
        for tokens_BL, conditions in batches:
            with torch.no_grad():
                inputs_BLZ = quantizer.teacher_forcing_inputs(tokens_BL.to(device))
                transformer(conditions.to(device), inputs_BLZ, attention=attention, probe=probe)
            done += len(tokens_BL)
            if progress is not None:
                progress(done)
    finally:
        transformer.train(was_training)
    return probe.report(keep)


def recommend(
    scale_mass_SS: Float64[np.ndarray, "S S"],
    window_mass_SW: Float64[np.ndarray, "S W"],
    grids: tuple[Grid, ...],
    keep: float,
) -> Recommendation:
    """The smallest prefixes and windows that keep a part of the attention.

    Prefixes: the mean over all tokens of an image, each counted alike, of the mass on the visible scales. Windows: for
    each scale by itself, the window's part of the mass in the scale. A scale that needs a window as large as itself or
    larger than was measured is left whole (0).

    Args:
        scale_mass_SS: Mass by query scale and key scale.
        window_mass_SW: Mass by query scale and window of WINDOWS.
        grids: The scales.
        keep: The part to keep.
    """
    scales = len(grids)
    tokens_S = np.array([grid.tokens for grid in grids], dtype=np.float64)
    tolerance = 1e-9  # sums of probabilities miss 1 by rounding
    prefixes: ScalePrefixes = "all"
    kept_S = np.ones(scales)
    for count in range(1, scales):
        visible_S = np.array([scale_mass_SS[s, max(0, s - count + 1) : s + 1].sum() for s in range(scales)])
        if visible_S @ tokens_S / tokens_S.sum() >= keep - tolerance:
            prefixes, kept_S = count, visible_S
            break
    if scales == 1:
        prefixes = 1
    windows, window_kept = [], []
    for scale, grid in enumerate(grids):
        share_W = _share(window_mass_SW[scale], scale_mass_SS[scale, scale])
        fits = [i for i, k in enumerate(WINDOWS) if k < max(grid) and share_W[i] >= keep - tolerance]
        windows.append(WINDOWS[fits[0]] if fits else 0)
        window_kept.append(float(share_W[fits[0]]) if fits else 1.0)
    return Recommendation(prefixes, tuple(windows), keep, tuple(map(float, kept_S)), tuple(window_kept))


def _share(mass: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`mass` over `whole`, 1 where there is nothing to share."""
    whole = np.broadcast_to(whole, mass.shape)
    share: np.ndarray = np.divide(mass, whole, out=np.ones_like(mass), where=whole > 0)
    return share


def needed_windows(grid: Grid, positions: Int[Tensor, " q"]) -> Int[Tensor, "q G"]:
    """The smallest odd window around each of some positions (raster order) in which each position of the grid lies."""
    rows_yy = torch.from_numpy(_needed_on_axis(grid.height)).to(positions.device)
    columns_xx = torch.from_numpy(_needed_on_axis(grid.width)).to(positions.device)
    of_rows_qy = rows_yy[positions // grid.width]
    of_columns_qx = columns_xx[positions % grid.width]
    return torch.maximum(of_rows_qy.unsqueeze(2), of_columns_qx.unsqueeze(1)).flatten(1)


def _needed_on_axis(side: int) -> np.ndarray:
    needed = np.zeros((side, side), dtype=np.int64)
    for position in range(side):
        # From wide to narrow, so that the narrowest window that holds a key has the last word.
        for window in range(side | 1, 0, -2):
            width = min(window, side)
            start = window_start(position, side, width)
            needed[position, start : start + width] = window
    return needed


def _distances(grid: Grid, positions: Tensor) -> Tensor:
    """Euclidean distance in tokens between some positions and all positions of the grid."""
    rows_q, columns_q = positions // grid.width, positions % grid.width
    height_qy = (rows_q.unsqueeze(1) - torch.arange(grid.height, device=positions.device)).double()
    width_qx = (columns_q.unsqueeze(1) - torch.arange(grid.width, device=positions.device)).double()
    return torch.hypot(height_qy.unsqueeze(2), width_qx.unsqueeze(1)).flatten(1)
