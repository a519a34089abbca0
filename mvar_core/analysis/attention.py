"""Where a model's attention goes: to which scales, and how near to the query.

Statistics are gathered while the model runs, from the queries and keys of one layer and scale at a time, a few queries
at once: no L×L map is ever held. Probabilities and sums are float64. "Mass" is attention probability; each query has a
total mass of 1. Every statistic has a counterpart for attention that is spread evenly over all that a token sees: a
large mass on a large scale would mean nothing by itself.

The matching position of the query (y, x) of a scale of h_s×w_s tokens in a scale of h_t×w_t is the one that contains
the query's centre: (floor((y + 1/2)·h_t/h_s), floor((x + 1/2)·w_t/w_s)). In its own scale that is the query itself.
Windows are those of mvar_core.pyramid around the matching position: shifted inward at the borders, so that all have k×k
tokens; a window longer than an axis covers that axis.
"""

# Shape suffixes: B images, N layers, H heads, Q queries of one scale, K keys of one scale (those of earlier scales
# first), D head width, S scales (the first S the queries', the second the keys'), W windows; q some of the queries,
# G the positions of one scale; h w rows and columns of the queries' scale, y x of the keys'.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mvar_core.analysis.recommendation import WINDOWS, Recommendation, recommend, share_of
from mvar_core.config import ModelConfig
from mvar_core.errors import DataError
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.progress import running_total
from mvar_core.pyramid import AttentionPattern, Grid, ScalePrefixes, ScalePyramid, window_start


@dataclass(frozen=True)
class AttentionStatistics:
    """Attention statistics, averaged over images and the queries of each scale.

    Attributes:
        scale_mass_by_head: Mass (N, H, S, S) by layer, head, query scale and key scale; rows sum to 1.
        window_mass_by_head: Mass (N, H, S, S, W) likewise, in the k×k window around the query's matching position in
            the scale of the keys, for each k of WINDOWS.
        entropy_by_head: Entropy (N, H, S) of a query's attention over all its keys, in nats.
        distance_by_head: Distance (N, H, S) between a query and the keys of its own scale in tokens, weighted by mass.
        last_scale_keys: Where the attention of the last scale's queries goes: one map per key scale (height, width),
            averaged over layers and heads; all of them sum to 1.
        last_scale_displacements: The same by the key's displacement from the query's matching position: one map per
            key scale (2·height - 1, 2·width - 1), the matching position in its centre.
    """

    pyramid: ScalePyramid
    scale_prefixes: ScalePrefixes
    model_windows: tuple[int, ...]
    num_images: int
    scale_mass_by_head: np.ndarray
    window_mass_by_head: np.ndarray
    entropy_by_head: np.ndarray
    distance_by_head: np.ndarray
    last_scale_keys: tuple[np.ndarray, ...]
    last_scale_displacements: tuple[np.ndarray, ...]

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
        """For each k, the fraction of all mass in the k×k window of the query's own scale (S,)."""
        return {window: np.diagonal(mass_SS).copy() for window, mass_SS in self.window_mass_by_scale.items()}

    @property
    def window_share(self) -> dict[int, np.ndarray]:
        """For each k, the fraction of the own scale's mass in the k×k window (S,)."""
        own_S = np.diagonal(self.scale_mass)
        return {window: share_of(mass_S, own_S) for window, mass_S in self.window_mass.items()}


