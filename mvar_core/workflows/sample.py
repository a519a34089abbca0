"""Images of classes, words or vectors, written to files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvar_core import __version__
from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, ModelConfig, SamplingConfig
from mvar_core.distributed import World, connect, sigterm_as_interrupt
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.io.files import fingerprint
from mvar_core.kernels import check_backend
from mvar_core.models import directory, official
from mvar_core.models.micro_batches import IMAGES_AT_ONCE
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress, stage
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes, resolve_device, resolve_dtype
from mvar_core.sampling.conditions import ChosenConditions, choose_conditions
from mvar_core.sampling.images import Samples
from mvar_core.sampling.sampler import resolve_settings
from mvar_core.sampling.shards import (
    Generate,
    SampleOutput,
    SampleShards,
    SampleSpec,
    ShardProgress,
    generate_shards,
)
from mvar_core.sampling.writers import WriterPool

log = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class SampleResult(Result):
    """What `sample_to` leaves behind.

    Attributes:
        images: Images in the output; those that are kept, where the run was interrupted.
        total: Images asked for.
        resumed: Images that an earlier, interrupted run had made.
        seconds: What this call took, without loading the model.
        images_per_second: Speed of what this call sampled; None where nothing was missing.
        peak_memory_bytes: Highest memory of this process so far.
        outputs: Every file, in order.
        batch_size: Images that advanced from scale to scale together, at most.
        processes: How many shared the work.
        device: Where rank 0 sampled.
        settings: Guidance, filters and seed, resolved.
        interrupted: Whether the run was stopped; the same call resumes it.
    """

    images: int = 0
    total: int = 0
    resumed: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    outputs: tuple[Path, ...] = ()
    batch_size: int | None = None
    processes: int = 1
    device: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    interrupted: bool = False


class Interrupted(KeyboardInterrupt):
    """An interruption, with what is known of the run: other processes must not be waited for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__()
        self.values = values


def sample_to(
    out: str | Path,
    *,
    checkpoint: str | Path,
    classes: Sequence[str | int] | str = (),
    words: Sequence[str] = (),
    vectors: str | Path | None = None,
    num: int = 1,
    settings: SamplingConfig | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    format: str | None = None,  # noqa: A002
    save_tokens: bool = False,
    stages: bool = False,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    machine: Machine = Machine(),
    progress: Progress | None = None,
) -> SampleResult:
    """Write images of classes to `out`; of texts or vectors, where the model is conditioned on them.

    An image depends on the seed, its number, its class, text or vector, the settings and the weights alone: not on the
    batch size, the number of processes, or what was resumed. The same call again resumes an interrupted run. Under
    torchrun the processes share the work.

        mvar.sample_to("out", checkpoint="runs/mvar", classes="all", num=8, settings=mvar.SamplingConfig(cfg=1.5))

    Args:
        out: A directory for png, a file for npz and grid.
        checkpoint: A model directory, a run, or a published .pth file.
        classes: Labels, names, comma lists of them, or "all".
        words: Texts, for a model that is conditioned on words.
        vectors: A file of vectors, for a model that is conditioned on vectors.
        num: Images per class, text or vector.
        settings: Guidance and filters; fields that are not set are as the model recommends.
        seed: The run's seed.
        batch_size: Images that advance from scale to scale together; decides speed and memory, never the result.
        format: png, npz or grid; by default as `out` ends.
        save_tokens: Also write the token indices.
        stages: Also a strip per image that shows it after each scale.
        tokenizer: The published tokenizer, where `checkpoint` is a .pth.
        overwrite: Replace an output that exists.
        dry_run: Only report what would be done.
        machine: Device, dtype, attention backend, compilation and memory.
        progress: Called with the images that are sampled, then assembled.

    Raises:
        MvarError: Model, conditions, settings or output do not fit together.
    """
    output = SampleOutput.of(Path(out), format, save_tokens)
    if not classes and not words and vectors is None:
        raise ConfigError("Nothing was chosen to generate.", "Use --class, --words or --vectors.")
    try:
        with connect(machine.device) as world, sigterm_as_interrupt():
            check_early(world, output, overwrite)
            model = LazyModel(checkpoint, tokenizer, world, machine)
            chosen = choose_conditions(model.config, classes, words, vectors)
            resolved = resolve_settings(model.config, settings)
            if dry_run:
                total = num * len(chosen.labels)
                steps = (f"generate {total} images: {num} of each of {len(chosen.labels)} conditions",
                         f"write {output.target}")  # fmt: skip
                return SampleResult(dry_run=model.dry_run(steps, total, resolved, batch_size))
            spec = SampleSpec(**model.spec(chosen, num, resolved, seed, output, save_tokens, stages))

            def generate(indices: Sequence[int], report: Callable[[int, int], None]) -> Iterator[Samples]:
                own = {**spec.conditions(indices), "indices": indices, "progress": report}
                return model.load().stream(**own, settings=resolved, seed=seed, batch_size=batch_size, stages=stages)

            shards = SampleShards(output, spec)
            return SampleResult(**write_samples(world, shards, generate, overwrite, model, batch_size, progress))
    except Interrupted as stop:
        return SampleResult(**stop.values)


