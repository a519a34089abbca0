"""Measuring where a model's attention goes: to which scales, and how near to the query.

The statistics are gathered while the model runs, from the queries and keys of one layer and scale at a time, a few
queries at once; no L×L map is ever held, of an image or of all. Probabilities and sums are float64. "Mass" is attention
probability; each query has a total mass of 1.
"""

# Shape suffixes: B images, H heads, Q queries of one scale, K keys of one scale (those of earlier scales first),
# D head width, S scales, N layers, W windows; q a chunk of the queries, G the positions of one scale.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from mvar_core.analysis.locality_report import LocalityReport
from mvar_core.analysis.neighbourhoods import displacement_grid, displacements, distances, needed_windows
from mvar_core.analysis.recommendation import WINDOWS, check_keep, recommend
from mvar_core.config import ModelConfig
from mvar_core.errors import DataError
from mvar_core.models.micro_batches import TOKENS_AT_ONCE
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.pyramid import AttentionPattern

CHUNK_NUMBERS = 1 << 21
"""Attention probabilities that are held at once."""


class LocalityProbe:
    """Gathers attention statistics; an instance is what a Transformer takes as `probe`.

    Args:
        config: The model that will be probed; `config.transformer` must be there.
        on_layer: Called with the number of images whenever one layer is done with them.
    """

    def __init__(self, config: ModelConfig, on_layer: Callable[[int], None] | None = None):
        assert config.transformer is not None
        self.config = config
        self.on_layer = on_layer
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

    def report(self, keep: float = 0.95) -> LocalityReport:
        """Averages of what was gathered.

        Args:
            keep: Part of the attention that recommended settings must keep.

        Raises:
            DataError: Some layer or scale saw no image, or `keep` is not between 0 and 1.
        """
        if not bool((self._images_NS > 0).all()):
            raise DataError("No attention was measured: there were no images.", "Give at least one image or token row.")
        tokens_S = torch.tensor([grid.tokens for grid in self.grids], dtype=torch.float64)
        queries_N1S = (self._images_NS * tokens_S).unsqueeze(1)
        scale_mass_NHSS = (self._scale_mass_NHSS / queries_N1S.unsqueeze(-1)).numpy()
        window_mass_NHSSW = (self._window_mass_NHSSW / queries_N1S[..., None, None]).numpy()
        own_NHS = self._scale_mass_NHSS.diagonal(dim1=2, dim2=3)
        rows_of_last = float(queries_N1S[..., -1].sum()) * self._entropy_NHS.shape[1]
        windows = tuple(pattern.window if pattern.is_windowed else 0 for pattern in self.config.patterns)
        return LocalityReport(
            patch_sizes=self.config.pyramid.patch_sizes,
            scale_prefixes=self.config.attention.scale_prefixes,
            model_windows=windows,
            num_images=int(self._images_NS[0, 0]),
            scale_mass_by_head=scale_mass_NHSS,
            window_mass_by_head=window_mass_NHSSW,
            entropy_by_head=(self._entropy_NHS / queries_N1S).numpy(),
            distance_by_head=(self._distance_NHS / own_NHS).nan_to_num(0.0).numpy(),
            last_scale_keys=tuple(
                (mass_G / rows_of_last).view(*grid).numpy()
                for mass_G, grid in zip(self._last_keys_SG, self.grids, strict=True)
            ),
            last_scale_displacements=tuple(
                (mass_G / rows_of_last).view(*displacement_grid(grid)).numpy()
                for mass_G, grid in zip(self._last_displacements_SG, self.grids, strict=True)
            ),
            recommended=recommend(
                scale_mass_NHSS.mean(axis=(0, 1)),
                window_mass_NHSSW.mean(axis=(0, 1)).diagonal().T,
                self.grids,
                keep,
                windows,
            ),
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
    """Attention probabilities of some queries, and their entropy in nats, in float64.

    Args:
        q_BHqD: Queries, times the softmax's scale.
        k_BHKD: Keys.
        hidden_qG: Keys of the own scale that a query does not see; None where it sees all.
        prefix_tokens: Keys before those of the own scale.
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
    # -Σ p·log p, where log p is the score less the logarithm of the sum.
    entropy_BHq = total_BHq1.squeeze(-1).log() - (scores_BHqK.mul_(mass_BHqK)).sum(dim=-1)
    return mass_BHqK, entropy_BHq


def images_at_once(config: ModelConfig, device: torch.device) -> int:
    """How many images go through the model in one pass: as many rows as make products fast, and no more memory."""
    return max(1, TOKENS_AT_ONCE.get(device.type, 2048) // config.pyramid.num_tokens)


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

    Memory is that of one pass over one batch and a few megabytes of statistics, however many batches there are.

    Args:
        transformer: The model.
        quantizer: Makes the model's inputs from tokens.
        batches: Pairs of tokens (B, L) and conditions (labels (B,) or vectors); see `images_at_once`.
        config: The model's configuration.
        keep: Part of the attention that recommended settings must keep.
        attention: Attention backend.
        progress: Called with the layers done, each counted once for every image: so it moves within a batch too.

    Raises:
        DataError: There is no image, or `keep` is not between 0 and 1.
        ConfigError: The conditions are not the model's.
    """
    check_keep(keep)
    done = 0

    def layer_done(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done)

    probe = LocalityProbe(config, layer_done)
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
