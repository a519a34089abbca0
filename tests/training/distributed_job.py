"""What the tests of distributed training run in each process: `python distributed_job.py TASKS.json`, under torchrun.

A task is a training run of a transformer or, with "tokenizer", of a tokenizer: {"out", "settings", "steps", "fsdp",
"dtype", "losses": where to write them, "die": [rank, step], "interrupt": [rank, step]}. Several in one job save the
time that starting processes takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config
from mvar_core.distributed import connect
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.training.objective import StepReport
from mvar_core.training.tokenizer import train_tokenizer
from mvar_core.training.transformer import train_transformer


def setup() -> Any:
    """The helpers of this directory's conftest."""
    spec = importlib.util.spec_from_file_location("training_setup", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models(config: RunConfig) -> tuple[Transformer, VQVAE]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VQVAE(config.tokenizer, config.pyramid)
        with torch.no_grad():
            tokenizer.quantizer.codebook.normal_()
        return Transformer(config), tokenizer


def run(task: dict[str, Any], rank: int, helpers: Any) -> None:
    values = helpers._with(helpers.TINY, tuple(task.get("settings", ())))
    config = load_config(None, (), values)
    transformer, tokenizer = models(config)
    losses: dict[int, float] = {}

    def on_step(report: StepReport) -> None:
        losses[report.step] = report.loss
        if task.get("die") == [rank, report.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.get("interrupt") == [rank, report.step]:
            raise KeyboardInterrupt

    fake = helpers.FakeTokens if config.conditioning.dim is None else helpers.FakeVectorTokens
    result: Any
    if task.get("tokenizer"):
        result = train_tokenizer(tokenizer, helpers.FakeImages(), config, Path(task["out"]), on_step=on_step)
        told(task, rank, losses, result.steps, result.interrupted, result.psnr)
        return
    result = train_transformer(
        transformer,
        tokenizer.quantizer,
        fake(config),
        config,
        Path(task["out"]),
        tokenizer_state=tokenizer.state_dict(),
        total_steps=task["steps"],
        dtype=getattr(torch, task.get("dtype", "float32")),
        validation=fake(config, rows=9, seed=1),
        fsdp=task.get("fsdp", False),
        on_step=on_step,
    )
    told(task, rank, losses, result.steps, result.interrupted, result.val_loss)


def told(task: dict[str, Any], rank: int, losses: dict[int, float], *results: Any) -> None:
    """Check that all processes found the same, and write it down."""
    every: list[Any] = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(every, (losses, *results))
        assert all(other == every[0] for other in every), every
    if rank == 0 and "losses" in task:
        found = {"losses": losses, "steps": results[0], "score": results[2]}
        Path(task["losses"]).write_text(json.dumps(found))


def main() -> None:
    torch.set_num_threads(1)
    helpers = setup()
    with connect() as world:
        for task in json.loads(Path(sys.argv[1]).read_text()):
            run(task, world.rank, helpers)


if __name__ == "__main__":
    main()
