"""Training in several processes: each computes some rows of every batch, and all end with the weights of one process.

Data parallel (DDP): every process has the whole model. Sharded (FSDP2): every process has a slice of every parameter,
of its gradient, its moments and its average, and gathers a block's parameters when it computes the block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvar_core.errors import ConfigError
from mvar_core.models.transformer import Transformer
from mvar_core.training.checkpoints import (
    TrainingState,
    checkpoint_path,
    load_checkpoint,
    prune_checkpoints,
    state_content,
    state_of_content,
)
from mvar_core.training.objective import BatchPart
from mvar_core.training.optim import by_kind
from mvar_core.training.sharded import SHARDED, load_shards, save_shards
from mvar_core.training.strategy import Strategy

Value = TypeVar("Value")

_WHOLE = ("log_head_scale", "modulation_offset")
"""Parameters too small to be worth slicing, and needed in full precision or outside their block's forward pass."""


def choose_strategy(
    device: torch.device, dtype: torch.dtype, batch_size: int, *, fsdp: bool = False, partial: bool = False
) -> Strategy:
    """How the processes that torch.distributed connects share the work; alone, one process does it all.

    Args:
        device: Where this process computes.
        dtype: What autocast computes in.
        batch_size: Images per step, over all processes.
        fsdp: Slice the model over the processes.
        partial: Some steps do not use some parameters.

    Raises:
        ConfigError: Processes, batch and type do not go together.
    """
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if fsdp and dtype == torch.float16:
        raise ConfigError("--fsdp trains in float32 or bfloat16, found float16.", "Add --dtype bfloat16.")
    if batch_size < count or (fsdp and batch_size % count):
        rule = "a multiple of the number of processes" if fsdp else "one image for each process at least"
        raise ConfigError(
            f"A batch of {batch_size} images cannot be shared by {count} processes{' with --fsdp' if fsdp else ''};"
            f" expected {rule}.",
            f"Try --batch-size {max(1, math.ceil(batch_size / count)) * count}.",
        )
    if fsdp:
        if count == 1:
            raise ConfigError(
                "--fsdp slices a model over several processes, found one.", "Add --nproc N, or leave out --fsdp."
            )
        return Sharded(device, dtype)
    return DataParallel(device, partial) if count > 1 else Strategy()


class _Connected(Strategy):
    """What holds for any number of processes that torch.distributed connects."""

    def __init__(self, device: torch.device):
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()
        self.device = device

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is raised in some process."""
        raised = torch.tensor(int(flag))  # between processors: it must not wait for a GPU
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

    def agree(self, value: Value) -> Value:
        """The first process's value."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return cast("Value", values[0])

    def copy_first(self, tensor: Tensor) -> None:
        """Give a tensor the first process's values."""
        dist.broadcast(tensor.detach(), src=0)

    def gather_rows(self, rows: Tensor, part: BatchPart) -> Tensor:
        """The rows of all processes; their shares need not be equal."""
        every = rows.new_zeros(part.total, *rows.shape[1:])
        every[part.start : part.stop] = rows
        return self.add_up(every)

    def wait(self) -> None:
        """Until all processes are here."""
        self.anywhere(False)


class DataParallel(_Connected):
    """Every process has the whole model; gradients are averaged while the backward pass still runs (DDP).

    Args:
        device: Where this process computes.
        partial: Some steps do not use some parameters, which have to be looked for.
    """

    def __init__(self, device: torch.device, partial: bool = False):
        super().__init__(device)
        self.partial = partial

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients exchanged."""
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=self.partial,
        )

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients with the last part of a batch alone."""
        if last:
            yield
        else:
            with cast("nn.parallel.DistributedDataParallel", model).no_sync():
                yield


class Sharded(_Connected):
    """Every process has a slice of the model (FSDP2).

    A block's parameters are gathered for its forward and again for its backward pass, in bfloat16 where that is
    computed in; slices, gradients' sums and moments are float32.

    Args:
        device: Where this process computes.
        dtype: What autocast computes in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__(device)
        self.dtype = dtype
        self.mesh = dist.device_mesh.init_device_mesh(device.type, (self.count,))
        self._whole: list[nn.Parameter] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        """Slice a transformer in place.

        It must be the same in all processes, on any device: slices move to this process's, block by block.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        assert isinstance(module, Transformer)
        # Nothing changes these outputs in place, which is what the warning is about.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._whole = [parameter for name, parameter in module.named_parameters() if name.endswith(_WHOLE)]
        whole = set(self._whole)
        for parameter in self._whole:
            parameter.data = parameter.data.to(self.device)
        # Activations keep their own types: autocast decides what is computed in which, as in one process.
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if self.dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in module.blocks:
            modulation = cast("nn.Module | None", block.modulation)
            if modulation is not None:  # computed before the blocks are, so it is gathered by itself
                fully_shard(modulation, mesh=self.mesh, mp_policy=policy)
            fully_shard(block, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        # Embeddings and head stay in float32: so they are computed.
        fully_shard(module, mesh=self.mesh, ignored_params=whole)
        return module

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients with the last part of a batch alone."""
        cast("Any", model).set_requires_gradient_sync(last)
        yield
        if last:
            self._average_whole()

    def _average_whole(self) -> None:
        gradients = [parameter.grad for parameter in self._whole if parameter.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = (flat / self.count).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a total norm of `limit` at most, over all slices; returns the norm before."""
        kinds = [[p for p in kind if p.grad is not None] for kind in by_kind(parameters)]
        norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
        total = torch.linalg.vector_norm(torch.stack([whole_tensor(norm) for norm in norms]))
        for kind in kinds:
            if kind:
                torch.nn.utils.clip_grads_with_norm_(kind, limit or math.inf, total)
        return total

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict, whole, on the processor; all processes gather, the first one keeps."""
        gathered = {}
        for name, value in module.state_dict().items():
            whole = whole_tensor(value)
            if self.first:
                gathered[name] = whole.cpu()
        return gathered

    def save(self, out: Path, state: TrainingState, keep: int) -> None:
        """Write a directory into which every process writes its slices."""
        save_shards(checkpoint_path(out, state.step, SHARDED), state_content(state), self)
        if self.first:
            prune_checkpoints(out, state.best_step, keep)
        self.wait()

    def load(self, path: Path, module: nn.Module) -> TrainingState:
        """Read a checkpoint of any kind into this process's slices."""
        if path.is_dir():
            return state_of_content(path, load_shards(path, self.mesh))
        state = load_checkpoint(path)
        state.model = self._slices(state.model, module)
        state.average = self._slices(state.average, module)
        slots: dict[str, dict[str, Tensor]] = {}
        for name, values in state.optimizer.items():
            for slot, value in values.items():
                slots.setdefault(slot, {})[name] = value
        for slot, values in slots.items():
            for name, value in self._slices(values, module).items():
                state.optimizer[name][slot] = value
        return state

    def _slices(self, values: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        """Tensors by parameter names, cut as the parameters are."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        own = dict(module.named_parameters())
        placed = {}
        for name, value in values.items():
            parameter = own[name]
            sliced = isinstance(parameter.data, DTensor) and value.shape == parameter.shape
            placements = cast("DTensor", parameter.data).placements if sliced else None
            placed[name] = (
                distribute_tensor(value.to(self.device), self.mesh, placements, src_data_rank=None) if sliced else value
            )
        return placed


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor that all processes have, of one that is sliced over them; all of them must ask."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
