"""An exponential moving average of the weights, which samples better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mvar_core.training.optim import by_kind


class EMA:
    """The average of a module's trained parameters, on their device and in their dtype, starting from those now.

    Step t (from 0) moves the average by 1 - min(decay, (1 + t) / (10 + t)) towards the weights, so that the random
    start is soon forgotten.
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
