"""Two processes that write one output: one works, the other is told or finds it done, and nothing else stays."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = """
import os, sys, time
import mvar_core as mvar

kind, model, image, folder, name, form = sys.argv[1:7]
sample, edit, cpu = mvar.sample_to, mvar.edit, mvar.Machine(device="cpu", dtype="float32")


def write(out):
    options = {"checkpoint": model, "classes": "all", "num": 4, "format": form, "batch_size": 2, "machine": cpu}
    if kind == "edit":
        edit(image, out, box=(0, 0, 8, 16), **options)
    else:
        sample(out, **options)


def child(delay):
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        time.sleep(delay)
        write(f"{folder}/{name}")
        code = 0
    except mvar.MvarError as error:
        told = "at work in" in str(error) or "just finished" in str(error)
        code = 1 if told else 98
        if not told:
            print(error, flush=True)
    finally:
        os._exit(code)


write(f"{folder}/single-{name}")
for delay in map(float, sys.argv[7:]):
    ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in (child(0), child(delay))]
    print(delay, *ends, sorted(os.listdir(folder)), flush=True)
    assert sorted(ends) in ([0, 0], [0, 1]), ends
    for root in (f"{folder}/{name}", f"{folder}/single-{name}"):
        files = [root] if os.path.isfile(root) else sorted(os.path.join(root, file) for file in os.listdir(root))
        content = b"".join(open(file, "rb").read() for file in files)
        if root == f"{folder}/{name}":
            found = content
    assert found == content
    assert sorted(os.listdir(folder)) == sorted([name, f"single-{name}"])
    os.system(f"rm -r {folder}/{name}")
"""


def run(kind: str, form: str, model: Path, folder: Path, delays: list[float]) -> None:
    image = folder / "image.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)).save(image)
    (folder / "out").mkdir()
    name = {"npz": "x.npz", "grid": "x.png", "png": "x"}[form]
    command = [sys.executable, "-c", PROGRAM, kind, model, image, folder / "out", name, form, *delays]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_writes_and_the_other_is_told(model: Path, tmp_path: Path) -> None:
    run("sample", "npz", model, tmp_path, [0, 0.02, 0.05, 0.1, 0.2, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["npz", "png", "grid"])
@pytest.mark.parametrize("kind", ["sample", "edit"])
def test_fifty_times(model: Path, tmp_path: Path, kind: str, form: str) -> None:
    chance = random.Random(f"{kind} {form}")
    delays = [chance.uniform(0, 2) if number % 10 == 0 else chance.uniform(0, 0.5) for number in range(50)]
    run(kind, form, model, tmp_path, delays)
