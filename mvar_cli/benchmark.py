"""One measurement of `mvar bench`, in a process of its own, so that its peak memory is its own.

`python -m mvar_cli.benchmark` reads a request as JSON from stdin and ends with one line of JSON on stdout: the row, or
the error. `measure_alone` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mvar_core.config import RunConfig, SamplingConfig
from mvar_core.errors import MvarError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mvar_core.models.blocks import KeyValueCache
    from mvar_core.models.transformer import Transformer
    from mvar_core.models.vqvae import VQVAE
    from mvar_core.training.measured_step import TrainingStep

KILLED = "the process was ended by the system, which is what happens when memory is short"


class Request(BaseModel):
    """What to measure.

    Attributes:
        what: "sample" or "train", or "sample-memory" or "train-memory".
        config: The model, and how it is trained.
        checkpoint: Its directory; without it, random weights.
        published_style: Sample as the published code does.
        batch_size: Images together.
        repeats: Measured repetitions.
        device: As on the command line, and the next ones too.
        dtype: See above.
        attention: See above.
        cfg: Guidance; None for the model's.
        top_k: See `cfg`.
        top_p: See `cfg`.
        seed: Of everything drawn.
        breakdown: Also measure the seconds of each stage, in a run of its own.
    """

    what: str
    config: RunConfig
    checkpoint: Path | None = None
    published_style: bool = False
    batch_size: int = 1
    repeats: int = 3
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    cfg: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    breakdown: bool = True

    def conditions(self, transformer: Transformer) -> torch.Tensor:
        """Conditions of the batch: all classes in turn, or so many different vectors."""
        return transformer.conditioner.examples(self.batch_size)

    @property
    def settings(self) -> SamplingConfig:
        """Sampling settings: the model's, with the given ones laid over them."""
        given = {"cfg": self.cfg, "top_k": self.top_k, "top_p": self.top_p}
        changes = {name: value for name, value in given.items() if value is not None}
        return self.config.sampling.model_copy(update=changes)


