from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mvar_core.config import RunConfig
from mvar_core.config.training import AdversarialConfig, TokenizerTrainConfig
from mvar_core.errors import ConfigError
from mvar_core.training.discriminator import (
    Adversary,
    PatchDiscriminator,
    balance,
    hinge_discriminator_loss,
    hinge_generator_loss,
    lecam_loss,
)


def small(**changes: object) -> AdversarialConfig:
    return AdversarialConfig(**{"weight": 0.5, "channels": 8, "layers": 2, **changes})


def make_adversary(config: AdversarialConfig, steps: int = 20) -> Adversary:
    train = TokenizerTrainConfig(steps=steps, batch_size=4, adversarial=config)
    run = RunConfig(image_size=16, patch_sizes=(1,), train_tokenizer=train)
    return Adversary(run, device=torch.device("cpu"), dtype=torch.float32, seed=0)


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hinge_losses_are_their_definition():
    real, fake = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([-3.0, -0.5, 1.0])
    expected = 0.5 * (np.mean([3.0, 0.5, 0.0]) + np.mean([0.0, 0.5, 2.0]))
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert hinge_generator_loss(fake).item() == pytest.approx(2.5 / 3)


def test_lecam_pulls_logits_to_the_mean_of_the_other_kind():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    expected = ((1 - 0.5) ** 2 + (3 - 0.5) ** 2) / 2 + ((2 + 1) ** 2 + 2**2) / 2
    assert lecam_loss(real, fake, torch.tensor(2.0), torch.tensor(0.5)).item() == pytest.approx(expected)


def test_a_patch_sees_70_pixels_with_three_layers_and_no_other_image():
    network = PatchDiscriminator(small(layers=3, channels=4), seed=0).double()
    nn.Module.requires_grad_(network, False)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):  # which sees all positions, and would hide the patch
            module.forward = lambda x: x
    picture = torch.randn(2, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(picture)
    assert logits.shape == (2, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = picture.grad.abs().sum(dim=1) > 0
    assert not seen[1].any()
    rows, columns = seen[0].nonzero(as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70


def test_first_weights_follow_from_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = make_adversary(small()), make_adversary(small())
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(one, other)
    weights = first.network.layers[0].weight
    assert 0.01 < weights.std() < 0.03


@pytest.mark.parametrize("changes", [{}, {"adaptive": False}, {"max_weight": 0.01}])
def test_balance_is_the_plain_sum_with_the_weight_of_its_formula(changes):
    config = small(**changes)
    decoder = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))
    discriminator = PatchDiscriminator(config, seed=1)
    latents, targets = torch.randn(4, 2, 16, 16), images(0)

    def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = decoder(latents)
        return (made - targets).abs().mean(), hinge_generator_loss(discriminator(made)), made

    # The slow definition: each loss goes back through its whole network, twice.
    reconstruction, adversarial, _ = losses()
    last = decoder[2].weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
    weight = torch.tensor(config.weight)
    if config.adaptive:
        weight = config.weight * torch.clamp(norms[0] / (norms[1] + 1e-4), 0, config.max_weight)
    expected = reconstruction + weight * adversarial
    wanted = torch.autograd.grad(expected, list(decoder.parameters()))

    reconstruction, adversarial, made = losses()
    loss, found = balance(reconstruction, adversarial, made, last, config)
    torch.testing.assert_close(found, weight)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(torch.autograd.grad(loss, list(decoder.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_the_discriminator_learns_to_tell_and_says_so():
    adversary = make_adversary(small(optimizer={"lr": 3e-3}), steps=40)
    assert adversary.describe() == {}
    for step in range(40):
        adversary.keep(images(step) * 0.2, images(100 + step), step)
        adversary.step(step)
        if step == 0:
            first = adversary.describe()
    last = adversary.describe()
    assert set(last) == {"discriminator", "logit_real", "logit_fake"}
    assert last["discriminator"] < 0.7 * first["discriminator"]
    assert last["logit_real"] > last["logit_fake"]


def test_micro_batches_add_up_and_what_was_kept_of_a_skipped_step_is_forgotten():
    whole, parts = make_adversary(small(lecam=0.1)), make_adversary(small(lecam=0.1))
    real, fake = images(0), images(1)
    whole.keep(real, fake, 3)
    whole.step(3)
    parts.keep(images(5), images(6), 2)  # a step that was skipped
    parts.keep(real[:1], fake[:1], 3)
    parts.keep(real[1:], fake[1:], 3)
    parts.step(3)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    before = [parameter.clone() for parameter in whole.network.parameters()]
    whole.step(4)  # nothing was kept
    whole.keep(real, torch.full_like(fake, float("nan")), 5)
    whole.step(5)
    assert all(map(torch.equal, before, whole.network.parameters()))


def test_state_and_load_state_resume_bit_for_bit():
    straight = make_adversary(small(lecam=0.1))
    for step in range(3):
        straight.keep(images(step), images(10 + step), step)
        straight.step(step)
    resumed = make_adversary(small(lecam=0.1))
    resumed.load_state({name: value.clone() for name, value in straight.state().items()})
    for adversary in (straight, resumed):
        for step in range(3, 6):
            adversary.keep(images(step), images(10 + step), step)
            adversary.step(step)
    states = straight.state(), resumed.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert straight.describe() == resumed.describe()


def test_images_too_small_for_the_layers_are_refused():
    with pytest.raises(ConfigError, match=r"needs images of 24 pixels or more; these have 16×16"):
        make_adversary(small(layers=3))
