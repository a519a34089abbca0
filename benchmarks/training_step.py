"""A training step of d16's width on this machine: how near it is to the speed of its products, and at what memory.

python benchmarks/training_step.py writes benchmarks/results/training_step.json. Width 1024, 16 heads, 4 layers, the
256 px pyramid, windows of 7 at the last two scales, batch 4; forward, backward, clipping and AdamW, in float32 and
under bfloat16 autocast, as the engine does it. Styles of the step, all on the same blocks and the same tokens:

- joint: one packed pass over all scales, attention per scale.
- published: scales 1 to 8 in one pass under a packed dense mask, scale 9 and scale 10 in passes of their own; one
  backward pass over the sum.
- joint, image by image and published, pass by pass: the same with a backward pass after each part, which holds less.

The roofline is three times the forward pass's operations over the rate of plain matrix products, measured between the
steps. Peak memory is what torch's allocator hands out beyond weights and optimizer state. Exits with 1 where a promise
is not kept.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

import mvar_core as mvar
from mvar_core.allocator import keeping_all_freed_memory
from mvar_core.analysis.measure import allocation_peak
from mvar_core.config import Machine, RunConfig
from mvar_core.config.presets import load_config
from mvar_core.kernels import attend
from mvar_core.kernels.backend import visibility_mask
from mvar_core.models.blocks import MAX_LOG_HEAD_SCALE, AttentionContext, ScaleAttention
from mvar_core.models.linear import row_stable_linear
from mvar_core.models.steps import normalise_heads
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import generator
from mvar_core.workflows.bench_row import TrainingStep

BATCH = 4
ROUNDS = 1 if machine.SMOKE else 3
MODEL = ("digits", []) if machine.SMOKE else ("mvar-d16-256", ["transformer.depth=4"])
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMISED_ROOFLINE, PROMISED_ATTENTION = 0.65, 3.0


class PackedAttention(ScaleAttention):
    """Several scales under one dense mask, as published; one scale alone as everywhere."""

    def forward(self, x_BLC: Tensor, context: AttentionContext) -> Tensor:
        if len(context.scales) == 1:
            return super().forward(x_BLC, context)
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        qkv = row_stable_linear(x_BLC, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)
        scale_H = self.log_head_scale.float().clamp(max=MAX_LOG_HEAD_SCALE).exp()
        q, k = normalise_heads(q, scale_H), normalise_heads(k, None)
        mask = packed_mask([context.patterns[scale] for scale in context.scales])
        output = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=self.softmax_scale
        )
        return self.projection(output.transpose(1, 2).flatten(2))


def packed_mask(patterns: list[Any]) -> Tensor:
    """Who sees whom among several scales that do not see each other."""
    return torch.block_diag(*(visibility_mask(pattern, CPU) for pattern in patterns)).bool()


class Workbench(TrainingStep):
    """A step, and the styles in which it can be computed."""

    def __init__(self, dtype: torch.dtype):
        config: RunConfig = load_config(MODEL[0], [*MODEL[1], f"train.batch_size={BATCH}"])
        torch.manual_seed(0)
        super().__init__(config, Transformer(config.model).train(), dtype)
        self.pyramid = config.pyramid

    @property
    def operations(self) -> float:
        """Of one step: three times the forward pass, two per multiply-accumulate."""
        scales = range(self.pyramid.num_scales)
        return 6.0 * BATCH * sum(sum(self.transformer.macs(scale).values()) for scale in scales)

    def _pass(self, scales: range) -> Tensor:
        """Share of the loss of some scales."""
        with torch.no_grad():
            inputs_BLZ = self.quantizer.teacher_forcing_inputs(self.tokens_BL)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.transformer(self.conditions, inputs_BLZ, scales=scales, generator=generator("step", 0))
            span = slice(self.pyramid.spans[scales.start].start, self.pyramid.spans[scales.stop - 1].stop)
            wanted = self.tokens_BL[:, span].flatten()
            return F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum") / self.tokens_BL.numel()

    def joint(self, rows: int) -> None:
        """All scales in one packed pass, of so many images at a time."""
        self._attention(ScaleAttention)
        self.rows = rows
        self()

    def published(self, apart: bool) -> None:
        """The last two scales in passes of their own; a backward pass after each (apart), or one for all."""
        self._attention(PackedAttention)
        self.optimizer.zero_grad(set_to_none=True)
        last = self.pyramid.num_scales
        passes = (range(last - 2), range(last - 2, last - 1), range(last - 1, last))
        if apart:
            for scales in passes:
                self._pass(scales).backward()
        else:
            torch.stack([self._pass(scales) for scales in passes]).sum().backward()
        self.update()

    def _attention(self, kind: type[ScaleAttention]) -> None:
        for block in self.transformer.blocks:
            block.attention.__class__ = kind

    def styles(self) -> dict[str, Callable[[], None]]:
        return {
            "joint": lambda: self.joint(BATCH),
            "published": lambda: self.published(apart=False),
            "joint, image by image": lambda: self.joint(1),
            "published, pass by pass": lambda: self.published(apart=True),
        }


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of the plain product that a step consists of: all tokens through the MLP's first layer."""
    x, weight = torch.randn(680 * BATCH, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
    F.linear(x, weight)
    return 2 * x.shape[0] * weight.numel() / statistics.median(timed(lambda: F.linear(x, weight)) for _ in range(5))


def step_rows(dtype: torch.dtype) -> dict[str, Any]:
    bench = Workbench(dtype)
    styles = bench.styles()
    seconds: dict[str, list[float]] = {name: [] for name in styles}
    rates = []
    timed_styles = [name for name in styles if dtype == torch.bfloat16 or " by " not in name]
    for round_ in range(1 + ROUNDS):
        for name in timed_styles:
            elapsed = timed(styles[name])
            if round_:  # the first warms up, and makes the optimizer's state
                seconds[name].append(elapsed)
                rates.append(matmul_rate(dtype))
    rate = statistics.median(rates)
    rows = {}
    for name, run in styles.items():
        bench.optimizer.zero_grad(set_to_none=True)
        with allocation_peak() as peak:
            run()
        rows[name] = {"peak_bytes": peak.peak_bytes}
        if seconds[name]:
            median = statistics.median(seconds[name])
            rows[name] |= {
                "seconds": round(median, 3),
                "tokens_per_second": round(BATCH * bench.pyramid.num_tokens / median),
                "roofline": round(bench.operations / rate / median, 3),
            }
    return {"matmul_gflops": round(rate / 1e9, 1), "step_gflop": round(bench.operations / 1e9, 1), "styles": rows}


def attention_rows(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of one layer's attention, forward and backward: per scale, and under one packed dense mask."""
    config = load_config("mvar-d16-256")
    mask = packed_mask(list(config.patterns))

    def leaves(tokens: int) -> list[Tensor]:
        return [torch.randn(BATCH, tokens, 16, 64).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]

    scales = [(pattern, leaves(pattern.queries)) for pattern in config.patterns]
    packed = leaves(config.pyramid.num_tokens)

    def run(output: Tensor, inputs: list[Tensor]) -> None:
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    def per_scale() -> None:
        for pattern, inputs in scales:
            run(attend(*inputs, pattern, scale=1.0), inputs)

    def dense() -> None:
        run(F.scaled_dot_product_attention(*packed, attn_mask=mask, scale=1.0), packed)

    per_scale(), dense()
    times = [(timed(per_scale), timed(dense)) for _ in range(7)]
    one, other = (statistics.median(column) for column in zip(*times, strict=True))
    return {"per_scale_ms": round(1e3 * one, 1), "packed_ms": round(1e3 * other, 1), "ratio": round(other / one, 2)}


def gpu() -> Any:
    """A step of VAR and of MVAR on a GPU in bfloat16, at growing batches: `mvar bench --what train`."""
    if not torch.cuda.is_available():
        return "not run"
    machine_ = Machine(device="cuda", dtype="bfloat16")
    return mvar.bench("mvar-d16-256", what="train", batch_size=(16, 64, 256, 1024), machine=machine_).rows


def main() -> None:
    with keeping_all_freed_memory():
        steps = {name: step_rows(dtype) for name, dtype in DTYPES.items()}
        attention = {name: attention_rows(dtype) for name, dtype in DTYPES.items()}
    checks = {}
    for name, rows in steps.items():
        styles = rows["styles"]
        checks |= {
            f"{name}: joint reaches {PROMISED_ROOFLINE:.0%} of the roofline": styles["joint"]["roofline"]
            >= PROMISED_ROOFLINE,
            f"{name}: attention per scale is {PROMISED_ATTENTION:g} times as fast as one packed dense mask": attention[
                name
            ]["ratio"]
            >= PROMISED_ATTENTION,
            f"{name}: joint holds no more than published": styles["joint"]["peak_bytes"]
            <= styles["published"]["peak_bytes"],
            f"{name}: joint, image by image, holds no more than published, pass by pass": styles[
                "joint, image by image"
            ]["peak_bytes"]
            <= styles["published, pass by pass"]["peak_bytes"],
        }
    model = "MVAR, width 1024, 16 heads, 4 layers, 256 px, batch 4"
    machine.save(
        "training_step",
        {"model": model, "steps": steps, "attention": attention, "promises": checks, "gpu": gpu()},
    )
    sys.exit(machine.exit_code(checks.values()))


if __name__ == "__main__":
    machine.parse_no_options(__doc__)
    main()
