"""Where measures and pictures go besides metrics.jsonl: TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mvar_core.config.training import LoopConfig
from mvar_core.errors import ConfigError
from mvar_core.io.files import write_text


class Tracker(Protocol):
    """Takes what a run measures."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, without its step."""
        ...

    def picture(self, step: int, image: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 of what the model makes."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class TensorBoard:
    """Event files under the run's tensorboard/.

    Args:
        directory: Where they are written.
        step: Steps done before; what earlier sessions wrote of later steps is hidden.
    """

    def __init__(self, directory: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers as scalars, lists as one scalar per scale."""
        for name, value in flat_numbers(values):
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, image: np.ndarray) -> None:
        """A picture under "samples"."""
        self._writer.add_image("samples", image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still held."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; project, entity and mode are what its environment variables say.

    Its identifier is kept in the run directory, so that a resumed run goes on there. Steps that a killed session had
    logged after its last checkpoint are logged a second time, with equal values.

    Args:
        out: The run directory.
        settings: Shown as the run's configuration.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        name = out / "wandb-id.txt"
        identifier = name.read_text(encoding="utf-8").strip() if name.is_file() else wandb.util.generate_id()
        write_text(name, identifier + "\n")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mvar"),
            name=out.name,
            id=identifier,
            resume="allow",
            dir=str(out),
            config=dict(settings),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers, against the step as their axis."""
        self._run.log({"step": step, **dict(flat_numbers(values))})

    def picture(self, step: int, image: np.ndarray) -> None:
        """A picture under "samples"."""
        self._run.log({"step": step, "samples": self._wandb.Image(image)})

    def close(self) -> None:
        """End the session."""
        self._run.finish()


def open_trackers(train: LoopConfig, out: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that the configuration asks for.

    Args:
        train: Says which.
        out: The run directory.
        step: Steps done before.
        settings: The run's configuration.

    Raises:
        ConfigError: One that is asked for is not installed.
    """
    check_trackers(train)
    trackers: list[Tracker] = []
    if train.tensorboard:
        trackers.append(TensorBoard(out / "tensorboard", step))
    if train.wandb:
        trackers.append(WeightsAndBiases(out, settings))
    return trackers


def check_trackers(train: LoopConfig) -> None:
    """Refuse trackers that are not installed, before anything slow begins.

    Raises:
        ConfigError: Says what to install.
    """
    from importlib.util import find_spec

    for wanted, package, name in (
        (train.tensorboard, "tensorboard", "TensorBoard"),
        (train.wandb, "wandb", "Weights & Biases"),
    ):
        if wanted and find_spec(package) is None:
            raise ConfigError(
                f"{name} is not installed.", f"Install it with `pip install {package}`, or train without --{package}."
            )


def flat_numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a line, those in lists under name/index."""
    for name, value in values.items():
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, item in items:
            if isinstance(item, int | float) and np.isfinite(item):
                yield (name if index is None else f"{name}/{index}"), float(item)
