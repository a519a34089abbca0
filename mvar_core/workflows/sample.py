"""Images of classes, words or vectors, written to files."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import ConfigDict, PositiveInt, with_config
from typing_extensions import TypedDict, Unpack

from mvar_core import __version__
from mvar_core.analysis.cost import cost_of
from mvar_core.config import Machine, ModelConfig, SamplingConfig
from mvar_core.distributed import World, available_cores, connect, sigterm_as_interrupt
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.io.files import fingerprint
from mvar_core.kernels import check_backend
from mvar_core.models import directory, official
from mvar_core.models.micro_batches import IMAGES_AT_ONCE
from mvar_core.pipeline import Pipeline
from mvar_core.progress import Progress, stage
from mvar_core.results import DryRun, Result
from mvar_core.runtime import peak_memory_bytes, resolve_device, resolve_dtype
from mvar_core.sampling.conditions import choose_conditions
from mvar_core.sampling.images import Samples
from mvar_core.sampling.sampler import resolve_settings
from mvar_core.sampling.shards import Generate, SampleOutput, SampleShards, SampleSpec

LARGEST_POOL = 4
"""Most threads that write images."""

log = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class SampleResult(Result):
    """What `sample_to` leaves behind.

    Of the `total` images asked for, `images` are in the output (or kept, where the run was `interrupted`: the same call
    resumes it), and earlier runs had made `resumed`. `outputs` are all files, in order. Speed and `seconds` are of this
    call, without loading the model. `settings` are resolved, with the seed. `classes` are name and index; of a text or
    vector that is no class, the index is None.
    """

    out: Path = Path()
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
    classes: tuple[Mapping[str, Any], ...] = ()
    interrupted: bool = False


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True))
class SampleOptions(TypedDict, total=False):
    """What `sample_to` and `edit` both accept, as `sample_to` explains it."""

    seed: int
    batch_size: PositiveInt | None
    format: str | None
    save_tokens: bool
    stages: bool
    tokenizer: str | Path | None
    overwrite: bool
    dry_run: bool
    machine: Machine
    progress: Progress | None


def sample_to(
    out: str | Path,
    *,
    checkpoint: str | Path,
    classes: Sequence[str | int] | str = (),
    words: Sequence[str] = (),
    vectors: str | Path | None = None,
    num: PositiveInt = 1,
    settings: SamplingConfig | None = None,
    **options: Unpack[SampleOptions],
) -> SampleResult:
    """Write images of classes to `out`; of texts or vectors, where the model is conditioned on them.

    An image depends on the seed, its number, its class, text or vector, the settings and the weights alone: not on the
    batch size, the number of processes, or what was resumed. The same call again resumes an interrupted run, and
    changes nothing where the output is finished. Under torchrun the processes share the work.

        mvar.sample_to("out", checkpoint="runs/mvar", classes="all", num=8, settings=mvar.SamplingConfig(cfg=1.5))

    Args:
        out: A directory for png, a file for npz and grid.
        checkpoint: A model directory, a run, or a published .pth file.
        classes: Names, "#N" for class N, comma lists of them, or "all"; a number that is no text is a position.
        words: Texts, for a model that is conditioned on words.
        vectors: A file of vectors, for a model that is conditioned on vectors.
        num: Images per class, text or vector.
        settings: Guidance and filters; fields that are not set are as the model recommends.
        **options:
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
    if not classes and not words and vectors is None:
        raise ConfigError("Nothing was chosen to generate.", "Use --class, --words or --vectors.")

    def plan(job: SampleJob) -> Plan:
        chosen = choose_conditions(job.config, classes, words, vectors)
        resolved = resolve_settings(job.config, settings)
        spec = SampleSpec(**vars(chosen), **job.facts(resolved))

        def generate(indices: Sequence[int], report: Callable[[int, int], None]) -> Iterable[Samples]:
            options = {**spec.conditions(indices), **job.options(resolved)}
            return job.pipeline.stream(indices=indices, progress=report, **options)

        step = f"generate {spec.total} images: {num} of each of {len(chosen.classes)} conditions"
        return Plan(spec, generate, resolved, (step,), {"classes": chosen.described()})

    return SampleResult(**SampleJob(Path(out), checkpoint, num, **options).run(plan))


class Plan(NamedTuple):
    """What a job makes: its specification, how samples are generated, resolved settings, and the steps of a dry run."""

    spec: SampleSpec
    generate: Generate
    settings: SamplingConfig
    steps: tuple[str, ...]
    facts: Mapping[str, Any] = MappingProxyType({})