class LazyModel:
    """A model that is loaded as late as possible: its configuration tells most of what can be wrong."""

    def __init__(self, checkpoint: str | Path, tokenizer: str | Path | None, world: World, machine: Machine):
        self.checkpoint = Path(checkpoint)
        self.tokenizer = Path(tokenizer) if tokenizer is not None else None
        self.machine = machine.model_copy(update={"device": world.device(machine.device)})
        self.device = resolve_device(self.machine.device)
        self.dtype = resolve_dtype(machine.dtype, self.device)
        machine.memory_bytes  # noqa: B018  (refuses what is no amount of memory)
        self._pipeline: Pipeline | None = None
        # A published file tells its configuration by its tensors alone.
        published = self.checkpoint.is_file()
        self.config: ModelConfig = self.load().config if published else directory.read_model_config(self.checkpoint)
        check_backend(machine.attention, self.config.patterns, self.device, self.dtype)

    def load(self) -> Pipeline:
        """The pipeline."""
        if self._pipeline is None:
            self._pipeline = Pipeline.from_pretrained(self.checkpoint, tokenizer=self.tokenizer, machine=self.machine)
        return self._pipeline

    def fingerprint(self) -> str:
        """What tells these weights from others; CheckpointError where a file is missing."""
        if self.checkpoint.is_file():
            return fingerprint([self.checkpoint, self.tokenizer or official.tokenizer_next_to(self.checkpoint)])
        names = (directory.CONFIG_FILE, directory.TRANSFORMER_FILE, directory.TOKENIZER_FILE)
        files = [self.checkpoint / name for name in names]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{self.checkpoint} has no {file.name}.", "Use a model that `mvar train` made.")
        return fingerprint(files)

    def spec(
        self,
        chosen: ChosenConditions,
        num: int,
        settings: SamplingConfig,
        seed: int,
        output: SampleOutput,
        save_tokens: bool,
        stages: bool,
    ) -> dict[str, Any]:
        """Fields of a `SampleSpec`."""
        config = self.config
        return {
            "model": config.name,
            "weights": self.fingerprint(),
            "classes": chosen.labels,
            "num": num,
            "settings": {**settings.model_dump(), "seed": seed},
            "output": output.format,
            "save_tokens": save_tokens,
            "stages": stages,
            "image_shape": config.image_shape,
            "scales": config.pyramid.num_scales,
            "tokens": config.pyramid.num_tokens,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.machine.attention,
            "version": __version__,
            "names": chosen.names,
            "vectors": chosen.vectors,
        }

    def dry_run(
        self, steps: tuple[str, ...], total: int, settings: SamplingConfig, batch_size: int | None, **facts: Any
    ) -> DryRun:
        """What would be done, with its cost."""
        cost = cost_of(self.config, self.machine, batch_size=min(batch_size or 1, total), guided=settings.guided)
        configuration = self.config.model_dump(mode="json", exclude_none=True)
        return DryRun(configuration=configuration, steps=steps, cost=cost, facts={"images": total, **facts})


def check_early(world: World, output: SampleOutput, overwrite: bool) -> None:
    """Refuse an output that exists before anything slow; an unfinished one is looked at when more is known."""
    world.run_on_rank_zero(lambda: None if output.shards.is_dir() else output.require_free(overwrite))


def write_samples(
    world: World,
    shards: SampleShards,
    generate: Generate,
    overwrite: bool,
    model: LazyModel,
    batch_size: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Generate the shards that are missing and assemble the output; returns the fields of a `SampleResult`.

    Raises:
        Interrupted: By Ctrl-C or SIGTERM; every shard that was finished is kept.
    """
    spec, device = shards.spec, model.device
    missing = len(world.run_on_rank_zero(lambda: shards.check(overwrite))) < len(spec.shards)
    if missing:
        model.load()
    resumed, speed, began = spec.total, None, time.monotonic()
    values = {"total": spec.total, "settings": spec.settings, "device": str(device), "processes": world.world_size}
    try:
        if missing:
            resumed = _generate_missing(world, shards, generate, progress)
            seconds = time.monotonic() - began
            speed = (spec.total - resumed) / seconds if resumed < spec.total else None
        if world.is_rank_zero:
            shards.assemble(overwrite, stage(progress, "assembling"))
    except KeyboardInterrupt:
        kept = shards.samples_in(shards.present())
        log.info("%d of %d images are kept.", kept, spec.total)
        raise Interrupted(
            {**values, "images": kept, "seconds": time.monotonic() - began, "interrupted": True}
        ) from None
    finally:
        if world.world_size == 1:
            shards.leave()  # of several processes one may be about to finish a shard
        shards.release()
    return {
        **values,
        "images": spec.total,
        "resumed": resumed,
        "seconds": time.monotonic() - began,
        "images_per_second": speed,
        "peak_memory_bytes": peak_memory_bytes(device),
        "outputs": tuple(shards.outputs()),
        "batch_size": min(batch_size or IMAGES_AT_ONCE, spec.total),
    }


def _generate_missing(world: World, shards: SampleShards, generate: Generate, progress: Progress | None) -> int:
    """Generate this process's share of the missing shards; returns how many samples there were already."""
    done = world.run_on_rank_zero(shards.begin)
    if not shards.begun:
        raise DataError(
            f"Process {world.rank} does not see {shards.directory}, which rank 0 has made.",
            "Choose an --out on a file system that all machines share.",
        )
    own = world.share([shard for shard in shards.pieces if shard not in done])
    tracker = ShardProgress(shards, done, own, stage(progress, "sampling"))
    if done:
        log.info("Resuming: %d of %d images exist already.", tracker.resumed, shards.spec.total)
    generate_shards(shards, own, generate, tracker, WriterPool(processes=world.world_size))
    if world.is_rank_zero:
        tracker.wait_for_others()
    return tracker.resumed
