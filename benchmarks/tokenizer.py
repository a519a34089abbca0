"""Five minutes of tokenizer training on two photographs, and the adversarial and perceptual losses at work.

python benchmarks/tokenizer.py [--minutes 5] writes benchmarks/results/tokenizer.json. The perceptual network's weights
are filled in, not the published ones: what is shown is that the loss is computed and minimised, not how images look.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch

from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config
from mvar_core.data.images import ImageRows, open_images
from mvar_core.models.vqvae import VQVAE
from mvar_core.training.metrics import read_metrics
from mvar_core.training.perceptual import PerceptualLoss
from mvar_core.training.tokenizer import measure_tokenizer, train_tokenizer
from mvar_core.workflows.runs import seeded
from mvar_core.workflows.train_tokenizer import ImagesAlone, training_images

PROMISES = {"psnr": ("at least", 24.0), "code_usage": ("at least", 0.60), "seconds": ("at most", 300)}
PRESET, DATA = ("digits", "digits") if machine.SMOKE else ("tokenizer-64", "photographs")
LOG = ["train_tokenizer.log_every=1", "train_tokenizer.batch_size=4"] if machine.SMOKE else []
HALF = torch.float32 if machine.SMOKE else torch.bfloat16
RESERVE = 0.78
"""Of the time, for steps as fast as the trial's; k-means, restarts of codes and the checkpoint need the rest."""


def build(config: RunConfig) -> VQVAE:
    return seeded(lambda: VQVAE(config.tokenizer, config.pyramid), "tokenizer", config.seed)


def seconds_per_step(
    config: RunConfig, dtype: torch.dtype, memory_format: torch.memory_format, steps: int = 1 if machine.SMOKE else 7
) -> float:
    """Median seconds of forward, backward and AdamW."""
    tokenizer = build(config).to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), fused=True)
    images = training_images(open_images(DATA), config).batch(torch.arange(config.train_tokenizer.batch_size).numpy())
    images = images.to(memory_format=memory_format)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = tokenizer(images)
            loss = (output.images_BCHW - images).square().mean() + output.quantizer_loss
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[steps // 2]


def formats(config: RunConfig) -> dict[str, float]:
    return {
        f"{name} {layout}": seconds_per_step(config, dtype, memory_format)
        for name, dtype in (("float32", torch.float32), ("bfloat16", HALF))
        for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last))
    }


class _Some:
    """Some rows of a set of images."""

    def __init__(self, images: Any, rows: Sequence[int]):
        self.images = images
        self.rows = torch.tensor(rows).numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Any, step: int = 0) -> torch.Tensor:
        return self.images.batch(self.rows[rows], step)


def train(config: RunConfig, out: Path, dtype: torch.dtype, **options: Any) -> tuple[VQVAE, dict[str, Any]]:
    tokenizer = build(config)
    start = time.perf_counter()
    images = training_images(open_images(DATA), config)
    images = _Some(images, range(24)) if machine.SMOKE else images
    train_tokenizer(tokenizer, images, config, out, dtype=dtype, **options)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    return tokenizer, {"seconds": time.perf_counter() - start, "lines": lines}


def five_minutes(seconds: float, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """As many steps as fit, measured on held-out crops afterwards."""
    short = f"train_tokenizer.steps={4 if machine.SMOKE else 40}"
    trial = load_config(PRESET, [short, "train_tokenizer.kmeans_batches=1", *LOG])
    _, found = train(trial, folder / "trial", dtype)
    speed = found["lines"][-1]["images_per_second"] / trial.train_tokenizer.batch_size
    steps = 4 if machine.SMOKE else int(RESERVE * seconds * speed)
    config = load_config(PRESET, [f"train_tokenizer.steps={steps}", "train_tokenizer.checkpoint_every=1000000", *LOG])
    tokenizer, found = train(config, folder / "run", dtype)
    result: dict[str, Any] = {
        "seconds": found["seconds"],
        "steps": steps,
        "batch_size": config.train_tokenizer.batch_size,
        "images_per_second": steps * config.train_tokenizer.batch_size / found["seconds"],
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "tokens_per_crop": config.pyramid.num_tokens,
        "training_psnr": found["lines"][-1]["psnr"],
    }
    images = open_images(f"{DATA}:test")
    most = 8 if machine.SMOKE else 2048
    measures = measure_tokenizer(tokenizer, ImagesAlone(ImageRows(images, config.image_shape)), limit=most)
    result.update(
        psnr=measures.psnr,
        code_usage=measures.code_usage,
        usage_per_scale=measures.usage_per_scale,
        perplexity_per_scale=measures.perplexity_per_scale,
        held_out_crops=measures.images,
    )
    for label, name in enumerate(images.class_names):
        rows = ImagesAlone(ImageRows(images, config.image_shape))
        chosen = [index for index, found_label in enumerate(images.labels) if found_label == label]
        result[f"psnr_{name}"] = measure_tokenizer(tokenizer, _Some(rows, chosen), limit=most).psnr
    return result


def filled_perceptual_loss() -> PerceptualLoss:
    """LPIPS with weights that carry a signal through all layers."""
    loss = PerceptualLoss()
    source = torch.Generator().manual_seed(0)
    for parameter in loss.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=source)
        elif parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=source) / len(parameter)
    return loss