def measure_alone(request: Request) -> dict[str, Any]:
    """A request's row, measured in a fresh process.

    A row that cannot be had because there is too little memory has a `reason` and no figures.

    Raises:
        MvarError: The process found something that the user can mend, or failed.
    """
    process = subprocess.run(
        [sys.executable, "-m", "mvar_cli.benchmark"], input=request.model_dump_json(), capture_output=True, text=True
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode in (-9, 137):
        return {"reason": KILLED}
    if process.returncode or not lines:
        last = [line for line in process.stderr.strip().splitlines() if line] or ["no message"]
        raise MvarError(f"A measurement ended with exit code {process.returncode}: {last[-1]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise MvarError(answer["error"])
    return answer


def main() -> None:
    """Measure what stdin asks for and print the row."""
    from mvar_core.allocator import keep_freed_memory

    keep_freed_memory()  # as where `mvar` starts
    request = Request.model_validate_json(sys.stdin.read())
    try:
        row = MEASUREMENTS[request.what](request)
    except MvarError as error:
        row = {"error": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        row = {"reason": "out of memory: " + " ".join(str(error).split())[:200]}
    print(json.dumps(row))


def measure_sampling(request: Request) -> dict[str, Any]:
    """Seconds, memory and stages of sampling one batch, class labels in and bytes of images out."""
    import torch

    from mvar_core.analysis.measure import StageClock
    from mvar_core.runtime import resolve_device, resolve_dtype

    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    begin = _Beginning(device)
    if request.published_style:
        transformer, vqvae = _transformer(request, device, torch.float32), _tokenizer(request, device, torch.float32)
        vqvae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        sample = _published_style(request, transformer, vqvae, device, dtype)
    else:
        transformer, vqvae = _transformer(request, device, dtype), _tokenizer(request, device, dtype)
        sample = _sampling(request, transformer, vqvae)
    # A GPU warms up on the very shapes that it will be measured on; a CPU on one image, which takes a part of the time.
    warm = request.batch_size if device.type == "cuda" else 1
    with _cache_bytes(transformer) as cached:
        row = begin.row(request, lambda: sample(request.batch_size), warmup=lambda: sample(warm))
    row["kv_cache_bytes"] = cached["peak"]
    if request.breakdown:
        clock = StageClock(device)
        _watch_sampling(clock, transformer, vqvae)
        row["stages"] = clock.run(lambda: sample(request.batch_size))
    return row


def _sampling(request: Request, transformer: Transformer, vqvae: VQVAE) -> Callable[[int], object]:
    """Sampling as `mvar sample` does it, of so many images in one batch."""
    from mvar_core.pipeline import Pipeline

    pipeline = Pipeline(request.config, vqvae, transformer, attention=request.attention)
    settings = request.settings
    conditions = request.conditions(transformer)

    def sample(count: int) -> object:
        return pipeline.sample(
            conditions=conditions[:count],
            cfg=settings.cfg,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=request.seed,
            batch_size=request.batch_size,
        )

    return sample


def measure_training(request: Request) -> dict[str, Any]:
    """Seconds, memory and stages of a training step of all scales: inputs, forward, backward, clipping, AdamW."""
    from mvar_core.analysis.measure import StageClock
    from mvar_core.runtime import resolve_device

    device = resolve_device(request.device)
    begin = _Beginning(device)
    step = _training_step(request, device)
    row = begin.row(request, step)
    row["tokens_per_second"] = row["images_per_second"] * request.config.pyramid.num_tokens
    row["kv_cache_bytes"] = 0
    if request.breakdown:
        clock = StageClock(device)
        for name in ("forward", "backward", "update"):
            clock.watch(step, name, name)
        row["stages"] = clock.run(step)
    return row


def measure_memory(request: Request) -> dict[str, Any]:
    """What torch's allocator gives out at most, weights included, beside what `mvar plan` predicts."""
    import torch

    from mvar_core.analysis.cost import plan
    from mvar_core.analysis.measure import allocation_peak
    from mvar_core.runtime import resolve_device, resolve_dtype

    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    config, settings = request.config, request.settings
    work: Callable[[], object]
    if request.what == "train-memory":
        step = _training_step(request, device)
        held: list[nn.Module] = [step.transformer]

        def work() -> None:
            step()
            step()  # the optimizer's moments are there from the first step on
    else:
        transformer, vqvae = _transformer(request, device, dtype), _tokenizer(request, device, dtype)
        held = [transformer, vqvae]
        sample = _sampling(request, transformer, vqvae)
        sample(1)

        def work() -> None:
            sample(request.batch_size)

    weights = sum(p.numel() * p.element_size() for module in held for p in module.parameters())
    with allocation_peak(device) as live:
        work()
    predicted = plan(
        config.model_copy(update={"sampling": settings}),
        batch_size=request.batch_size,
        dtype_bytes=torch.empty(0, dtype=dtype).element_size(),
        guided=settings.guided,
        device=device.type,
        train=config.train.model_copy(update={"batch_size": request.batch_size}),
    )
    prediction = predicted.train_peak_bytes if request.what == "train-memory" else predicted.sample_peak_bytes
    assert prediction is not None
    return {
        "batch_size": request.batch_size,
        "dtype": str(dtype).removeprefix("torch."),
        "measured_bytes": weights + live.peak_bytes,
        "predicted_bytes": prediction,
        "weight_bytes": weights,
        "ratio": prediction / (weights + live.peak_bytes),
        "ratio_beside_weights": (prediction - weights) / live.peak_bytes,
    }


def _training_step(request: Request, device: torch.device) -> TrainingStep:
    import torch

    from mvar_core.runtime import resolve_dtype
    from mvar_core.training.measured_step import TrainingStep

    train = request.config.train.model_copy(update={"batch_size": request.batch_size})
    return TrainingStep(
        request.config.model_copy(update={"train": train}),
        _transformer(request, device, torch.float32).requires_grad_(True).train(),
        device,
        resolve_dtype(request.dtype, device),
        attention=request.attention,
        seed=request.seed,
    )


class _Beginning:
    """The process before anything is built."""

    def __init__(self, device: torch.device):
        from mvar_core.runtime import peak_memory_bytes

        self.device = device
        self.bytes = peak_memory_bytes(device)

    def row(
        self, request: Request, run: Callable[[], object], *, warmup: Callable[[], object] | None = None
    ) -> dict[str, Any]:
        """Time `run` and take the process's peak."""
        import torch

        from mvar_core.analysis.measure import median_seconds
        from mvar_core.runtime import peak_memory_bytes, resolve_dtype

        seconds, runs = median_seconds(run, self.device, repeats=request.repeats, warmup=warmup)
        gpu = self.device.type == "cuda"
        return {
            "batch_size": request.batch_size,
            "seconds": seconds,
            "runs": runs,
            "images_per_second": request.batch_size / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "memory_is": "allocated on the GPU" if gpu else "resident in the process, Python and torch included",
            "process_bytes": 0 if gpu else self.bytes,
            "device": torch.cuda.get_device_name(self.device) if gpu else str(self.device),
            "dtype": str(resolve_dtype(request.dtype, self.device)).removeprefix("torch."),
        }


def _transformer(request: Request, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The transformer, of random weights or from its file."""
    from mvar_core.analysis.random_models import random_transformer
    from mvar_core.models.directory import load_transformer

    if request.checkpoint is None:
        return random_transformer(request.config, device, dtype, request.seed)
    return load_transformer(request.checkpoint, request.config, device, dtype)


def _tokenizer(request: Request, device: torch.device, dtype: torch.dtype) -> VQVAE:
    """The tokenizer, of random weights or from its file."""
    from mvar_core.analysis.random_models import random_tokenizer
    from mvar_core.models.directory import load_tokenizer

    if request.checkpoint is None:
        return random_tokenizer(request.config, device, dtype, request.seed, encoder=False)
    return load_tokenizer(request.checkpoint, request.config, device, dtype, encoder=False)


def _published_style(
    request: Request, transformer: Transformer, vqvae: VQVAE, device: torch.device, dtype: torch.dtype
) -> Callable[[int], object]:
    """Sampling as the published code does it; its attention is SDPA."""
    from mvar_core.runtime import generator
    from mvar_core.sampling.published_style import sample_published_style

    random = generator("bench", request.seed, device=device)
    conditions = request.conditions(transformer)

    def sample(count: int) -> object:
        images = sample_published_style(transformer, vqvae, conditions[:count], request.settings, random, dtype=dtype)
        return images.cpu()

    return sample


def _watch_sampling(clock: Any, transformer: Transformer, vqvae: VQVAE) -> None:
    """Tell the clock which call belongs to which stage."""
    clock.watch(transformer, "condition", "conditioning")
    clock.watch(transformer, "hidden_states", lambda scales, *_, **__: f"transformer, scale {scales.start + 1}")
    clock.watch(transformer, "head_logits", "head", then="drawing")
    for method in ("embed", "increment", "scale_input", "empty_features"):
        clock.watch(vqvae.quantizer, method, "quantizer", then="other")
    clock.watch(vqvae, "decode_features", "decoder")


@contextmanager
def _cache_bytes(transformer: Transformer) -> Iterator[dict[str, int]]:
    """The most bytes that a cache of keys and values holds, seen at the end of every scale."""
    peak = {"peak": 0}
    original = transformer.drop_unseen

    def watched(cache: KeyValueCache, scale: int) -> None:
        peak["peak"] = max(peak["peak"], cache.num_bytes)
        original(cache, scale)

    transformer.drop_unseen = watched  # type: ignore[method-assign]
    try:
        yield peak
    finally:
        del transformer.drop_unseen


MEASUREMENTS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "sample": measure_sampling,
    "train": measure_training,
    "sample-memory": measure_memory,
    "train-memory": measure_memory,
}

if __name__ == "__main__":
    main()
