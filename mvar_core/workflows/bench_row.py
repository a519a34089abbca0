"""One row of `mvar.bench`, measured in a process of its own, so that its peak memory is its own.

`python -m mvar_core.workflows.bench_row` reads a request as JSON from stdin and ends with one line of JSON on stdout:
the row, or the error. `measure_alone` starts it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from mvar_core.allocator import keep_freed_memory
from mvar_core.analysis.cost import weight_bytes
from mvar_core.analysis.measure import StageClock, allocation_peak, seconds_of
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config import Machine, RunConfig
from mvar_core.errors import MvarError
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.directory import load_tokenizer, load_transformer
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pipeline import Pipeline
from mvar_core.runtime import generator, peak_memory_bytes, resolve_device, resolve_dtype
from mvar_core.sampling.published_style import sample_published_style
from mvar_core.training.optim import build_optimizer
from mvar_core.training.transformer import build_curriculum

KILLED = "the process was ended by the system, which is what happens when memory is short"


class Request(BaseModel):
    """What to measure, `what` being a key of `MEASUREMENTS`.

    Without a `checkpoint`, a model directory, weights are random. With `breakdown` the seconds of each stage are
    measured too, in a run of their own.
    """

    what: str
    config: RunConfig
    checkpoint: Path | None = None
    published_style: bool = False
    batch_size: int = 1
    repeats: int = 3
    machine: Machine = Machine()
    seed: int = 0
    breakdown: bool = True

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return resolve_device(self.machine.device)

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in."""
        return resolve_dtype(self.machine.dtype, self.device)

    def transformer(self, dtype: torch.dtype) -> Transformer:
        """The transformer, of random weights or from its file."""
        if self.checkpoint is None:
            return random_transformer(self.config, self.device, dtype, self.seed)
        return load_transformer(self.checkpoint, self.config, self.device, dtype, verify=self.machine.verify)

    def sampling(self) -> tuple[Transformer, VQVAE, Callable[[int], object]]:
        """The models, and a function that samples so many images, as `mvar sample` or as the published code does it."""
        dtype = torch.float32 if self.published_style else self.dtype
        config, device, transformer = self.config, self.device, self.transformer(dtype)
        if self.checkpoint is None:
            vqvae = random_tokenizer(config, device, dtype, self.seed, encoder=False)
        else:
            vqvae = load_tokenizer(self.checkpoint, config, device, dtype, encoder=False, verify=self.machine.verify)
        conditions, settings = transformer.conditioner.examples(self.batch_size), config.sampling
        if self.published_style:
            vqvae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            random = generator("bench", self.seed, device=device)

            def sample(count: int) -> object:
                chosen = conditions[:count]
                return sample_published_style(transformer, vqvae, chosen, settings, random, dtype=self.dtype).cpu()

        else:
            pipeline = Pipeline(config, vqvae, transformer, attention=self.machine.attention)

            def sample(count: int) -> object:
                chosen = conditions[:count]
                return pipeline.sample(conditions=chosen, settings=settings, seed=self.seed, batch_size=self.batch_size)

        return transformer, vqvae, sample

    def training_step(self) -> TrainingStep:
        """A step of the batch size."""
        train = self.config.train.model_copy(update={"batch_size": self.batch_size})
        config = self.config.model_copy(update={"train": train})
        transformer = self.transformer(torch.float32).requires_grad_(True).train()
        return TrainingStep(config, transformer, self.dtype, self.machine.attention, self.seed)


