"""The transformer's block: attention over a scale and the scales it may see, and an MLP, both under AdaLN."""

# Shape suffixes: B batch, L tokens (of all scales that are processed together), l some of them, C width, H heads,
# D head width, Q queries and K keys of one scale.

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mvar_core.config import TransformerConfig
from mvar_core.kernels import attend
from mvar_core.models.linear import RowStableLinear, linear_gelu, row_stable_linear
from mvar_core.models.steps import gated_sum, modulated_norm, normalise_heads, token_slices
from mvar_core.pyramid import AttentionPattern, ScalePyramid

AttentionProbe = Callable[[int, int, Tensor, Tensor, AttentionPattern, float], None]
"""Called as probe(layer, scale, q_BHQD, k_BHKD, pattern, softmax_scale) before each scale's attention."""

MAX_LOG_HEAD_SCALE = math.log(100)


class KeyValueCache:
    """Keys and values of earlier scales, for scales that are processed one after the other.

    Only scales that a later one may still see are kept: none for scale-Markov models, all for VAR. A scale's buffers
    hold all `num_rows` of a batch, unconditional ones included; subsets of it fill and read theirs through `rows`.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._rows_G: Tensor | None = None
        self._buffers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def rows(self, rows_G: Int[Tensor, " G"] | None = None) -> KeyValueCache:
        """The same cache for some rows, in the order in which a subset of the batch holds them; None for all."""
        view = copy(self)
        view._rows_G = rows_G
        return view

    def store(self, layer: int, scale: int, k_BHKD: Tensor, v_BHKD: Tensor) -> None:
        """Keep one scale's keys and values of these rows."""
        if self._rows_G is None:
            # Copies, since views would keep the queries of the fused projection alive as well.
            self._buffers[layer, scale] = (k_BHKD.contiguous(), v_BHKD.contiguous())
            return
        if (layer, scale) not in self._buffers:
            shape = (self.num_rows, *k_BHKD.shape[1:])
            self._buffers[layer, scale] = (k_BHKD.new_empty(shape), v_BHKD.new_empty(shape))
        for buffer, rows in zip(self._buffers[layer, scale], (k_BHKD, v_BHKD), strict=True):
            buffer[self._rows_G] = rows

    def read(self, layer: int, scales: range) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values, each (B, H, K, D), of these rows at some scales."""
        pairs = [self._buffers[layer, scale] for scale in scales]
        if self._rows_G is not None:
            pairs = [(keys[self._rows_G], values[self._rows_G]) for keys, values in pairs]
        return [keys for keys, _ in pairs], [values for _, values in pairs]

    def drop_before(self, scale: int) -> None:
        """Forget the scales before `scale`."""
        for entry in [entry for entry in self._buffers if entry[1] < scale]:
            del self._buffers[entry]

    @property
    def scales(self) -> set[int]:
        """The scales that are kept."""
        return {scale for _, scale in self._buffers}

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._buffers.values() for tensor in pair)


@dataclass(frozen=True)
class AttentionContext:
    """What an attention layer must know in addition to its input.

    `patterns` and `first_visible`, the earliest scale that is seen, have an entry for each scale of the pyramid;
    `scales` are the consecutive ones that are processed together. `cache` holds keys and values of earlier scales and
    receives new ones, where scales run one after the other.
    """

    pyramid: ScalePyramid
    patterns: tuple[AttentionPattern, ...]
    first_visible: tuple[int, ...]
    scales: range
    backend: str = "auto"
    cache: KeyValueCache | None = None
    probe: AttentionProbe | None = None

    def local_span(self, scale: int) -> slice:
        """Where the tokens of `scale` are among those that are processed together."""
        offset = self.pyramid.spans[self.scales.start].start
        span = self.pyramid.spans[scale]
        return slice(span.start - offset, span.stop - offset)

    def seen_span(self, scale: int) -> slice:
        """Where the tokens that `scale` sees are among them, its own the last."""
        first = max(self.first_visible[scale], self.scales.start)
        return slice(self.local_span(first).start, self.local_span(scale).stop)


class ScaleAttention(nn.Module):
    """Multi-head self-attention in which each scale sees what its pattern shows.

    With L2 attention queries and keys are normalised per head, queries are multiplied by a learned scale per head (at
    most 100), and the softmax has scale 1; without it the softmax has scale 0.25/√D.
    """

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        width = config.embed_dim
        self.layer = layer
        self.num_heads = config.num_heads
        self.qkv = RowStableLinear(width, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = RowStableLinear(width, width)
        self.log_head_scale: nn.Parameter | None = None
        self.softmax_scale = 0.25 / math.sqrt(config.head_dim)
        if config.l2_attention:
            self.log_head_scale, self.softmax_scale = nn.Parameter(torch.full((config.num_heads,), math.log(4))), 1.0

    def forward(self, x_BLC: Float[Tensor, "B L C"], context: AttentionContext) -> Float[Tensor, "B L C"]:
        """Attend, scale by scale."""
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        qkv_BLC = row_stable_linear(x_BLC, self.qkv.weight, bias)
        q_BLHD, k_BLHD, v_BLHD = qkv_BLC.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        if self.log_head_scale is not None:
            scale_H = self.log_head_scale.float().clamp(max=MAX_LOG_HEAD_SCALE).exp()
            q_BLHD, k_BLHD = normalise_heads(q_BLHD, scale_H), normalise_heads(k_BLHD, None)
        own = [context.local_span(scale) for scale in context.scales]
        seen = [context.seen_span(scale) for scale in context.scales]
        slices = (token_slices(q_BLHD, own), token_slices(k_BLHD, seen), token_slices(v_BLHD, seen))
        outputs = [
            self._attend_scale(scale, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context).transpose(1, 2)
            for scale, q, k, v in zip(context.scales, *slices, strict=True)
        ]
        o_BLHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.projection(o_BLHD.flatten(2))

    def _attend_scale(
        self, scale: int, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, context: AttentionContext
    ) -> Tensor:
        if context.cache is not None:
            own = slice(-context.pyramid.grids[scale].tokens, None)
            context.cache.store(self.layer, scale, k_BHKD[:, :, own], v_BHKD[:, :, own])
            keys, values = context.cache.read(self.layer, range(context.first_visible[scale], context.scales.start))
            if keys:
                k_BHKD, v_BHKD = torch.cat([*keys, k_BHKD], dim=2), torch.cat([*values, v_BHKD], dim=2)
        pattern = context.patterns[scale]
        if context.probe is not None:
            context.probe(self.layer, scale, q_BHQD, k_BHKD, pattern, self.softmax_scale)
        return attend(q_BHQD, k_BHKD, v_BHKD, pattern, scale=self.softmax_scale, backend=context.backend)


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.up = RowStableLinear(config.embed_dim, config.hidden_dim)
        self.down = RowStableLinear(config.hidden_dim, config.embed_dim)

    def forward(self, x_BLC: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        """Transform each token by itself."""
        return self.down(linear_gelu(x_BLC, self.up.weight, self.up.bias))


class Block(nn.Module):
    """Attention and MLP, each on a modulated norm of the stream and added to it through a gate γ.

    Stochastic depth grows with the index of the block, `layer`.
    """

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        width = config.embed_dim
        self.attention = ScaleAttention(config, layer)
        self.mlp = MLP(config)
        self.drop_path = config.drop_path * layer / (config.depth - 1) if config.depth > 1 else 0.0
        self.modulation: nn.Linear | None = None
        self.modulation_offset: nn.Parameter | None = None
        if config.shared_adaln:
            self.modulation_offset = nn.Parameter(torch.randn(1, 1, 6, width).div_(math.sqrt(width)))
        else:
            self.modulation = RowStableLinear(width, 6 * width)

    def modulate(self, activated_BC: Float[Tensor, "B C"], shared_B6C: Tensor | None) -> Float[Tensor, "B 6 C"]:
        """The block's six AdaLN vectors (γ₁, γ₂, scale₁, scale₂, shift₁, shift₂).

        They follow from SiLU of the condition's embedding, or from the model's shared projection of that.
        """
        if self.modulation is not None:
            return self.modulation(activated_BC).unflatten(1, (6, -1))
        assert self.modulation_offset is not None
        assert shared_B6C is not None
        return shared_B6C + self.modulation_offset[0]

    def forward(
        self,
        x_BLC: Float[Tensor, "B L C"],
        modulation_B6C: Float[Tensor, "B 6 C"],
        context: AttentionContext,
        kept_2B: Bool[Tensor, "2 B"] | None = None,
        keep: Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "B L C"]:
        """Refine the stream, modulated by what `modulate` returns.

        `kept_2B` says which samples keep their attention and their MLP branch, None that all do, and `keep` how often
        one is kept, by which those kept are scaled up: a tensor, since torch would compile again for another number.
        """
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation_B6C.unsqueeze(2).unbind(1)
        kept_1, kept_2 = (None, None) if kept_2B is None else kept_2B
        branch = self.attention(modulated_norm(x_BLC, scale_1, shift_1), context)
        x_BLC = gated_sum(x_BLC, branch, self._dropped(gate_1, kept_1, keep))
        branch = self.mlp(modulated_norm(x_BLC, scale_2, shift_2))
        return gated_sum(x_BLC, branch, self._dropped(gate_2, kept_2, keep))

    def _dropped(self, gate_B1C: Tensor, kept_B: Tensor | None, keep: Tensor | None) -> Tensor:
        """The gates: 0 for samples whose branch is dropped, larger for the others."""
        if kept_B is None or keep is None:
            return gate_B1C
        return gate_B1C * kept_B.to(gate_B1C).view(-1, 1, 1) / keep
