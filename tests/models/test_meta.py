"""Models without values: the same tensors as models with values, and no random numbers drawn."""

import torch

from mvar_core.config.presets import load_config
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE


def test_a_model_on_the_meta_device_has_the_tensors_of_a_model_and_no_values():
    config = load_config("digits").model
    before = torch.get_rng_state()
    with meta_device():
        bare = [Transformer(config), VQVAE(config.tokenizer, config.pyramid)]
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        whole = [Transformer(config), VQVAE(config.tokenizer, config.pyramid)]
    for one, other in zip(bare, whole, strict=True):
        found, expected = one.state_dict(), other.state_dict()
        assert found.keys() == expected.keys()
        assert all(found[name].is_meta for name in found)
        assert all(
            (found[name].shape, found[name].dtype) == (expected[name].shape, expected[name].dtype) for name in expected
        )
