"""What the tests of distributed training run in each process: `python distributed_job.py TASKS.json`, under torchrun.

A task is a training run of a transformer or, with "tokenizer", of a tokenizer: {"out", "settings", "fsdp", "losses":
where to write them, "start": a run to copy first, "die": [rank, step], "interrupt": [rank, step]}. Several in one job
save the time that starting processes takes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from tiny_training import FakeImages, FakeTokens, FakeVectorTokens, make_config, make_models

from mvar_core.distributed import World, connect
from mvar_core.training.tokenizer import train_tokenizer
from mvar_core.training.trainer import StepReport
from mvar_core.training.transformer import train_transformer


def run(task: dict[str, Any], world: World) -> None:
    config = make_config(*task.get("settings", ()))
    transformer, tokenizer = make_models(config)
    losses: dict[int, float] = {}

    def on_step(report: StepReport) -> None:
        losses[report.step] = report.loss
        if task.get("die") == [world.rank, report.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.get("interrupt") == [world.rank, report.step]:
            raise KeyboardInterrupt

    out = Path(task["out"])
    if "start" in task and world.is_rank_zero:
        shutil.copytree(task["start"], out)
    world.barrier()
    if task.get("tokenizer"):
        trained, measures = train_tokenizer(tokenizer, FakeImages(), config, out, on_step=on_step)
        found = {"losses": losses, "steps": trained.steps, "score": measures.psnr}
    else:
        tokens = FakeTokens if config.conditioning.dim is None else FakeVectorTokens
        validation = tokens(config, rows=9, seed=1)
        result = train_transformer(
            transformer, tokenizer, tokens(config), config, out, validation=validation, fsdp=task.get("fsdp", False),
            on_step=on_step,
        )  # fmt: skip
        found = {"losses": losses, "steps": result.steps, "score": result.val_loss}
    every = world.all_gather_object(json.dumps(found))
    assert len(set(every)) == 1, every
    if world.is_rank_zero and "losses" in task:
        Path(task["losses"]).write_text(every[0])


def main() -> None:
    torch.set_num_threads(1)
    with connect() as world:
        for task in json.loads(Path(sys.argv[1]).read_text()):
            run(task, world)


if __name__ == "__main__":
    main()
