"""Models with random weights, made in the dtype that they compute in: to measure sizes for which there are no files."""

from __future__ import annotations

import math

import torch
from torch import nn

from mvar_core.config import ModelConfig
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.runtime import generator


def random_transformer(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Transformer:
    """A transformer of random weights, frozen, in evaluation mode; at no time is there a copy in another dtype."""
    with meta_device():
        model = Transformer(config).to_compute_dtype(dtype)
    _fill(model, device, seed)
    return model


def random_tokenizer(
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    encoder: bool = True,
) -> VQVAE:
    """A tokenizer of random weights, frozen, in evaluation mode, channels last; with or without its encoder."""
    with meta_device():
        model = VQVAE(config.tokenizer, config.pyramid).to_compute_dtype(dtype)
    if not encoder:
        model.drop_encoder()
    _fill(model, device, seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


@torch.no_grad()
def _fill(model: nn.Module, device: torch.device | str, seed: int) -> None:
    """Weights of the size that keeps activations at theirs; norms and head scales as they start in training."""
    assert not list(model.buffers())
    model.to_empty(device=device).eval().requires_grad_(False)
    random = generator("random_model", seed, device=device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "log_head_scale":
                parameter.fill_(math.log(4))
            elif isinstance(module, nn.GroupNorm) and name == "weight":
                parameter.fill_(1)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=random)