@dataclass(frozen=True)
class AttentionReport(AttentionStatistics):
    """The attention of a model, and what to compare it with.

    `recommended` are the smallest settings that keep the requested fraction; `even`, of one layer and one head, is
    attention that is spread evenly over all that each query sees: its entropy is the maximum.
    """

    recommended: Recommendation
    even: AttentionStatistics

    @property
    def notes(self) -> list[str]:
        """What a reader must know to interpret the figures."""
        notes = []
        if self.scale_prefixes != "all" and self.scale_prefixes < self.pyramid.num_scales:
            notes.append(
                f"A token sees {self.scale_prefixes} scale(s), its own included: mass on others is 0 by construction."
            )
        pairs = zip(self.pyramid.patch_sizes, self.model_windows, strict=True)
        windowed = [f"{size} (window {window})" for size, window in pairs if window]
        if windowed:
            notes.append(f"Mass outside the model's own windows is 0 by construction: {', '.join(windowed)}.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The report as a mapping of plain values."""
        previous_NHS = np.zeros(self.entropy_by_head.shape)
        previous_NHS[..., 1:] = np.diagonal(self.scale_mass_by_head, offset=-1, axis1=2, axis2=3)
        measures = {
            "own_scale_mass": np.diagonal(self.scale_mass_by_head, axis1=2, axis2=3),
            "previous_scale_mass": previous_NHS,
            "entropy": self.entropy_by_head,
            "distance": self.distance_by_head,
        }
        layers, heads = self.entropy_by_head.shape[:2]
        return {
            "patch_sizes": [list(size) if isinstance(size, tuple) else size for size in self.pyramid.patch_sizes],
            "scale_prefixes": self.scale_prefixes,
            "model_windows": list(self.model_windows),
            "num_images": self.num_images,
            "scale_mass": self.scale_mass.tolist(),
            "even_scale_mass": self.even.scale_mass.tolist(),
            **{
                name: {str(window): values.tolist() for window, values in by_window.items()}
                for name, by_window in (
                    ("window_mass", self.window_mass),
                    ("window_share", self.window_share),
                    ("window_mass_by_scale", self.window_mass_by_scale),
                    ("even_window_mass_by_scale", self.even.window_mass_by_scale),
                )
            },
            "last_scale": {
                "keys": [map_yx.tolist() for map_yx in self.last_scale_keys],
                "displacements": [map_yx.tolist() for map_yx in self.last_scale_displacements],
            },
            "layers": [
                {
                    "layer": layer,
                    **{name: values[layer].mean(axis=0).tolist() for name, values in measures.items()},
                    "heads": [
                        {"head": head, **{name: values[layer, head].tolist() for name, values in measures.items()}}
                        for head in range(heads)
                    ],
                }
                for layer in range(layers)
            ],
            "recommended": asdict(self.recommended),
            "notes": self.notes,
        }


class AttentionProbe:
    """Gathers attention statistics; an instance is the `probe` that a Transformer accepts.

    `on_layer` is called with the number of images whenever one layer is done with them; `values_at_once` attention
    probabilities are held at once.
    """

    def __init__(
        self, config: ModelConfig, on_layer: Callable[[int], None] | None = None, values_at_once: int = 1 << 21
    ):
        assert config.transformer is not None
        self.config, self.on_layer, self.values_at_once = config, on_layer, values_at_once
        self.grids = config.pyramid.grids
        sizes, scales = config.transformer, len(self.grids)
        shape = (sizes.depth, sizes.num_heads, scales)
        self._scale_mass_NHSS = torch.zeros(*shape, scales, dtype=torch.float64)
        self._window_mass_NHSSW = torch.zeros(*shape, scales, len(WINDOWS), dtype=torch.float64)
        self._entropy_NHS = torch.zeros(shape, dtype=torch.float64)
        self._distance_NHS = torch.zeros(shape, dtype=torch.float64)
        self._images_NS = torch.zeros(sizes.depth, scales, dtype=torch.int64)
        self._last_keys_SG = [torch.zeros(grid.tokens, dtype=torch.float64) for grid in self.grids]
        self._last_displacements_SG = [
            torch.zeros(displacement_grid(grid).tokens, dtype=torch.float64) for grid in self.grids
        ]

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
        """Add the attention of one block and scale: queries and keys as they enter it, keys of earlier scales first."""
        if q_BHQD.device.type == "mps":  # has no float64
            q_BHQD, k_BHKD = q_BHQD.cpu(), k_BHKD.cpu()
        dtype = torch.promote_types(q_BHQD.dtype, torch.float32)
        q_BHQD, k_BHKD = q_BHQD.detach().to(dtype) * softmax_scale, k_BHKD.detach().to(dtype)
        batch, heads, queries, _ = q_BHQD.shape
        chunk = max(1, self.values_at_once // (batch * heads * pattern.keys))
        for start in range(0, queries, chunk):
            positions = torch.arange(start, min(start + chunk, queries), device=q_BHQD.device)
            hidden_qG = None
            if pattern.is_windowed:
                hidden_qG = needed_windows(positions, pattern.grid) > pattern.window
            mass_BHqK, entropy_BHq = attention_mass(q_BHQD[:, :, positions], k_BHKD, hidden_qG, pattern.prefix_tokens)
            self._entropy_NHS[layer, :, scale] += entropy_BHq.sum(dim=(0, 2)).cpu()
            # Everything else is linear in the mass, so images are summed first.
            self._add_mass(layer, scale, mass_BHqK.sum(dim=0), positions, pattern)
        self._images_NS[layer, scale] += batch
        if self.on_layer is not None and scale == len(self.grids) - 1:
            self.on_layer(batch)

    def report(self, keep: float = 0.95) -> AttentionReport:
        """Averages of what was gathered, and the settings that keep the fraction `keep` of the attention.

        DataError where some layer or scale saw no image.
        """
        if not bool((self._images_NS > 0).all()):
            raise DataError("No attention was measured: there were no images.", "Pass at least one image or token row.")
        found = self._averages()
        scale_mass_SS, window_mass_SSW = found.scale_mass, found.window_mass_by_head.mean(axis=(0, 1))
        recommended = recommend(scale_mass_SS, window_mass_SSW.diagonal().T, self.grids, keep, found.model_windows)
        # Where all scores are equal, attention is spread evenly.
        assert self.config.transformer is not None
        sizes = self.config.transformer.model_copy(update={"depth": 1, "num_heads": 1})
        even = AttentionProbe(self.config.model_copy(update={"transformer": sizes}))
        for scale, pattern in enumerate(self.config.patterns):
            even(0, scale, torch.zeros(1, 1, pattern.queries, 1), torch.zeros(1, 1, pattern.keys, 1), pattern, 1.0)
        return AttentionReport(**vars(found), recommended=recommended, even=even._averages())

    def _averages(self) -> AttentionStatistics:
        tokens_S = torch.tensor([grid.tokens for grid in self.grids], dtype=torch.float64)
        queries_N1S = (self._images_NS * tokens_S).unsqueeze(1)
        own_NHS = self._scale_mass_NHSS.diagonal(dim1=2, dim2=3)
        rows_of_last = float(queries_N1S[..., -1].sum()) * self._entropy_NHS.shape[1]

        def maps(masses_SG: list[Tensor], shapes: Iterable[Grid]) -> tuple[np.ndarray, ...]:
            pairs = zip(masses_SG, shapes, strict=True)
            return tuple((mass_G / rows_of_last).view(*shape).numpy() for mass_G, shape in pairs)

        return AttentionStatistics(
            pyramid=self.config.pyramid,
            scale_prefixes=self.config.attention.scale_prefixes,
            model_windows=tuple(pattern.window if pattern.is_windowed else 0 for pattern in self.config.patterns),
            num_images=int(self._images_NS[0, 0]),
            scale_mass_by_head=(self._scale_mass_NHSS / queries_N1S.unsqueeze(-1)).numpy(),
            window_mass_by_head=(self._window_mass_NHSSW / queries_N1S[..., None, None]).numpy(),
            entropy_by_head=(self._entropy_NHS / queries_N1S).numpy(),
            distance_by_head=(self._distance_NHS / own_NHS).nan_to_num(0.0).numpy(),
            last_scale_keys=maps(self._last_keys_SG, self.grids),
            last_scale_displacements=maps(self._last_displacements_SG, map(displacement_grid, self.grids)),
        )

    def _add_mass(self, layer: int, scale: int, mass_HqK: Tensor, positions: Tensor, pattern: AttentionPattern) -> None:
        """Add the mass of some queries, summed over images."""
        spans = self.config.pyramid.spans
        offset = spans[scale].start - pattern.prefix_tokens
        is_last = scale == len(self.grids) - 1
        for earlier, grid in enumerate(self.grids[: scale + 1]):
            if spans[earlier].start < offset:
                continue
            mass_HqG = mass_HqK[..., spans[earlier].start - offset : spans[earlier].stop - offset]
            mass_Hx = mass_HqG.flatten(1)
            needed_qG = needed_windows(positions, pattern.grid, grid)
            # Windows are nested, so the mass of window k is what needs a window of at most k.
            inside_Wx = torch.stack([needed_qG <= window for window in WINDOWS]).to(mass_HqG.dtype).flatten(1)
            self._scale_mass_NHSS[layer, :, scale, earlier] += mass_Hx.sum(dim=-1).cpu()
            self._window_mass_NHSSW[layer, :, scale, earlier] += (mass_Hx @ inside_Wx.T).cpu()
            if earlier == scale:
                distances_x = distances(positions, grid).to(mass_HqG.dtype).flatten()
                self._distance_NHS[layer, :, scale] += (mass_Hx @ distances_x).cpu()
            if is_last:
                mass_qG = mass_HqG.sum(dim=0).cpu()
                self._last_keys_SG[earlier] += mass_qG.sum(dim=0)
                places_qG = displacements(positions, pattern.grid, grid).cpu()
                self._last_displacements_SG[earlier].index_add_(0, places_qG.flatten(), mass_qG.flatten())


def attention_mass(
    q_BHqD: Tensor, k_BHKD: Tensor, hidden_qG: Tensor | None, prefix_tokens: int
) -> tuple[Float[Tensor, "B H q K"], Float[Tensor, "B H q"]]:
    """Attention probabilities of some queries, which the softmax's scale is in, and their entropy in nats, in float64.

    `hidden_qG` are the keys of its own scale, behind `prefix_tokens` others, that a query does not see.
    """
    with torch.autocast(q_BHqD.device.type, enabled=False):
        scores_BHqK = (q_BHqD @ k_BHKD.transpose(-1, -2)).double()
    if hidden_qG is not None:
        scores_BHqK[..., prefix_tokens:].masked_fill_(hidden_qG, -math.inf)
    largest_BHq1 = scores_BHqK.amax(dim=-1, keepdim=True)
    scores_BHqK -= largest_BHq1
    mass_BHqK = scores_BHqK.exp()
    total_BHq1 = mass_BHqK.sum(dim=-1, keepdim=True)
    mass_BHqK /= total_BHq1
    if hidden_qG is not None:
        scores_BHqK[..., prefix_tokens:].masked_fill_(hidden_qG, 0)  # their mass is 0, and 0 times -inf is nan
    # -Σ p·log p, where log p is the score minus the logarithm of the sum.
    entropy_BHq = total_BHq1.squeeze(-1).log() - (scores_BHqK.mul_(mass_BHqK)).sum(dim=-1)
    return mass_BHqK, entropy_BHq


def measure_attention(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    batches: Iterable[tuple[Tensor, ...]],
    config: ModelConfig,
    *,
    keep: float = 0.95,
    attention: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> AttentionReport:
    """Run a model over token maps with teacher forcing and report where its attention goes.

    Memory is that of one pass over one batch and a few megabytes of statistics, however many batches there are. Each
    is a pair of tokens (B, L) and conditions (labels (B,) or vectors). `progress` is called with the layers done, each
    counted once per image, so that it moves within a batch too.
    """
    probe = AttentionProbe(config, running_total(progress))
    device = transformer.position_embedding.device
    was_training = transformer.training
    transformer.eval()
    scales = range(config.pyramid.num_scales)
    try:
        for tokens_BL, conditions in batches:
            with torch.no_grad():
                inputs_BLZ = quantizer.teacher_forcing_inputs(tokens_BL.to(device))
                conditioning = transformer.condition(transformer.conditioner.read(conditions).to(device))
                transformer.hidden_states(scales, inputs_BLZ, conditioning, attention=attention, probe=probe)
    finally:
        transformer.train(was_training)
    return probe.report(keep)


def needed_windows(positions: Int[Tensor, " q"], query_grid: Grid, key_grid: Grid | None = None) -> Int[Tensor, "q G"]:
    """The smallest odd window around each query's matching position that contains each position of the keys' scale.

    Queries are given by their positions in raster order; keys are by default of their scale.
    """
    return torch.maximum(*_by_axis(_needed_on_axis, positions, query_grid, key_grid or query_grid)).flatten(1)


def distances(positions: Int[Tensor, " q"], grid: Grid) -> Float[Tensor, "q G"]:
    """Euclidean distance in tokens between some positions and all positions of the same scale."""
    vertical, horizontal = _by_axis(_offsets_on_axis, positions, grid, grid)
    return torch.hypot(vertical.double(), horizontal.double()).flatten(1)


def displacements(positions: Int[Tensor, " q"], query_grid: Grid, key_grid: Grid) -> Int[Tensor, "q G"]:
    """Each key's displacement from each query's matching position, as an index into a map of `displacement_grid`."""
    vertical, horizontal = _by_axis(_offsets_on_axis, positions, query_grid, key_grid)
    rows, columns = vertical + key_grid.height - 1, horizontal + key_grid.width - 1
    return (rows * displacement_grid(key_grid).width + columns).flatten(1)


def displacement_grid(key_grid: Grid) -> Grid:
    """The map of all displacements in a scale; the matching position is its centre."""
    return Grid(2 * key_grid.height - 1, 2 * key_grid.width - 1)


@lru_cache(maxsize=4096)
def matching_positions(queries: int, keys: int) -> tuple[int, ...]:
    """For each of `queries` positions on an axis, the position that contains its centre on an axis of `keys`."""
    return tuple((2 * position + 1) * keys // (2 * queries) for position in range(queries))


def _by_axis(
    of_axis: Callable[[int, int], np.ndarray], positions: Tensor, query_grid: Grid, key_grid: Grid
) -> tuple[Int[Tensor, "q h 1"], Int[Tensor, "q 1 w"]]:
    """A table (queries, keys) of each axis, looked up for some queries."""
    rows_hy = torch.from_numpy(of_axis(query_grid.height, key_grid.height)).to(positions.device)
    columns_wx = torch.from_numpy(of_axis(query_grid.width, key_grid.width)).to(positions.device)
    width = query_grid.width
    return rows_hy[positions // width].unsqueeze(2), columns_wx[positions % width].unsqueeze(1)


@lru_cache(maxsize=1024)
def _needed_on_axis(queries: int, keys: int) -> np.ndarray:
    needed = np.zeros((queries, keys), dtype=np.int64)
    for query, position in enumerate(matching_positions(queries, keys)):
        # From wide to narrow, so that the narrowest window that contains a key is what remains.
        for window in range(keys | 1, 0, -2):
            width = min(window, keys)
            start = window_start(position, keys, width)
            needed[query, start : start + width] = window
    return needed


@lru_cache(maxsize=1024)
def _offsets_on_axis(queries: int, keys: int) -> np.ndarray:
    return np.arange(keys)[None, :] - np.array(matching_positions(queries, keys), dtype=np.int64)[:, None]
