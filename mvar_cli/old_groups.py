"""Options that several commands share as a group: a dataclass, one field for each option.

A command takes the group as one parameter; `ungrouped` turns its fields into options.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from mvar_cli import old_options as options


@dataclass(frozen=True)
class LoopOptions:
    """Keys of any training section that have flags of their own; None where the flag was not given."""

    accumulate: options.Accumulate = None
    micro_batch: options.MicroBatch = None
    ema: options.Ema = None
    checkpoint_every: options.CheckpointEvery = None
    keep: options.Keep = None
    tensorboard: options.TensorBoard = None
    wandb: options.WeightsAndBiases = None

    @property
    def keys(self) -> dict[str, Any]:
        """The section's keys with their values."""
        return asdict(self)


@dataclass(frozen=True)
class TransformerLoopOptions(LoopOptions):
    """Those of the transformer's training section."""

    activation_checkpointing: options.ActivationCheckpointing = None
    compile: options.Compile = None
    sample_every: options.SampleEvery = None


@dataclass(frozen=True)
class TrainOptions:
    """What every training of a transformer takes: data, length, and the machine."""

    tokens: options.Tokens = None
    data: options.OptionalData = None
    settings: options.Settings = None
    image_size: options.ImageSize = None
    steps: options.Steps = None
    epochs: options.Epochs = None
    batch_size: options.BatchSize = None
    seed: options.OptionalSeed = None
    validation: options.Validation = None
    resume: options.Resume = True
    overwrite: options.Overwrite = False
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    attention: options.Attention = "auto"
    fsdp: options.Fsdp = False


def ungrouped(run: Callable[..., None]) -> Callable[..., None]:
    """A command's function with the fields of its groups as parameters of their own, in the groups' places."""
    hints = typing.get_type_hints(run, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    if not groups:
        return run
    parameters = []
    for parameter in inspect.signature(run).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))

    @functools.wraps(run)
    def with_options(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        run(**values)

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    empty = inspect.Parameter.empty
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
