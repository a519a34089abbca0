"""Two jobs with one output directory: one works, the other is told who does and changes nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mvar_core as mvar
from mvar_core.errors import DataError

PROCESS = [sys.executable, "-m", "mvar_cli"]


def contents(out: Path) -> dict[str, bytes]:
    """Every file, but for those that hold times."""
    timed = ("metrics.jsonl", ".pt")
    return {
        str(path.relative_to(out)): b"" if path.name.endswith(timed) else path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["train", "finetune-from-var", "train-tokenizer"])
def test_the_second_is_told_who_is_first(kind, tokens, model, images, preset, tmp_path):
    out = tmp_path / "run"
    told = []

    def start(**more: Any) -> Any:
        loop = {"out": out, "preset": str(preset), "steps": 2, **more}
        if kind == "train-tokenizer":
            return mvar.train_tokenizer(data=str(images), **loop)
        if kind == "train":
            return mvar.train(tokens=tokens, tokenizer=model, **loop)
        return mvar.finetune_from_var(tokens=tokens, var_checkpoint=model, **loop)

    def second(*_: Any, **__: Any) -> None:
        before = contents(out)
        for overwrite in (False, True):
            with pytest.raises(DataError, match=rf"Process {os.getpid()} on .*since.* is at work in {out}"):
                start(overwrite=overwrite)
        told.append(contents(out) == before)

    assert start(progress=second).steps == 2
    assert told
    assert all(told)
    assert not list(tmp_path.rglob(".*"))
    assert start().steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "finetune-from-var", "train-tokenizer"])
def test_two_started_within_two_seconds(kind, tokens, model, images, preset, tmp_path):
    """Again and again: one ends well, the other is told or finds it done; the files are those of a single run."""
    given = {
        "train": ["--tokens", tokens, "--tokenizer", model],
        "finetune-from-var": ["--tokens", tokens, "--var-checkpoint", model],
        "train-tokenizer": ["--data", images],
    }[kind]
    command = [*PROCESS, kind, "--preset", str(preset), "--steps", "6", "--device", "cpu", *map(str, given), "--out"]
    subprocess.run([*command, str(tmp_path / "single")], check=True, capture_output=True)
    single, offsets = contents(tmp_path / "single"), random.Random(0)
    for number in range(int(os.environ.get("MVAR_TWO_WRITERS", "5"))):
        out = tmp_path / str(number) / "run"
        jobs = []
        for _ in range(2):
            jobs.append(
                subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            time.sleep(offsets.uniform(0, 2))
        ends = [(*job.communicate(timeout=300), job.returncode) for job in jobs]
        assert 0 in [code for *_, code in ends], ends
        for _, err, code in ends:
            assert code == 0 or (code == 1 and "is at work in" in err and err.count("error: ") == 1), (code, err)
        assert contents(out) == single
        assert [path.name for path in out.parent.iterdir()] == ["run"]
