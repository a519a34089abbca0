"""AdamW as the published recipes use it, the learning rate as a function of the step, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvar_core.config.training import OptimizerConfig

_CONSTANT_SHARE = 0.05  # of the steps after the warm-up, in the published "lin0"


def learning_rate(step: int, total_steps: int, batch_size: int, config: OptimizerConfig) -> float:
    """Learning rate of the step that follows `step` others: linear warm-up, then constant, cosine, or "lin0".

    "lin0" is the published schedule: constant for 5 % of the steps after the warm-up, then linear to `end` · peak at
    the last step. The peak is scaled by batch_size / lr_batch where lr_batch is set.
    """
    peak = config.lr * (batch_size / config.lr_batch if config.lr_batch else 1.0)
    warmup = round(config.warmup if config.warmup >= 1 else config.warmup * total_steps)
    if step < warmup:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    passed = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "cosine":
        factor = config.end + (1 - config.end) * (0.5 + 0.5 * math.cos(math.pi * passed))
    elif passed < _CONSTANT_SHARE:
        factor = 1.0
    else:
        factor = config.end + (1 - config.end) * (1 - passed) / (1 - _CONSTANT_SHARE)
    return peak * factor


def parameter_groups(module: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """The groups of AdamW: parameters that decay, and those that do not. Frozen ones are left out.

    Biases, 1-D parameters and those named in `no_decay` (tables, scales) do not decay. A name there that the module
    does not have raises ValueError.
    """
    parameters = dict(module.named_parameters())
    if unknown := sorted(set(no_decay) - parameters.keys()):
        raise ValueError(f"no_decay names unknown parameters: {', '.join(unknown)}")
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        spared = parameter.ndim <= 1 or name.endswith("bias") or name in no_decay
        if parameter.requires_grad:
            (kept if spared else decayed).append(parameter)
    # Operations on lists of tensors take no mixture of sharded and whole ones.
    return [
        {"params": kind, "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (kept, 0.0))
        for kind in by_kind(group)
        if kind
    ]


def by_kind(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that are sharded over processes, and those that this process has whole."""
    if not dist.is_available():
        return [], list(tensors)
    from torch.distributed.tensor import DTensor

    return [t for t in tensors if isinstance(t, DTensor)], [t for t in tensors if not isinstance(t, DTensor)]


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps of each parameter, by its name: that does not depend on groups and their order."""
    return {name: dict(state) for name, weight in module.named_parameters() if (state := optimizer.state.get(weight))}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned; a parameter that the module does not have raises KeyError."""
    weights = dict(module.named_parameters())
    indices = {weight: i for i, weight in enumerate(w for group in optimizer.param_groups for w in group["params"])}
    state = {indices[weights[name]]: dict(values) for name, values in found.items()}
    # Through the optimizer's own loading, which knows what belongs on which device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, no_decay: Collection[str] = (), device: torch.device | None = None
) -> torch.optim.AdamW:
    """AdamW over the groups of a module that is on its device, in one fused kernel where the device has one.

    `device` is by default that of the first parameter. The learning rate is set before every step.
    """
    device = device or next(module.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay, no_decay),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


class EMA:
    """The moving average of a module's trained parameters, which samples better than the weights of any one step.

    It starts from the weights as they are; step t (from 0) moves it by 1 - min(decay, (1 + t) / (10 + t)) towards them,
    so that the random start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Move the average towards the weights, after `steps` updates before this one."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages, weights = by_kind(list(self._average.values())), by_kind(list(self._weights.values()))
        for average, weight in zip(averages, weights, strict=True):
            if average:
                torch._foreach_lerp_(average, weight, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the module has the average for weights; then its own again, to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average, one parameter at a time."""
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The average by parameter names."""
        return dict(self._average)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, average in self._average.items():
            average.copy_(state[name])