@dataclass
class SampleJob:
    """What `sample_to` and `edit` have in common: their arguments, a model that is loaded late, shards, an output."""

    out: Path
    checkpoint: str | Path
    num: int
    seed: int = 0
    batch_size: int | None = None
    format: str | None = None
    save_tokens: bool = False
    stages: bool = False
    tokenizer: str | Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    machine: Machine = Machine()
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.output = SampleOutput.of(self.out, self.format, self.save_tokens)

    def run(self, plan: Callable[[SampleJob], Plan]) -> dict[str, Any]:
        """Do what `plan` returns for this job; returns the fields of a `SampleResult`."""
        values: dict[str, Any] = {}
        try:
            with connect(self.machine.device) as world, sigterm_as_interrupt():
                output = self.output
                if not output.shards.is_dir() and output.mark() is None:  # before anything slow
                    world.run_on_rank_zero(lambda: output.require_free(self.overwrite))
                self.machine = self.machine.model_copy(update={"device": world.device(self.machine.device)})
                self.device = resolve_device(self.machine.device)
                self.dtype = resolve_dtype(self.machine.dtype, self.device)
                self.machine.memory_bytes  # noqa: B018  (refuses what is no amount of memory)
                check_backend(self.machine.attention, self.config.patterns, self.device, self.dtype)
                planned = plan(self)
                if self.dry_run:
                    return {"dry_run": self._dry_run(planned)}
                self._write(world, planned, values)
        except KeyboardInterrupt:  # out here: the other processes must not be waited for
            if not values:
                raise
            values["interrupted"] = True
        return values

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model, loaded on first use."""
        return Pipeline.from_pretrained(self.checkpoint, tokenizer=self.tokenizer, machine=self.machine)

    @cached_property
    def config(self) -> ModelConfig:
        """The model's configuration, without its weights where it has a file of its own."""
        path = Path(self.checkpoint)
        alone = path.is_file() or self.tokenizer is not None  # a tokenizer that does not belong there is refused
        return self.pipeline.config if alone else directory.read_model_config(path)

    def options(self, settings: SamplingConfig) -> dict[str, Any]:
        """Arguments of `Pipeline.stream`."""
        return {"settings": settings, "seed": self.seed, "batch_size": self.batch_size, "stages": self.stages}

    def facts(self, settings: SamplingConfig) -> dict[str, Any]:
        """Fields of a `SampleSpec` that model, machine and arguments decide."""
        path, config = Path(self.checkpoint), self.config
        if path.is_file():
            files = [path, Path(self.tokenizer) if self.tokenizer else official.tokenizer_next_to(path)]
        else:
            names = (directory.CONFIG_FILE, directory.TRANSFORMER_FILE, directory.TOKENIZER_FILE)
            files = [path / name for name in names]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{path} has no {file.name}.", "Use a model that `mvar train` made.")
        return {
            "model": config.name,
            "weights": fingerprint(files),
            "num": self.num,
            "settings": {**settings.model_dump(), "seed": self.seed},
            "output": self.output.format,
            "save_tokens": self.save_tokens,
            "stages": self.stages,
            "image_shape": config.image_shape,
            "scales": config.pyramid.num_scales,
            "tokens": config.pyramid.num_tokens,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.machine.attention,
            "version": __version__,
        }

    def _dry_run(self, plan: Plan) -> DryRun:
        total, guided = plan.spec.total, plan.settings.guided
        return DryRun(
            configuration=self.config.model_dump(mode="json", exclude_none=True),
            steps=(*plan.steps, f"write {self.output.target}"),
            cost=cost_of(self.config, self.machine, batch_size=min(self.batch_size or 1, total), guided=guided),
            facts={"images": total, **plan.facts},
        )

    def _write(self, world: World, plan: Plan, values: dict[str, Any]) -> None:
        """Generate the shards that are missing and assemble the output; fills the fields of a `SampleResult` in."""
        spec, shards = plan.spec, SampleShards(self.output, plan.spec, self.overwrite)
        total = spec.total
        finished = not self.overwrite and world.run_on_rank_zero(shards.is_finished)
        missing = not finished and len(world.run_on_rank_zero(shards.check)) < len(spec.shards)
        if missing:
            self.pipeline  # noqa: B018  (loaded before the clock starts, and before the directory is locked)
        began = time.monotonic()
        known = {"out": self.output.target, "total": total, "settings": spec.settings, "device": str(self.device)}
        known["classes"] = plan.facts["classes"]
        values.update(known, processes=world.world_size)
        resumed, speed = total, None
        try:
            if finished:
                log.info("%s is finished: nothing is left to do.", self.output.target)
            else:
                done = world.run_on_rank_zero(shards.begin)
                if not shards.begun:
                    raise DataError(
                        f"Process {world.rank} does not see {shards.directory}, which rank 0 has made.",
                        "Choose an --out on a file system that all machines share.",
                    )
                resumed = shards.samples_in(done)
                if resumed > 0:
                    log.info("Resuming: %d of %d images exist already.", resumed, total)
                if resumed < total:
                    own = world.share([shard for shard in shards.pieces if shard not in done])
                    shards.make(
                        own, done, plan.generate, stage(self.progress, "sampling"), wait=world.is_rank_zero,
                        threads=max(1, min(LARGEST_POOL, available_cores() // (2 * world.world_size))),
                    )  # fmt: skip
                    speed = (total - resumed) / (time.monotonic() - began)
                if world.is_rank_zero:
                    shards.assemble(stage(self.progress, "assembling"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = shards.samples_in(shards.present())
            raise DataError(f"The disk of {shards.directory} is full; {kept} of {total} images are kept.",
                            "Free some space, then run the same command again to resume.") from None  # fmt: skip
        except KeyboardInterrupt:
            values.update(images=shards.samples_in(shards.present()), seconds=time.monotonic() - began)
            log.info("%d of %d images are kept.", values["images"], total)
            raise
        finally:
            if world.world_size == 1:
                shards.leave()  # of several processes one may be about to finish a shard
            shards.release()
        values.update(
            images=total,
            resumed=resumed,
            seconds=time.monotonic() - began,
            images_per_second=speed,
            peak_memory_bytes=peak_memory_bytes(self.device),
            outputs=tuple(shards.outputs()),
            batch_size=min(self.batch_size or IMAGES_AT_ONCE, total),
        )