def other_losses(folder: Path, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """First and last means of ten steps: both losses with a learning discriminator, and against one that is fixed."""
    start = steps // 3  # by then there is an image to tell from a real one
    common = [
        f"train_tokenizer.steps={steps}",
        "train_tokenizer.batch_size=4",
        "train_tokenizer.kmeans_batches=8",
        *LOG,
    ]
    common += ["train_tokenizer.adversarial.weight=0.5", "train_tokenizer.adversarial.channels=32"]
    common += [f"train_tokenizer.adversarial.start={start}"]
    learning = ["train_tokenizer.perceptual.weight=1", "train_tokenizer.adversarial.optimizer.lr=1e-3"]
    both = load_config(PRESET, [*common, *learning])
    _, found = train(both, folder / "both", dtype, perceptual=filled_perceptual_loss())
    fixed = load_config(PRESET, [*common, "train_tokenizer.adversarial.optimizer.lr=1e-12"])
    _, against = train(fixed, folder / "fixed", dtype)
    names = ("perceptual", "discriminator", "logit_real", "logit_fake", "reconstruction", "adversarial_weight")
    rows = {name: _first_and_last(found["lines"], name) for name in names}
    rows["adversarial_against_a_fixed_discriminator"] = _first_and_last(against["lines"], "adversarial")
    seconds = found["seconds"] + against["seconds"]
    return {"steps": steps, "adversarial_start": start, "seconds": seconds, "first_and_last": rows}


def _first_and_last(lines: list[dict[str, Any]], name: str) -> list[float]:
    present = [line[name] for line in lines if line.get(name) is not None]
    return [present[0], present[-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps-of-other-losses", type=int, default=3 if machine.SMOKE else 90)
    parser.add_argument("--dtype", choices=("fastest", "float32", "bfloat16"), default="fastest")
    parser.add_argument("--part", choices=("all", "run", "losses"), default="all", help="the rest stays as it is")
    arguments = parser.parse_args()
    path = machine.RESULTS / "tokenizer.json"
    keeps = arguments.part != "all" and path.is_file() and not machine.SMOKE
    result: dict[str, Any] = json.loads(path.read_text()) if keeps else {}
    result.pop("machine", None)
    kept = result.get("kept", {})
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part in ("all", "run"):
            speeds = formats(load_config(PRESET))
            layouts = {name: speeds[f"{name} channels last"] for name in ("float32", "bfloat16")}
            name = min(layouts, key=layouts.__getitem__) if arguments.dtype == "fastest" else arguments.dtype
            run = five_minutes(60 * arguments.minutes, HALF if name == "bfloat16" else torch.float32, Path(folder))
            result.update(promises=PROMISES, seconds_per_step=speeds, dtype=name, run=run)
            for key, (side, bound) in PROMISES.items():
                kept[key] = run[key] <= bound if side == "at most" else run[key] >= bound
        if arguments.part in ("all", "losses"):
            result["other_losses"] = other_losses(Path(folder), HALF, arguments.steps_of_other_losses)
            falls = result["other_losses"]["first_and_last"]
            for key in ("perceptual", "discriminator", "adversarial_against_a_fixed_discriminator"):
                kept[f"{key} falls"] = falls[key][-1] < falls[key][0]
    machine.save("tokenizer", {**result, "kept": kept})
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