class TrainingStep:
    """Callable: one step of all scales on random tokens, as training takes it on one device.

    The transformer is in float32 and training mode; autocast computes in `dtype`, float32 for none.
    """

    def __init__(
        self, config: RunConfig, transformer: Transformer, dtype: torch.dtype, attention: str = "auto", seed: int = 0
    ):
        self.train, self.transformer, device = config.train, transformer, transformer.position_embedding.device
        self.device, self.dtype, self.attention, self.seed = device, dtype, attention, seed
        transformer.recompute_blocks = config.train.activation_checkpointing
        with torch.random.fork_rng(devices=[]):  # its values change neither time nor memory
            quantizer = MultiScaleQuantizer(config.tokenizer, config.pyramid)
        self.quantizer = quantizer.to(device).eval().requires_grad_(False)
        joint = config.train.model_copy(update={"curriculum": "joint"})
        self.curriculum = build_curriculum(joint, config.pyramid, config.patterns)
        self.optimizer = build_optimizer(transformer, config.train.optimizer, transformer.no_decay_names(), device)
        self.rows = config.train.micro_batch or -(-config.train.batch_size // config.train.accumulate)
        shape = (config.train.batch_size, config.pyramid.num_tokens)
        random = generator("training_step", seed)
        self.tokens_BL = torch.randint(config.tokenizer.codebook_size, shape, generator=random).to(device)
        self.conditions = transformer.conditioner.examples(len(self.tokens_BL)).to(device)

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = zip(self.tokens_BL.split(self.rows), self.conditions.split(self.rows), strict=True)
        for tokens_BL, conditions in parts:
            self.backward(self.forward(tokens_BL, conditions) * (len(tokens_BL) / len(self.tokens_BL)))
        self.update()

    def forward(self, tokens_BL: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch."""
        with torch.no_grad():
            inputs_BLZ = self.quantizer.teacher_forcing_inputs(tokens_BL)
        drops = generator("training_step", self.seed, "drops")
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.curriculum.losses(
                self.transformer, conditions, tokens_BL, inputs_BLZ, step=0, attention=self.attention, generator=drops
            )
        return losses.loss

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a micro-batch."""
        loss.backward()

    def update(self) -> None:
        """Clip and change the weights."""
        nn.utils.clip_grad_norm_(self.transformer.parameters(), self.train.optimizer.grad_clip or float("inf"))
        self.optimizer.step()


def measure_alone(request: Request) -> dict[str, Any]:
    """A request's row, measured in a fresh process; with too little memory it has a `reason` and no figures."""
    process = subprocess.run(
        [sys.executable, "-m", "mvar_core.workflows.bench_row"],
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
    )
    if process.returncode in (-9, 137):
        return {"reason": KILLED}
    try:
        answer: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = [line for line in process.stderr.strip().splitlines() if line] or ["no message"]
        raise MvarError(f"A measurement ended with exit code {process.returncode}: {last[-1][:500]}") from None
    if "error" in answer:
        raise MvarError(answer["error"])
    return answer


def main() -> None:
    """Measure what stdin asks for and print the row."""
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
    device, before = request.device, peak_memory_bytes(request.device)
    transformer, vqvae, sample = request.sampling()
    # A GPU warms up on the very shapes that it will be measured on; a CPU on one image, which is faster.
    warm = request.batch_size if device.type == "cuda" else 1
    cached, drop_unseen = [0], transformer.drop_unseen

    def watched(cache: KeyValueCache, scale: int) -> None:  # called at the end of every scale
        cached.append(cache.num_bytes)
        drop_unseen(cache, scale)

    transformer.drop_unseen = watched  # type: ignore[method-assign]
    row = _timed(request, before, lambda: sample(request.batch_size), warmup=lambda: sample(warm))
    del transformer.drop_unseen
    row["kv_cache_bytes"] = max(cached)
    if request.breakdown:
        clock = StageClock(device)
        clock.watch(transformer, "condition", "conditioning")
        clock.watch(transformer, "hidden_states", lambda scales, *_, **__: f"transformer, scale {scales.start + 1}")
        clock.watch(transformer, "head_logits", "head", then="drawing")
        for method in ("embed", "increment", "scale_input", "empty_features"):
            clock.watch(vqvae.quantizer, method, "quantizer", then="other")
        clock.watch(vqvae, "decode_features", "decoder")
        row["stages"] = clock.run(lambda: sample(request.batch_size))
    return row


def measure_training(request: Request) -> dict[str, Any]:
    """Seconds, memory and stages of a training step of all scales: inputs, forward, backward, clipping, AdamW."""
    before = peak_memory_bytes(request.device)
    step = request.training_step()
    row = _timed(request, before, step)
    row["tokens_per_second"] = row["images_per_second"] * request.config.pyramid.num_tokens
    row["kv_cache_bytes"] = 0
    if request.breakdown:
        clock = StageClock(request.device)
        for name in ("forward", "backward", "update"):
            clock.watch(step, name, name)
        row["stages"] = clock.run(step)
    return row


def measure_memory(request: Request) -> dict[str, Any]:
    """The most memory that torch's allocator hands out while a batch is sampled, weights included."""
    transformer, vqvae, sample = request.sampling()
    weights = weight_bytes(transformer, vqvae)
    sample(1)
    with allocation_peak(request.device) as live:
        sample(request.batch_size)
    return {"measured_bytes": weights + live.peak_bytes, "weight_bytes": weights}


def _timed(
    request: Request, process_bytes: int, run: Callable[[], object], warmup: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Time `run` and read the process's peak; `process_bytes` is what it held before anything was built."""
    device, gpu = request.device, request.device.type == "cuda"
    (warmup or run)()
    runs = [seconds_of(run, device) for _ in range(request.repeats)]
    seconds = statistics.median(runs)
    return {
        "batch_size": request.batch_size,
        "seconds": seconds,
        "runs": runs,
        "images_per_second": request.batch_size / seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "memory_is": "allocated on the GPU" if gpu else "resident in the process, Python and torch included",
        "process_bytes": 0 if gpu else process_bytes,
        "device": torch.cuda.get_device_name(device) if gpu else str(device),
        "dtype": str(request.dtype).removeprefix("torch."),
    }


MEASUREMENTS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "sample": measure_sampling,
    "train": measure_training,
    "sample-memory": measure_memory,
}

if __name__ == "__main__":
    main()
