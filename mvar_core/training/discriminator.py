"""The adversarial loss of tokenizers: a PatchGAN discriminator, hinge losses, and the weight that balances them.

As in VQGAN (Esser et al., arXiv 2012.09841): the weight keeps the adversarial gradient at the decoder's last layer as
large as the reconstruction's. The discriminator has an optimizer of its own and takes its step after the tokenizer's.
"""

# Shape suffixes: B batch, C channels, H W pixels, h w positions of the discriminator's map.

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mvar_core.config import RunConfig
from mvar_core.config.training import AdversarialConfig
from mvar_core.distributed import world
from mvar_core.errors import ConfigError
from mvar_core.runtime import generator
from mvar_core.training.optim import build_optimizer, learning_rate

_MEANS = ("discriminator", "logit_real", "logit_fake")
_LECAM_DECAY = 0.999
_EPSILON = 1e-4  # VQGAN's, in the denominator of the adaptive weight


class PatchDiscriminator(nn.Module):
    """A map of logits, one for each patch of an image: is it real?

    Convolutions 4×4 of stride 2, then two of stride 1; GroupNorm, so that a logit depends on its own image alone and
    never on the batch, and LeakyReLU between them. With three layers a patch is 70×70 pixels.
    """

    def __init__(self, config: AdversarialConfig, seed: int):
        super().__init__()
        widths = [min(config.channels * 2**level, config.channels * 8) for level in range(config.layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, len(widths)):
            stride = 2 if level < config.layers else 1
            modules += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        source = generator("discriminator", seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0.0, 0.02, generator=source)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits of patches of images in [-1, 1]: positive is real."""
        logits: Tensor = self.layers(images_BCHW)
        return logits


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½·(mean max(0, 1 - real) + mean max(0, 1 + fake)) of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits of what was generated."""
    return -fake.mean()


def lecam_loss(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al., arXiv 2104.03310): logits stay near the running mean of the other kind."""
    return (real - mean_fake).square().mean() + (mean_real - fake).square().mean()


def balance(
    reconstruction: Tensor, adversarial: Tensor, images_BCHW: Tensor, last_layer: Tensor, config: AdversarialConfig
) -> tuple[Tensor, Tensor]:
    """Reconstruction + λ·adversarial, with λ = weight · min(‖∂reconstruction/∂w‖ / (‖∂adversarial/∂w‖ + 1e-4), max).

    Both losses, scalars, must depend on parameters through the images alone. Their networks are passed backward once:
    the gradients at the images serve the norms at the decoder's last layer w and the step itself. Returns the sum, with
    its gradient with respect to the images, and λ.
    """
    at_images = [torch.autograd.grad(loss, images_BCHW)[0] for loss in (reconstruction, adversarial)]
    weight = reconstruction.new_tensor(config.weight, dtype=torch.float32)
    if config.adaptive:
        at_weights = [torch.autograd.grad(images_BCHW, last_layer, at, retain_graph=True)[0] for at in at_images]
        norms = [gradient.float().norm() for gradient in at_weights]
        weight = weight * (norms[0] / (norms[1] + _EPSILON)).clamp(max=config.max_weight)
    value = (reconstruction + weight * adversarial).detach()
    carrier = (images_BCHW * (at_images[0] + weight * at_images[1])).sum()
    return value + (carrier - carrier.detach()), weight


class Adversary:
    """The discriminator of a tokenizer's run, its optimizer, and what it carries from step to step.

    `dtype` is what autocast computes in; `seed` is that of the first weights. ConfigError where images are too small
    for so many layers.
    """

    def __init__(self, run: RunConfig, *, device: torch.device, dtype: torch.dtype, seed: int):
        self.train, self.config = run.train_tokenizer, run.train_tokenizer.adversarial
        self.device, self.dtype = device, dtype
        smallest = 3 * 2**self.config.layers
        if min(run.image_shape) < smallest:
            raise ConfigError(
                f"A discriminator of {self.config.layers} layers needs images of {smallest} pixels or more;"
                f" these have {run.image_shape[0]}×{run.image_shape[1]}.",
                "Lower train_tokenizer.adversarial.layers.",
            )
        with torch.random.fork_rng(devices=[]):  # building layers consumes random numbers of the global generator
            network = PatchDiscriminator(self.config, seed)
        self.network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.network, self.config.optimizer, device=device)
        self.lecam_means = torch.zeros(2, device=device)
        self.window = torch.zeros(1 + len(_MEANS), device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_step = -1

    def generator_loss(self, images_BCHW: Tensor) -> Tensor:
        """The generator's loss on images; the discriminator's parameters get no gradient from `balance`."""
        return hinge_generator_loss(self.network(images_BCHW).float())

    def keep(self, real_BCHW: Tensor, fake_BCHW: Tensor, step: int) -> None:
        """Remember what the discriminator will learn from after this step; micro-batches add up."""
        if step != self._waiting_step:
            self._waiting, self._waiting_step = [], step
        self._waiting.append((real_BCHW, fake_BCHW.detach()))

    def step(self, step: int) -> None:
        """One step of the discriminator on what was kept; skipped where its gradient is not finite."""
        batches, self._waiting = self._waiting, []
        if not batches or step != self._waiting_step:
            return
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(len(real) for real, _ in batches)
        means = torch.zeros(len(_MEANS), device=self.device)
        for real_BCHW, fake_BCHW in batches:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
                real, fake = self.network(torch.cat([real_BCHW, fake_BCHW])).float().chunk(2)
            loss = hinge_discriminator_loss(real, fake)
            if self.config.lecam:
                loss = loss + self.config.lecam * lecam_loss(real, fake, *self.lecam_means)
            share = len(real_BCHW) / total
            (loss * share).backward()
            means += share * torch.stack([loss.detach(), real.detach().mean(), fake.detach().mean()])
        job = world()
        if job.world_size > 1:
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(job.all_reduce_sum(parameter.grad) / job.world_size)
        optimizer, start = self.config.optimizer, self.config.start
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optimizer.grad_clip or math.inf)
        if not bool(norm.isfinite()):
            return
        # The schedule runs from the discriminator's first step to the tokenizer's last.
        rate = learning_rate(step - start, max(1, self.train.steps - start), self.train.batch_size, optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.lecam_means.lerp_(means[1:], 1 - _LECAM_DECAY)
        self.window += torch.cat([torch.ones_like(means[:1]), means])

    def describe(self) -> dict[str, float]:
        """Means since the last call; nothing where the discriminator did not learn."""
        count, *sums = self.window.tolist()
        self.window.zero_()
        return {name: total / count for name, total in zip(_MEANS, sums, strict=True)} if count else {}

    def state(self) -> dict[str, Tensor]:
        """Network, optimizer and means, as tensors by name."""
        state = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return {**state, "lecam_means": self.lecam_means, "window": self.window}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(under("network.", state))
        slots = {index: under(f"optimizer.{index}.", state) for index, _ in enumerate(self.network.parameters())}
        kept = {index: values for index, values in slots.items() if values}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        self.lecam_means, self.window = state["lecam_means"].to(self.device), state["window"].to(self.device)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
