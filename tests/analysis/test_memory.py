from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes

from mvar_core.analysis import memory
from mvar_core.analysis.convolutions import decoder_layers
from mvar_core.config import SamplingConfig
from mvar_core.models import footprint
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.presets import load_config
from mvar_core.sampling.sampler import sample_tokens
from mvar_core.train_config import TrainConfig


def build(*settings):
    config = load_config("digits", settings)
    return config, Transformer(config).eval(), VQVAE(config.tokenizer, config.pyramid).eval()


@pytest.mark.parametrize("prefixes", ["all", 1, 2])
@pytest.mark.parametrize(("width", "codes", "top_k", "top_p"), [(128, 64, 0, 0), (64, 1024, 300, 0.96)])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_sampling_peak_follows_the_tensors_that_live(prefixes, width, codes, top_k, top_p, cfg):
    config, transformer, tokenizer = build(
        f"attention.scale_prefixes={prefixes}",
        f"transformer.embed_dim={width}",
        "transformer.depth=6",
        f"tokenizer.codebook_size={codes}",
    )
    batch = 8
    settings = SamplingConfig(cfg=cfg, top_k=top_k, top_p=top_p)
    labels, indices = [0, 1, 2, 3, 4, 5, 6, 7], range(batch)
    with LiveBytes([*transformer.parameters(), *tokenizer.parameters()]) as live:
        sample_tokens(transformer, tokenizer.quantizer, labels, indices, 0, settings, attention="dense")
    predicted = memory.sample_peak_bytes(config, batch, 4, cfg > 0, top_k) - memory.weight_bytes(config, 4)
    assert predicted == pytest.approx(live.peak, rel=0.2)


def test_decoder_peak_follows_the_tensors_that_live():
    config, _, tokenizer = build()
    fhat = torch.zeros(1, 8, 8, 8)
    with torch.no_grad(), LiveBytes(tokenizer.parameters()) as live:
        tokenizer.decode_features(fhat)
    widest = max(layer.outputs for layer in decoder_layers(config.tokenizer, config.pyramid.latent_grid))
    assert 3 * widest * 4 == pytest.approx(live.peak, rel=0.1)
    alone = config.model_copy(update={"transformer": None})
    assert memory.sample_peak_bytes(alone, 64, 4, True) == (
        memory.weight_bytes(alone, 4) + 64 * footprint.image_bytes(alone) + footprint.decoder_bytes(alone, 4)
    )
    assert footprint.decoder_bytes(alone, 4) >= 3 * widest * 4


def test_weights_are_as_many_bytes_as_the_modules_hold():
    config, transformer, tokenizer = build()
    transformer.to_compute_dtype(torch.bfloat16)
    tokenizer.to_compute_dtype(torch.bfloat16)
    parameters = [*transformer.parameters(), *tokenizer.parameters()]
    assert memory.weight_bytes(config, 2) == sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_memory_follows_what_autograd_keeps(dtype):
    config, transformer, _ = build("transformer.embed_dim=128", "transformer.depth=6")
    transformer.train()
    given = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    batch, length = 8, config.pyramid.num_tokens
    labels, inputs = torch.zeros(batch, dtype=torch.int64), torch.randn(batch, length - 1, 8)
    generator = torch.Generator().manual_seed(0)
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        logits = transformer(labels, inputs, attention="dense", generator=generator)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(batch * length, dtype=torch.int64))
    measured = sum(size for size, _ in kept.values())
    states = 16 + (2 if dtype != torch.float32 else 0)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    predicted = memory.train_peak_bytes(config, TrainConfig(batch_size=batch), dtype.itemsize) - states * parameters
    copies = 2 * parameters if dtype != torch.float32 else 0  # autocast's copies of the weights are kept too
    assert predicted == pytest.approx(measured - copies, rel=0.2)
