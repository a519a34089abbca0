"""The next-scale transformer: VAR, MVAR and everything between are this class and two settings.

Which tokens a token sees follows from `attention.scale_prefixes` and `attention.windows` (mvar_core.pyramid). Training
runs all scales in one packed pass; sampling runs them one after the other, with a cache of keys and values only where
a later scale sees an earlier one.
"""

# Shape suffixes: B batch, L tokens (of all scales that are processed together), C width, Z latent channels,
# V codebook entries, X values of a vector that the model is conditioned on.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvar_core.config import ModelConfig, TransformerConfig
from mvar_core.models.blocks import AttentionContext, AttentionProbe, Block, KeyValueCache
from mvar_core.models.conditioning import Conditioner, Conditioning, VectorConditioner, build_conditioner
from mvar_core.models.linear import RowStableLinear
from mvar_core.models.steps import modulated_norm
from mvar_core.runtime import RowDraws, draw_rows


class Transformer(nn.Module):
    """Predicts the tokens of every scale from a condition, class or vector, and the features of the scales before.

    With `recompute_blocks` training computes a block's activations again for its gradient instead of keeping them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.transformer is not None
        sizes = config.transformer
        self.config = sizes
        self.pyramid = config.pyramid
        self.patterns = config.patterns
        self.first_visible = tuple(
            self.pyramid.first_visible_scale(scale, config.attention.scale_prefixes)
            for scale in range(self.pyramid.num_scales)
        )
        width = sizes.embed_dim
        conditioner = build_conditioner(config)
        self._conditioner = conditioner.name
        self.add_module(conditioner.name, conditioner)
        self.start_position = nn.Parameter(torch.empty(1, self.pyramid.grids[0].tokens, width))
        self.position_embedding = nn.Parameter(torch.empty(1, self.pyramid.num_tokens, width))
        self.scale_embedding = nn.Embedding(self.pyramid.num_scales, width)
        self.input_projection = RowStableLinear(config.tokenizer.latent_channels, width)
        self.shared_modulation = RowStableLinear(width, 6 * width) if sizes.shared_adaln else None
        self.blocks = cast("Sequence[Block]", nn.ModuleList(Block(sizes, layer) for layer in range(sizes.depth)))
        self.head_modulation = RowStableLinear(width, 2 * width)
        self.head = RowStableLinear(width, config.tokenizer.codebook_size)
        self.recompute_blocks = False
        self._initialise(sizes)

    @property
    def conditioner(self) -> Conditioner:
        """What turns conditions, class labels or vectors, into embeddings."""
        return cast("Conditioner", self.get_submodule(self._conditioner))

    @property
    def null_label(self) -> int:
        """The label that stands for no class, which follows the last class: the number of class labels."""
        return self.config.num_classes

    def no_decay_names(self) -> set[str]:
        """Names of the parameters that are exempt from weight decay: vectors, biases, tables and positions."""
        tables: tuple[str, ...] = ("scale_embedding.", "start_position", "position_embedding")
        if self.conditioner.tables:
            tables = (*tables, f"{self._conditioner}.")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.startswith(tables) or name.endswith("modulation_offset")
        }

    def to_compute_dtype(self, dtype: torch.dtype) -> Transformer:
        """Hold the weights in `dtype`, but the head, whose logits need the precision, in float32."""
        self.to(dtype)
        self.head_modulation.float()
        self.head.float()
        return self

    def forward(
        self,
        conditions: Int[Tensor, " B"] | Float[Tensor, "B X"],
        inputs_BLZ: Float[Tensor, "B l Z"],
        *,
        scales: range | None = None,
        attention: str = "auto",
        generator: torch.Generator | RowDraws | None = None,
        probe: AttentionProbe | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits, in float32, of consecutive scales, by default of all, in one packed pass (teacher forcing).

        Scales that those see, directly or through others, are computed too; their logits are not. Conditions are class
        labels, 0 … num_classes (the last is the null label), or vectors (nan is none); inputs are those of the scales
        after the first, from the true tokens (B, L - l₁, Z). In training mode the generator drops conditions and
        branches. `probe` is called before each layer's and scale's attention with its queries and keys.
        """
        if generator is not None and self.training:
            draws_B = draw_rows(generator, conditions.shape[0]).to(conditions.device)
            conditions = self.conditioner.drop(conditions, draws_B < self.config.class_dropout)
        conditioning = self.condition(conditions)
        wanted = range(self.pyramid.num_scales) if scales is None else scales
        needed = range(self.earliest_needed(wanted.start), wanted.stop)
        spans = self.pyramid.spans
        if len(needed) < self.pyramid.num_scales:
            first = spans[0].stop
            inputs_BLZ = inputs_BLZ[:, max(spans[needed.start].start - first, 0) : spans[needed.stop - 1].stop - first]
        x_BLC = self.hidden_states(
            needed, inputs_BLZ, conditioning, attention=attention, generator=generator, probe=probe
        )
        return self.head_logits(x_BLC[:, spans[wanted.start].start - spans[needed.start].start :], conditioning)

    def earliest_needed(self, scale: int) -> int:
        """The earliest scale on which `scale` depends: what it sees, what those see, and so on down."""
        while (first := self.first_visible[scale]) < scale:
            scale = first
        return scale

    def condition(self, conditions: Int[Tensor, " B"] | Float[Tensor, "B X"]) -> Conditioning:
        """What class labels or vectors contribute to every layer."""
        embedding_BC = self.conditioner(conditions)
        activated_BC = F.silu(embedding_BC)
        shared_B6C = None
        if self.shared_modulation is not None:
            shared_B6C = self.shared_modulation(activated_BC).unflatten(1, (6, -1))
        blocks = tuple(block.modulate(activated_BC, shared_B6C) for block in self.blocks)
        with torch.autocast(embedding_BC.device.type, enabled=False):
            head_B2C = self.head_modulation(activated_BC.float()).unflatten(1, (2, -1))
        return Conditioning(embedding_BC, blocks, head_B2C)

    def hidden_states(
        self,
        scales: range,
        inputs_BLZ: Float[Tensor, "B l Z"],
        conditioning: Conditioning,
        *,
        cache: KeyValueCache | None = None,
        attention: str = "auto",
        generator: torch.Generator | RowDraws | None = None,
        probe: AttentionProbe | None = None,
    ) -> Float[Tensor, "B L C"]:
        """The stream behind the last block, in the compute dtype, for consecutive scales that are processed together.

        Scales that they see must be among them or in the cache, which receives their keys and values. `inputs_BLZ` has
        none for the first scale of the pyramid. The rest is as in `condition` and `forward`.
        """
        x_BLC = self._embed(scales, inputs_BLZ, conditioning.laid_out(conditioning.embedding_UC))
        later = self.first_visible[scales.stop] if scales.stop < self.pyramid.num_scales else scales.stop
        if later >= scales.stop and self.first_visible[scales.start] >= scales.start:
            cache = None  # no keys pass from earlier scales to these, nor from these to later ones
        context = AttentionContext(self.pyramid, self.patterns, self.first_visible, scales, attention, cache, probe)
        for layer, block in enumerate(self.blocks):
            modulation_B6C = conditioning.laid_out(conditioning.blocks_U6C[layer])
            inputs = (x_BLC, modulation_B6C, context, *self._kept_branches(block, x_BLC, generator))
            if self.recompute_blocks and self.training and torch.is_grad_enabled():
                # Random numbers are generated outside, so no generator has to be reset.
                x_BLC = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLC = block(*inputs)
        return x_BLC

    def head_logits(
        self, x_BLC: Float[Tensor, "B L C"], conditioning: Conditioning, guidance: float = 0.0
    ) -> Float[Tensor, "b L V"]:
        """Logits, in float32, of the stream behind the last block.

        With guidance t the stream has conditional rows and behind them as many unconditional ones, for which there is
        (1 + t)·conditional - t·unconditional. The head is linear and the two weights add up to 1, so what goes into it
        is guided rather than the logits: one product for two.
        """
        with torch.autocast(x_BLC.device.type, enabled=False):
            scale_B1C, shift_B1C = conditioning.laid_out(conditioning.head_U2C).unsqueeze(2).unbind(1)
            normed_BLC = modulated_norm(x_BLC.float(), scale_B1C, shift_B1C)
            if guidance:
                conditional_BLC, unconditional_BLC = normed_BLC.chunk(2)
                normed_BLC = torch.lerp(unconditional_BLC, conditional_BLC, 1 + guidance)
            return self.head(normed_BLC)

    def macs(self, scale: int) -> dict[str, int]:
        """Multiply-accumulates at one scale by part, for one image without guidance; without `conditioning_macs`.

        `inputs`: the input projection (the first scale has none). `projections`: q, k, v and attention's output
        projection. `attention`: the products q·k and the weighted sum of v. `mlp`. `head`.
        """
        pattern, blocks = self.patterns[scale], self.blocks
        attentions, mlps = [block.attention for block in blocks], [block.mlp for block in blocks]
        return {
            "inputs": pattern.queries * self.input_projection.weight.numel() if scale else 0,
            "projections": pattern.queries
            * sum(a.qkv.weight.numel() + a.projection.weight.numel() for a in attentions),
            "attention": len(blocks) * 2 * self.config.embed_dim * pattern.queries * pattern.keys_per_query,
            "mlp": pattern.queries * sum(mlp.up.weight.numel() + mlp.down.weight.numel() for mlp in mlps),
            "head": pattern.queries * self.head.weight.numel(),
        }

    def conditioning_macs(self) -> int:
        """Multiply-accumulates of `condition` for one image without guidance: a vector's projection and the AdaLN's."""
        modules = [self.head_modulation, self.shared_modulation, *(block.modulation for block in self.blocks)]
        if not self.conditioner.tables:
            modules += [module for module in self.conditioner.modules() if isinstance(module, nn.Linear)]
        return sum(module.weight.numel() for module in modules if module is not None)

    def drop_unseen(self, cache: KeyValueCache, scale: int) -> None:
        """Forget what no scale after `scale` sees."""
        if scale + 1 < self.pyramid.num_scales:
            cache.drop_before(self.first_visible[scale + 1])

    def _kept_branches(
        self, block: Block, x_BLC: Tensor, generator: torch.Generator | RowDraws | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which branches are kept: chosen outside the block, so that a recomputed block drops the same ones."""
        if generator is None or not self.training or block.drop_path == 0:
            return None, None
        keep = 1 - block.drop_path
        kept = [draw_rows(generator, x_BLC.shape[0]) < keep for _ in range(2)]
        return torch.stack(kept).to(x_BLC.device), torch.full((), keep, device=x_BLC.device)

    def _embed(self, scales: range, inputs_BLZ: Tensor, embedding_BC: Tensor) -> Tensor:
        dtype = self.input_projection.weight.dtype
        parts = []
        if scales.start == 0:
            parts.append(embedding_BC.unsqueeze(1) + self.start_position)
        if inputs_BLZ.shape[1]:
            parts.append(self.input_projection(inputs_BLZ.to(dtype)))
        x_BLC = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        spans = self.pyramid.spans
        span = slice(spans[scales.start].start, spans[scales.stop - 1].stop)
        scale_ids = torch.tensor(self.pyramid.scale_of_token[span], device=x_BLC.device)
        places_1LC = self.scale_embedding(scale_ids) + self.position_embedding[:, span]
        if torch.is_grad_enabled() and len(parts) == 1:
            # Every parameter has a gradient in every training step, which is what ranks that share gradients rely on.
            unused = self.input_projection.parameters() if scales.start == 0 else [self.start_position]
            places_1LC = places_1LC + 0 * torch.stack([parameter.sum() for parameter in unused]).sum()
        return x_BLC + places_1LC

    def _initialise(self, sizes: TransformerConfig) -> None:
        """Truncated normals of std √(1/3C), small gates and head, depth-scaled residual projections."""
        std = math.sqrt(1 / (3 * sizes.embed_dim))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(self.conditioner, VectorConditioner):
            nn.init.trunc_normal_(self.conditioner.no_vector, std=std)
        nn.init.trunc_normal_(self.start_position, std=std)
        nn.init.trunc_normal_(self.position_embedding, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_modulation.weight.mul_(0.5)
            for block in self.blocks:
                block.attention.projection.weight.div_(math.sqrt(2 * sizes.depth))
                block.mlp.down.weight.div_(math.sqrt(2 * sizes.depth))
                if block.modulation is not None:
                    block.modulation.weight[: 2 * sizes.embed_dim].mul_(sizes.gate_init)
                    block.modulation.weight[2 * sizes.embed_dim :].mul_(0.5)
                if block.modulation_offset is not None:
                    block.modulation_offset[:, :, :2].mul_(sizes.gate_init)
                    block.modulation_offset[:, :, 2:].mul_(0.5)
