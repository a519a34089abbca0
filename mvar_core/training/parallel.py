"""How the processes of a job share a training step: one process, data parallel (DDP), or sharded (FSDP2).

Each process computes some rows of every batch, and all end with the weights that one process alone would have. Data
parallel: every process has the whole model. Sharded: every process has a shard of every parameter, of its gradient, its
optimizer state and its average, and gathers a block's parameters when it computes the block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvar_core.distributed import World, world
from mvar_core.errors import ConfigError
from mvar_core.models.transformer import Transformer
from mvar_core.training.checkpoints import TrainingState, load_checkpoint, save_checkpoint, save_shards
from mvar_core.training.optim import by_kind

_WHOLE = ("log_head_scale", "modulation_offset")
"""Parameters too small to be worth sharding, and needed in full precision or outside their block's forward pass."""


def choose_parallel(
    device: torch.device, dtype: torch.dtype, batch_size: int, *, fsdp: bool = False, partial: bool = False
) -> Parallel:
    """How the processes that are connected share a batch of `batch_size` images; alone, one process does it all.

    `fsdp` shards the model over them; `partial` says that some steps do not use some parameters. ConfigError where
    number of processes, batch size and dtype do not fit together.
    """
    here = world()
    if fsdp and dtype == torch.float16:
        raise ConfigError("--fsdp trains in float32 or bfloat16, found float16.", "Add --dtype bfloat16.")
    check_batch(batch_size, here.world_size, fsdp=fsdp)
    if fsdp:
        if here.world_size == 1:
            raise ConfigError(
                "--fsdp shards a model over several processes, found one.", "Add --nproc N, or leave out --fsdp."
            )
        return Sharded(here, device, dtype)
    return DataParallel(here, device, partial) if here.world_size > 1 else Parallel(here)


def check_batch(batch_size: int, world_size: int, *, fsdp: bool = False) -> None:
    """Refuse a batch of too few images for the processes, or with FSDP one of unequal shares (ConfigError)."""
    if batch_size >= world_size and not (fsdp and batch_size % world_size):
        return
    rule = "a multiple of the number of processes" if fsdp else "at least one image for each process"
    raise ConfigError(
        f"A batch of {batch_size} images cannot be shared by {world_size} processes{' with --fsdp' if fsdp else ''};"
        f" expected {rule}.",
        f"Try --batch-size {max(1, math.ceil(batch_size / world_size)) * world_size}.",
    )


@dataclass(frozen=True)
class BatchPart:
    """Rows `start` … `stop` - 1 of a batch of `total` that are computed together: a micro-batch, a process's share."""

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> int:
        """How many rows the part has."""
        return self.stop - self.start

    def split(self, size: int) -> list[BatchPart]:
        """Parts of `size` rows at most, in order."""
        return [
            BatchPart(start, min(start + size, self.stop), self.total) for start in range(self.start, self.stop, size)
        ]


class Parallel:
    """One process that has the whole model; the base of the other ways."""

    def __init__(self, world: World | None = None):
        self.world = world or World()

    def wrap(self, module: nn.Module) -> nn.Module:
        """What the forward pass goes through; called once, before the optimizer is built on `module`."""
        return module

    def part(self, batch_size: int) -> BatchPart:
        """The rows of a step's batch that this process computes."""
        rank, size = self.world.rank, self.world.world_size
        return BatchPart(batch_size * rank // size, batch_size * (rank + 1) // size, batch_size)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Entered around the forward and backward pass of each micro-batch; only the last exchanges gradients."""
        return nullcontext()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a total norm of `limit` at most (0 does not clip); returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf)

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's whole state dict, in rank 0 at least; all processes call this together."""
        return dict(module.state_dict())

    def save(self, out: Path, state: TrainingState, keep: int) -> None:
        """Write a checkpoint; all processes call this together."""
        if self.world.is_rank_zero:
            save_checkpoint(out, state, keep)

    def load(self, path: Path, module: nn.Module) -> TrainingState:
        """Read a checkpoint of any kind, with tensors sharded as `module`'s are; all processes call this together."""
        return load_checkpoint(path)


class DataParallel(Parallel):
    """Every process has the whole model; gradients are averaged while the backward pass still runs (DDP)."""

    def __init__(self, world: World, device: torch.device, partial: bool = False):
        super().__init__(world)
        self.device = device
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
        """Exchange gradients with the last micro-batch alone."""
        with nullcontext() if last else cast("nn.parallel.DistributedDataParallel", model).no_sync():
            yield


class Sharded(Parallel):
    """Every process has a shard of the model (FSDP2).

    A block's parameters are gathered for its forward and again for its backward pass, in bfloat16 where that is
    computed in; shards, sums of gradients and optimizer state are float32.
    """

    def __init__(self, world: World, device: torch.device, dtype: torch.dtype):
        super().__init__(world)
        self.device = device
        self.dtype = dtype
        self.mesh = dist.device_mesh.init_device_mesh(device.type, (world.world_size,))
        self._whole: list[nn.Parameter] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        """Shard in place a transformer that is the same in all processes; the shards move to this one's device."""
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
            if modulation is not None:  # it is computed before the blocks are, so it is gathered by itself
                fully_shard(modulation, mesh=self.mesh, mp_policy=policy)
            fully_shard(block, mesh=self.mesh, mp_policy=policy, ignored_params=whole)
        # Embeddings and head are computed in float32.
        fully_shard(module, mesh=self.mesh, ignored_params=whole)
        return module

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients with the last micro-batch alone."""
        cast("Any", model).set_requires_gradient_sync(last)
        yield
        gradients = [parameter.grad for parameter in self._whole if parameter.grad is not None]
        if last and gradients:
            total = self.world.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
            means = (total / self.world.world_size).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a total norm of `limit` at most, over all shards; returns the norm before."""
        kinds = [kind for kind in by_kind([p for p in parameters if p.grad is not None]) if kind]
        norms = [nn.utils.get_total_norm([cast("Tensor", p.grad) for p in kind]) for kind in kinds]
        total = torch.linalg.vector_norm(torch.stack([whole_tensor(norm) for norm in norms]))
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, limit or math.inf, total)
        return total

    def full_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's state dict, whole, on the processor; all processes gather, rank 0 keeps it."""
        every = ((name, whole_tensor(value)) for name, value in module.state_dict().items())
        return {name: whole.cpu() for name, whole in every if self.world.is_rank_zero}

    def save(self, out: Path, state: TrainingState, keep: int) -> None:
        """Write a directory into which every process writes its shards."""
        save_shards(out, state, keep, self.world)

    def load(self, path: Path, module: nn.Module) -> TrainingState:
        """Read a checkpoint of any kind into this process's shards."""
        state = load_checkpoint(path, self.mesh)
        if path.is_dir():
            return state
        for name, parameter in module.named_parameters():
            for values in (state.model, state.average):
                if name in values:
                    values[name] = self._shard(values[name], parameter)
            slots = state.optimizer.get(name, {})
            slots.update({slot: self._shard(value, parameter) for slot, value in slots.items()})
        return state

    def _shard(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A tensor sharded as a parameter is, where it has the parameter's shape."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        data = parameter.data
        if not isinstance(data, DTensor) or value.shape != data.shape:
            return value
        return distribute_tensor(value.to(self.device), self.mesh, data.placements, src_data_rank=None)


def local_tensor(value: Tensor) -> Tensor:
    """This process's shard of a tensor that is sharded; any other as it is."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def whole_tensor(value: Tensor) -> Tensor:
    """A whole tensor in all processes, from one that is sharded over them; all of them call this together."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
