"""Several processes train as one does: same order, random numbers and losses; checkpoints for any number of them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from mvar_core.distributed import World
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models.directory import load_transformer, read_model_config
from mvar_core.training.checkpoints import IndexUnpickler, checkpoints, latest_checkpoint, load_checkpoint
from mvar_core.training.metrics import read_metrics
from mvar_core.training.parallel import Parallel, check_batch, choose_parallel

JOB = Path(__file__).with_name("distributed_job.py")
SETTINGS = (
    *("train.ema=0.9", "train.log_every=1", "train.checkpoint_every=5", "train.steps=12"),
    *("train.optimizer.lr=0.1", "transformer.gate_init=1.0"),
)
TOKENIZER = (
    "tokenizer.codebook_size=64",
    "train_tokenizer.log_every=1",
    "train_tokenizer.batch_size=7",
    "train_tokenizer.revive_every=2",
)
INTERLEAVED = (*SETTINGS, "train.curriculum=interleaved", "train.ratio_k=2", "train.accumulate=2", "train.steps=6")
VECTORS = (
    *(*SETTINGS, "conditioning.kind=vector", "conditioning.dim=6"),
    *("train.activation_checkpointing=true", "train.steps=6"),
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(tasks: list[dict[str, Any]], folder: Path, *options: str, processes: int = 2) -> subprocess.Popen[str]:
    path = folder / f"tasks-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(tasks))
    options = options or ("--standalone",)
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(JOB), str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def alone(tasks: list[dict[str, Any]]) -> None:
    """The same in this process."""
    spec = importlib.util.spec_from_file_location(JOB.stem, JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for task in tasks:
        job.run(task, World())
    torch.set_num_threads(threads)


def losses(path: Path) -> list[float]:
    return list(json.loads(path.read_text())["losses"].values())


def close(first: list[float], second: list[float], tolerance: float) -> None:
    assert len(first) == len(second)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < tolerance


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two with DDP, two with FSDP: whole runs, and runs resumed with another number of processes."""
    out = tmp_path_factory.mktemp("runs")

    def task(name: str, settings: tuple[str, ...] = SETTINGS, **more: Any) -> dict[str, Any]:
        return {"out": str(out / name), "losses": str(out / f"{name}.json"), "settings": settings, **more}

    def part(name: str, *settings: tuple[str, ...], **more: Any) -> dict[str, Any]:
        whole = task(name, *settings, **{"interrupt": [0, 5], **more})
        return {**whole, "losses": str(out / f"{name}-part.json")}

    alone(
        [
            task("whole"),
            task("turns", INTERLEAVED),
            task("vectors", VECTORS),
            task("tokenizer", TOKENIZER, tokenizer=True),
            part("2-tokenizer", TOKENIZER, tokenizer=True, interrupt=[0, 6]),
            part("1-ddp"),
            part("1-fsdp"),
        ]
    )
    job = torchrun(
        [
            task("ddp"),
            task("fsdp", fsdp=True),
            task("ddp-turns", INTERLEAVED),
            task("fsdp-turns", INTERLEAVED, fsdp=True),
            task("ddp-vectors", VECTORS),
            task("fsdp-vectors", VECTORS, fsdp=True),
            task("ddp-tokenizer", TOKENIZER, tokenizer=True),
            task("2-tokenizer", TOKENIZER, tokenizer=True),
            task("1-ddp"),
            task("1-fsdp", fsdp=True),
            part("ddp-1"),
            part("fsdp-5", fsdp=True),
            task("fsdp-fsdp", fsdp=True, start=str(out / "fsdp-5")),
            task("fsdp-ddp", start=str(out / "fsdp-5")),
            task("stopped", fsdp=True, interrupt=[1, 3]),
        ],
        out,
    )
    _, err = job.communicate(timeout=200)
    assert job.returncode == 0, err
    alone([task("ddp-1"), task("fsdp-1", start=str(out / "fsdp-5"))])
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_follow_the_loss_curve_of_one(runs, kind):
    expected = losses(runs / "whole.json")
    assert len(expected) == 12
    assert expected[-1] < expected[0] - 0.1
    close(losses(runs / f"{kind}.json"), expected, 1e-4)
    one, two = (json.loads((runs / f"{name}.json").read_text())["score"] for name in ("whole", kind))
    assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_steps_that_leave_out_scales_and_micro_batches_are_shared_too(runs, kind):
    close(losses(runs / f"{kind}-turns.json"), losses(runs / "turns.json"), 1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_models_of_vectors_are_trained_the_same(runs, kind):
    close(losses(runs / f"{kind}-vectors.json"), losses(runs / "vectors.json"), 1e-4)
    states = [
        load_transformer(path, read_model_config(path)).conditioner.state_dict()
        for path in (runs / "vectors", runs / f"{kind}-vectors")
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-3, rtol=0)


def test_a_tokenizer_learns_the_same_in_two_processes(runs):
    expected = json.loads((runs / "tokenizer.json").read_text())
    found = json.loads((runs / "ddp-tokenizer.json").read_text())
    close(list(found["losses"].values()), list(expected["losses"].values()), 1e-4)
    assert found["score"] == pytest.approx(expected["score"], abs=0.01)
    first, second = (
        [{name: line[name] for name in ("step", "revived", "code_usage", "usage_per_scale")} for line in lines]
        for lines in (read_metrics(runs / name / "metrics.jsonl") for name in ("tokenizer", "ddp-tokenizer"))
    )
    assert first == second
    assert first[-1]["revived"] > 0
    resumed = losses(runs / "2-tokenizer-part.json") + losses(runs / "2-tokenizer.json")
    close(resumed, list(expected["losses"].values()), 1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_model_directory_is_that_of_one_process(runs, kind):
    first, second = (
        load_transformer(path, read_model_config(path), "cpu", torch.float32).state_dict()
        for path in (runs / "whole", runs / kind)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-3, rtol=0)
    assert (runs / kind / "best" / "transformer.safetensors").exists()


@pytest.mark.parametrize("name", ["1-ddp", "1-fsdp", "ddp-1", "fsdp-1", "fsdp-fsdp", "fsdp-ddp"])
def test_a_run_resumes_with_another_number_of_processes(runs, name):
    assert json.loads((runs / f"{name}.json").read_text())["steps"] == 12
    part = runs / ("fsdp-5-part.json" if name.startswith("fsdp") else f"{name}-part.json")
    close(losses(part) + losses(runs / f"{name}.json"), losses(runs / "whole.json"), 1e-4)


def test_a_sharded_checkpoint_holds_what_a_whole_one_does(runs):
    found, expected = (load_checkpoint(latest_checkpoint(runs / name)) for name in ("fsdp-5", "whole"))
    assert latest_checkpoint(runs / "fsdp-5").name == "step-00000005.sharded"
    assert found.model.keys() == expected.model.keys()
    assert {name: value.shape for name, value in found.model.items()} == {
        name: value.shape for name, value in expected.model.items()
    }
    assert found.optimizer.keys() == expected.optimizer.keys()
    assert found.average.keys() == expected.average.keys()
    assert all(
        found.optimizer[name]["exp_avg"].shape == value["exp_avg"].shape for name, value in expected.optimizer.items()
    )


def test_an_interruption_of_one_process_saves_the_run_of_all(runs):
    assert json.loads((runs / "stopped.json").read_text())["steps"] == 3
    assert latest_checkpoint(runs / "stopped").name == "step-00000003.sharded"
    assert not (runs / "stopped" / "transformer.safetensors").exists()


def test_old_checkpoints_of_both_kinds_are_removed(runs):
    names = [path.name for path in checkpoints(runs / "fsdp-1")]
    assert names == sorted(names)
    assert names[-1] == "step-00000012.pt"
    assert len(names) <= 3  # two, and the best
    assert not list((runs / "fsdp-1" / "checkpoints").glob(".*"))


def test_a_damaged_or_dangerous_checkpoint_is_refused(runs, tmp_path):
    path = tmp_path / "step-00000005.sharded"
    shutil.copytree(runs / "fsdp-5" / "checkpoints" / path.name, path)
    shards = max(path.glob("*.distcp"))
    content = shards.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    for damage in (content[: len(content) // 2], flipped):
        shards.write_bytes(damage)
        with pytest.raises(CheckpointError, match=shards.name):
            load_checkpoint(path)
    shards.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    shards.write_bytes(content)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="not belong in a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


class Pickled:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_an_index_may_name_members_of_enumerations_and_nothing_else_by_getattr():
    """Python 3.11.0 to 3.11.3 write members so, whichever Python reads them."""
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    written = pickle.dumps(Pickled(getattr, _MEM_FORMAT_ENCODING, member.name))
    assert b"getattr" in written
    assert IndexUnpickler(io.BytesIO(written)).load() is member
    for kind, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "mro")):
        with pytest.raises(pickle.UnpicklingError, match="not belong in a checkpoint"):
            IndexUnpickler(io.BytesIO(pickle.dumps(Pickled(getattr, kind, name)))).load()


def test_what_processes_cannot_share_is_refused():
    cpu = torch.device("cpu")
    assert type(choose_parallel(cpu, torch.float32, 1)) is Parallel
    with pytest.raises(ConfigError, match="--nproc"):
        choose_parallel(cpu, torch.float32, 4, fsdp=True)
    with pytest.raises(ConfigError, match="bfloat16"):
        choose_parallel(cpu, torch.float16, 4, fsdp=True)
    with pytest.raises(ConfigError, match=r"3 images cannot be shared by 4.*--batch-size 4"):
        check_batch(3, 4)
    with pytest.raises(ConfigError, match=r"10 images.*multiple.*--batch-size 12"):
        check_batch(10, 4, fsdp=True)


def whole_curve(folder: Path) -> list[float]:
    alone([{"out": str(folder / "whole"), "losses": str(folder / "whole.json"), "settings": SETTINGS}])
    return losses(folder / "whole.json")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_that_is_killed_ends_the_job_within_a_minute_and_the_run_resumes(tmp_path, fsdp):
    task = {"out": str(tmp_path / "run"), "settings": SETTINGS, "fsdp": fsdp}
    job = torchrun([{**task, "die": [1, 8]}], tmp_path)
    started = time.monotonic()
    while not list((tmp_path / "run").glob("checkpoints/step-00000005*")):
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    reached = time.monotonic()
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert time.monotonic() - reached < 60
    assert "SIGKILL" in err or "Signal 9" in err
    assert latest_checkpoint(tmp_path / "run").name.startswith("step-00000005")
    again = torchrun([{**task, "losses": str(tmp_path / "rest.json")}], tmp_path)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    close(losses(tmp_path / "rest.json"), whole_curve(tmp_path)[5:], 1e-5)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def nodes(tasks: list[dict[str, Any]], folder: Path) -> list[subprocess.Popen[str]]:
    """Two launchers with one process each, which meet as two machines would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=mvar"]
    return [torchrun(tasks, folder, *options, "--local-addr=127.0.0.1", processes=1) for _ in range(2)]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(tmp_path):
    task = {"out": str(tmp_path / "run"), "losses": str(tmp_path / "two.json"), "settings": SETTINGS}
    for job in nodes([{**task, "fsdp": True}], tmp_path):
        _, err = job.communicate(timeout=180)
        assert job.returncode == 0, err
    close(losses(tmp_path / "two.json"), whole_curve(tmp_path), 1e-5)
