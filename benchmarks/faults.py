"""Bad inputs, kills and full disks: whether every command ends in one clear line, and loses nothing.

    python benchmarks/faults.py [--only inputs|kills|disks] [--match TEXT] [--every N] [--jobs N]

Inputs: absurd values of every option, files of the wrong kind in the place of every file, and wrong arguments of public
functions. Each must be refused by a message that names it, or be harmless; nothing may hang, run code of the input or
end as a fault of mvar. Kills: every long command is killed before chosen operations on files; the same command must
then end in the same bytes, with nothing left behind. Disks: the same with a disk that is full at chosen operations, and
on small file systems in memory, where one may mount them. Failing cases are listed on stderr and in
benchmarks/results/faults.json; docs/reliability.md gets the table.

Every case runs in a process of its own, forked from this one, which has loaded everything.
"""

import argparse
import contextlib
import errno
import inspect
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import CLASSES, TINY  # noqa: E402

import mvar_core as mvar  # noqa: E402
from mvar_cli.__main__ import main  # noqa: E402
from mvar_cli.app import COMMANDS, load_command  # noqa: E402
from mvar_core.config.presets import load_config  # noqa: E402
from mvar_core.evaluation.demo import DemoClassifier  # noqa: E402
from mvar_core.models.directory import save_model  # noqa: E402
from mvar_core.models.transformer import Transformer  # noqa: E402
from mvar_core.models.vqvae import VQVAE  # noqa: E402
from mvar_core.workflows import ablate as ablate_workflow  # noqa: E402
from mvar_core.workflows import bench as bench_workflow  # noqa: E402
from mvar_core.workflows.bench_row import MEASUREMENTS  # noqa: E402

PAGE, RESULT = ROOT / "docs" / "reliability.md", machine.RESULTS / "faults.json"
PARTS = ("inputs", "kills", "disks")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SLOW_SECONDS = 10.0
MEMORY = 6 << 30
"""Address space that a case may have; what asks for more must say so."""
KILL_POINTS = 2 if machine.SMOKE else 18
DISK_POINTS = 1 if machine.SMOKE else 6
DISK_SIZES = ("1m",) if machine.SMOKE else ("16k", "64k", "256k", "1m", "8m")

Arguments = list[str]


@dataclass(frozen=True)
class Case:
    """Something to try.

    Attributes:
        kind: The row of the table.
        label: What is wrong.
        command: What is typed; empty where `call` is what is tried.
        names: A message must hold one of these; empty where any will do.
        refused: Whether anything but a refusal is a failure.
        call: A function of the public face with wrong arguments.
    """

    kind: str
    label: str
    command: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    refused: bool = False
    call: Callable[[], object] | None = None


@dataclass(frozen=True)
class Ended:
    """How a process ended; `code` is negative for a signal and None where it was stopped as too slow."""

    code: int | None
    seconds: float
    cpu_seconds: float
    text: str


# --- processes


def start(run: Callable[[], object], log: Path, folder: Path) -> int:
    """Fork a process that runs `run` in `folder`, its output in `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        for source, number in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(log, os.O_CREAT | os.O_WRONLY), 1)):
            os.dup2(source, number)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        run()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except mvar.MvarError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finish(pid: int, log: Path, begun: float, timeout: float) -> Ended | None:
    """How a process ended; None where it still runs and may."""
    found, status, usage = os.wait4(pid, os.WNOHANG)
    seconds = time.monotonic() - begun
    if not found and seconds < timeout:
        return None
    code: int | None = None
    if found:
        code = os.waitstatus_to_exitcode(status)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
    with log.open("rb") as file:
        text = file.read(200_000).decode("utf-8", "replace")
    log.unlink()
    return Ended(code, seconds, usage.ru_utime + usage.ru_stime, text)


def run_one(run: Callable[[], object], folder: Path, timeout: float) -> Ended:
    """Run one process to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    begun, pid = time.monotonic(), start(run, log, folder)
    while (ended := finish(pid, log, begun, timeout)) is None:
        time.sleep(0.005)
    return ended


def typed(command: Sequence[str]) -> Callable[[], object]:
    """`mvar` with some arguments, in this process."""

    def run() -> object:
        sys.argv = ["mvar", *command]
        torch.set_num_threads(1)
        # What is measured in a process of its own is measured here, which spares the start of that process.
        for module in (ablate_workflow, bench_workflow):
            module.measure_alone = lambda request: MEASUREMENTS[request.what](request)
        return main()

    return run


# --- what everything is tried on


class World:
    """A folder with one good thing of every kind, of the model of tests/tiny.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.canary = folder / "canary"
        self.preset, self.images, self.model = folder / "tiny.yaml", folder / "images", folder / "model"
        self.tokens, self.classifier, self.reference = (
            folder / name for name in ("tokens", "classifier.safetensors", "reference.npz")
        )
        self.image, self.mask, self.tar = folder / "image.png", folder / "mask.png", folder / "images.tar"
        self.samples, self.official, self.var = folder / "samples.npz", folder / "official", folder / "var"
        self.vectors = folder / "vectors.npy"
        self.preset.write_text(yaml.safe_dump(TINY))
        random = np.random.default_rng(0)
        for name in CLASSES:
            (self.images / name).mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
                Image.fromarray(pixels).save(self.images / name / f"{number}.png")
        shutil.copy(self.images / CLASSES[0] / "0.png", self.image)
        Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(self.mask)
        with tarfile.open(self.tar, "w") as archive:
            for number, path in enumerate(sorted(self.images.rglob("*.png"))):
                archive.add(path, f"{number:04}.png")
                add_member(archive, f"{number:04}.cls", str(number % 3).encode())
        np.savez(self.samples, arr_0=np.zeros((12, 16, 16, 3), np.uint8), labels=np.arange(12) % 3)
        np.save(self.vectors, np.zeros((12, 4), np.float32))
        config = load_config(str(self.preset), [], {"class_names": CLASSES})
        self.of_vectors = folder / "of-vectors"
        vectors = type(config.conditioning).model_validate({"kind": "vector", "dim": 4})
        attention = type(config.attention)()
        changed = {self.model: {}, self.var: {"attention": attention}, self.of_vectors: {"conditioning": vectors}}
        for path, changes in changed.items():
            own = config.model.model_copy(update=changes)
            torch.manual_seed(0)
            tokenizer, transformer = VQVAE(own.tokenizer, own.pyramid), Transformer(own)
            save_model(path, own, tokenizer=tokenizer.state_dict(), transformer=transformer.state_dict())
        network = DemoClassifier(3, (16, 16))
        network.initialise(torch.Generator().manual_seed(0))
        network.save(self.classifier)
        mvar.tokenize(tokenizer=self.model, data=str(self.images), out=self.tokens)
        mvar.make_reference(self.reference, data=str(self.images), features=str(self.classifier))
        convert = ["convert", "--model", str(self.model), "--to", "official", "--out", str(self.official)]
        ended = run_one(typed(convert), folder / "run", 100)
        assert ended.code == 0, ended.text

    def commands(self, out: str) -> dict[str, Arguments]:
        """Every command as it works, quickly, on what is here; `out` is its output."""
        model, tokens, images = ["--checkpoint", self.model], ["--tokens", self.tokens], ["--data", self.images]
        preset, features, place = ["--preset", self.preset], ["--features", self.classifier], ["--out", out]
        reference = ["--reference", self.images]
        loop = ["--steps", "3", "--checkpoint-every", "1"]
        one = ["--class", "1", "--num", "3", "--seed", "1"]
        found: dict[str, list[Any]] = {
            "train-tokenizer": [*preset, *images, *loop, *place],
            "tokenize": [*model, *images, *place],
            "train": [*preset, *model, *tokens, *loop, *place],
            "finetune-from-var": [*preset, "--var-checkpoint", self.var, *tokens, *loop, *place],
            "sample": [*model, *one, "--format", "npz", "--save-tokens", *place],
            "edit": [*model, "--image", self.image, "--box", "0,0,8,8", *one, *place],
            "evaluate": [*model, *reference, *features, "--num-samples", "12", "--cache", f"{out}-cache"],
            "evaluate make-reference": [*images, *features, "--out", f"{out}.npz"],
            "evaluate reconstruction": [*model, *reference, *features, "--cache", f"{out}-cache"],
            "evaluate likelihood": [*model, *tokens],
            "analyze-attention": [*model, *tokens, "--num", "4", *place],
            "ablate": [*preset, *model, *tokens, "--validation", self.tokens, *features, *reference, "--prefixes",
                       "none", "--windows", "whole", "--seeds", "1", "--num", "2", "--steps", "2", *place],
            "bench": [*preset, "--batch-size", "1", "--repeats", "1", "--no-breakdown"],
            "plan": [*preset],
            "convert": ["--model", self.official / "mvar_d2.pth", "--tokenizer", self.official / "vae.pth", "--kind",
                        "mvar", "--pyramid", "1,2,4", "--windows", "0,0,3", "--scale-prefixes", "1", *place],
            "doctor": [],
        }  # fmt: skip
        return {name: [*name.split(), *map(str, words)] for name, words in found.items()}


def add_member(archive: tarfile.TarFile, name: str, content: bytes = b"", **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


class Payload:
    """Unpickling this makes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def bad_files(folder: Path, good: Path | None, suffix: str, canary: Path) -> dict[str, Path]:
    """Files of every wrong kind, by what is wrong; each is named so that its suffix is the expected one."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}

    def place(name: str) -> Path:
        paths[name] = folder / f"{name.replace(' ', '-')}{suffix}"
        return paths[name]

    def write(name: str, content: bytes) -> None:
        place(name).write_bytes(content)

    place("missing")
    place("directory").mkdir()
    place("loop of links").symlink_to(paths["loop of links"])
    place("dangling link").symlink_to(folder / "nowhere")
    place("device").symlink_to("/dev/zero")
    os.mkfifo(place("named pipe"))
    write("empty", b"")
    write("NUL bytes", b"\0" * 4096)
    write("text", b"this is not it\n")
    write("not UTF-8", b"\xff\xfe{\x80\x81: 1}\n" * 10)
    if good is not None:
        content = good.read_bytes()
        write("truncated", content[: len(content) // 2])
        write("one byte short", content[:-1])
        write("garbage after", content[: len(content) // 3] + os.urandom(len(content) // 2))
    script = f"(%pipe%touch {canary}) (w) file ({canary}) (w) file (x) writestring closefile {{}} loop"
    bounding = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
    write("EPS", f"{bounding}{script}\nshowpage\n%%EOF\n".encode())
    write("PS", f"%!PS-Adobe-3.0\n{script}\nshowpage\n".encode())
    write(
        "PDF", b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(x)>>>>endobj\ntrailer<</Root 1 0 R>>\n"
    )
    write("pickle", pickle.dumps(Payload(canary)))
    torch.save({"a": torch.zeros(1)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(place("pickle in a torch file"), "w") as target:
        for item in source.namelist():
            target.writestr(item, pickle.dumps(Payload(canary)) if item.endswith("data.pkl") else source.read(item))
    with paths["pickle in a torch file"].open("ab"):
        pass
    np.savez(buffer := io.BytesIO(), arr_0=np.array([Payload(canary)], object))
    write("npz with objects", buffer.getvalue())
    np.savez(buffer := io.BytesIO(), arr_0=np.zeros((3, 0, 0, 3), np.uint8))
    write("npz of no pixels", buffer.getvalue())
    with tarfile.open(place("tar that climbs out"), "w") as archive:
        add_member(archive, f"../../{canary.name}.png", b"x")
        add_member(archive, str(canary), b"x")
        add_member(archive, "0.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(archive, "1.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add_member(archive, "1.cls", b"1000000000")
    write("YAML tags", f"a: !!python/object/apply:os.system ['touch {canary}']\n".encode())
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    write("YAML aliases", bomb.encode())
    write("nested JSON", b"[" * 100_000)
    write("nested JSON objects", b'{"a":' * 100_000)
    write("infinite number", b'{"version": 1e999, "image_size": 1e999, "patch_sizes": [1e999]}')
    write("huge number", b'{"version": 1' + b"0" * 5000 + b', "image_size": 1' + b"0" * 5000 + b"}")
    write("a list", b"[1, 2, 3]")
    return paths


# --- bad inputs

ABSURD = ("nan", "inf", "-1", "0", "1.5", str(2**64), "", "x" * 10_000)
ALWAYS_WRONG = {"nan", "inf", "-1", str(2**64), "x" * 10_000}
"""For an option that is a number."""
NUMBERS = ("N", "FRACTION", "DECAY", "SIZE", "N|HxW", "N,N…", "1,2,3x4…", "X0,Y0,X1,Y1", "FIRST-LAST")
BAD_SETTINGS = (
    "train.optimizer.lr=.inf", "train.optimizer.lr=.nan", "train.optimizer.lr=-1", "train.batch_size=0",
    "transformer.depth=100000", "transformer.depth=1000000000", "transformer.embed_dim=1000000000000",
    "patch_sizes=[1,2,1000000000]", "patch_sizes=[]", "patch_sizes=[0]", "patch_sizes=[-1]", "image_size=1000000000",
    "image_size=0", "image_size=1.5", "tokenizer.codebook_size=1000000000000", "tokenizer.latent_channels=0",
    "seed=18446744073709551616", "seed=-1", "seed=1.5", "train.steps=1e30", "train.epochs=.inf", "train.ema=.nan",
    "attention.windows=[4,4,4]", "attention.windows=[9999999999999]", "attention.scale_prefixes=0", "a.b.c=1", "=", "x",
    "patch_sizes=1_2_4_8", "train.steps=1_000", "seed=1:30", "seed=010", "train={steps: 1, steps: 2}",
    "train=1", "train.optimizer=[1]", "tokenizer.channel_multipliers=[1000000000]", "transformer.mlp_ratio=1e300",
    "!!python/object/apply:os.system ['true']=1", "train.steps=!!python/object/apply:os.system ['true']",
)  # fmt: skip
BAD_VALUES: dict[str, Any] = {
    "depth 10⁵": {"transformer.depth": 10**5},
    "depth 10⁹": {"transformer.depth": 10**9},
    "width 10¹²": {"transformer.embed_dim": 10**12},
    "width 1e999": {"transformer.embed_dim": float("inf")},
    "heads 0": {"transformer.num_heads": 0},
    "classes 10¹²": {"transformer.num_classes": 10**12},
    "classes -1": {"transformer.num_classes": -1},
    "codebook 10¹²": {"tokenizer.codebook_size": 10**12},
    "channels 10⁹": {"tokenizer.base_channels": 10**9},
    "pyramid of 10⁶ scales": {"patch_sizes": [1] * 10**6},
    "side 10⁹": {"patch_sizes": [1, 2, 10**9]},
    "image 10⁹": {"image_size": 10**9},
    "image 2⁶⁴": {"image_size": 2**64},
    "image nan": {"image_size": float("nan")},
    "image text": {"image_size": "x" * 10**6},
    "windows of text": {"attention.windows": ["a", "b"]},
    "cfg nan": {"sampling.cfg": float("nan")},
    "10⁶ class names": {"class_names": ["a"] * 10**6},
    "class names are numbers": {"class_names": [1, 2, 3]},
    "unknown key": {"nonsense": {"a": 1}},
    "section is a list": {"transformer": [1]},
    "dim 10¹²": {"conditioning": {"kind": "vector", "dim": 10**12}},
}


def replaced(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested mapping with other values at dotted keys."""
    values = json.loads(json.dumps(values))
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = values
        for name in path:
            inner = inner[name]
        inner[last] = value
    return values


def without(command: Sequence[str], *options: str) -> Arguments:
    """A command without some options and their values."""
    words = list(command)
    for option in options:
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    return words


REPLACES = {
    ("plan", "--checkpoint"): ("--preset",),
    ("bench", "--checkpoint"): ("--preset",),
    ("evaluate", "--samples"): ("--checkpoint",),
    ("edit", "--mask"): ("--box",),
    ("sample", "--vectors"): ("--class",),
}
"""What an option is used in the place of."""


def with_option(command: Arguments, option: str, value: str) -> tuple[str, ...]:
    """A command with another value of an option, in the one argument `--option=value`."""
    return (*without(command, option, *REPLACES.get((command[0], option), ())), f"{option}={value}")


def option_cases(world: World) -> Iterator[Case]:
    """Absurd values of every option of every command."""
    commands = world.commands("out")
    commands["quickstart"] = ["quickstart", "--out", "out", "--dry-run"]
    for entry in COMMANDS:
        for parameter in load_command(entry).params:
            option = parameter.opts[-1]
            if parameter.is_flag or option in ("--nproc", "--help"):
                continue
            base = commands[entry.name]
            if (entry.name, option) == ("sample", "--vectors"):
                base = [*without(base, "--checkpoint"), f"--checkpoint={world.of_vectors}"]
            for value in ABSURD:
                refused = parameter.metavar in NUMBERS and value in ALWAYS_WRONG
                refused |= parameter.metavar is None and value in ("nan", "inf", "x" * 10_000)
                if (entry.name, option) == ("quickstart", "--minutes") and value == "0":
                    continue
                names = (option, option[2:], option[2:].replace("-", "_"), value[:20], "patch_sizes") if value else ()
                words = with_option(base, option, value)
                yield Case("option values", f"{entry.name} {option} {value[:20]!r}", words, names, refused)
            if option == "--set":
                for value in BAD_SETTINGS:
                    command = (*commands[entry.name], option, value)
                    keys = (*value.split("=")[0].split("."), "--set", "patch_sizes", "image_size")
                    yield Case("configuration values", f"{entry.name} {value}", command, keys)


def file_cases(world: World) -> Iterator[Case]:
    """Files of every wrong kind in the place of every file."""
    commands, folder, canary = world.commands("out"), world.folder / "bad", world.canary
    official = sorted(world.official.glob("*.pth"))
    kinds = {
        "images": bad_files(folder / "image", world.image, ".png", canary),
        "archives": bad_files(folder / "tar", world.tar, ".tar", canary),
        "npz": bad_files(folder / "npz", world.samples, ".npz", canary),
        "npy": bad_files(folder / "npy", world.vectors, ".npy", canary),
        "presets": bad_files(folder / "yaml", world.preset, ".yaml", canary),
        "weights": bad_files(folder / "pth", official[0], ".pth", canary),
        "programs": bad_files(folder / "pt2", None, ".pt2", canary),
        "classifiers": bad_files(folder / "safetensors", world.classifier, ".safetensors", canary),
        "directories": bad_files(folder / "directory", world.image, "", canary),
    }
    places = [
        ("images", ("edit --image", "edit --mask")),
        ("archives", ("tokenize --data", "train-tokenizer --data", "evaluate --samples")),
        ("npz", ("tokenize --data", "evaluate --samples", "evaluate --reference", "evaluate make-reference --data",
                 "sample --vectors")),
        ("npy", ("sample --vectors", "tokenize --vectors")),
        ("presets", ("train --preset", "plan --preset", "ablate --preset", "bench --preset",
                     "train-tokenizer --preset")),
        ("weights", ("convert --model", "convert --tokenizer", "sample --checkpoint", "plan --checkpoint",
                     "finetune-from-var --var-checkpoint", "train-tokenizer --start", "train-tokenizer --vgg-weights",
                     "train-tokenizer --lpips-weights", "evaluate --inception-weights",
                     "analyze-attention --checkpoint")),
        ("programs", ("evaluate --features", "ablate --features")),
        ("classifiers", ("evaluate --features", "evaluate reconstruction --features")),
        ("directories", ("sample --checkpoint", "tokenize --checkpoint", "tokenize --data", "train --tokens",
                         "train --validation", "train --checkpoint", "evaluate --checkpoint", "evaluate --reference",
                         "evaluate likelihood --tokens", "analyze-attention --tokens", "ablate --tokens",
                         "ablate --checkpoint", "edit --checkpoint")),
    ]  # fmt: skip
    for kind, options in places:
        for text in options:
            name, option = text.rsplit(" ", 1)
            command = commands[name]
            for label, path in kinds[kind].items():
                base = command
                if option in ("--vgg-weights", "--lpips-weights"):
                    base = [*command, "--set", "train_tokenizer.perceptual.weight=1"]
                if option == "--inception-weights":
                    base = list(with_option(command, "--features", "inception"))
                if (name, option) == ("sample", "--vectors"):
                    base = [*without(command, "--checkpoint"), f"--checkpoint={world.of_vectors}"]
                harmless = label in ("directory", "garbage after", "one byte short", "text")
                yield Case(f"files: {kind}", f"{text}: {label}", with_option(base, option, str(path)),
                           (path.stem, "vgg", "lpips"), not harmless)  # fmt: skip
    yield from folder_cases(world, kinds["images"])
    yield from model_cases(world)
    yield from token_cases(world)


def folder_cases(world: World, bad: dict[str, Path]) -> Iterator[Case]:
    """One bad file in a folder of good images."""
    commands = world.commands("out")
    for label, path in bad.items():
        folder = world.folder / "bad" / "folders" / label.replace(" ", "-")
        shutil.copytree(world.images, folder, symlinks=True)
        target = folder / "cat" / f"bad-{path.name}"
        if path.is_symlink():
            target.symlink_to(target if label == "loop of links" else os.readlink(path))
        elif label == "named pipe":
            os.mkfifo(target)
        elif path.is_dir():
            target.mkdir()
        elif path.exists():
            shutil.copy(path, target)
        else:
            continue
        for name, option in (
            ("tokenize", "--data"), ("train-tokenizer", "--data"), ("evaluate", "--reference"),
            ("evaluate make-reference", "--data"), ("evaluate reconstruction", "--reference"),
        ):  # fmt: skip
            words = with_option(commands[name], option, str(folder))
            refused = label not in ("directory", "one byte short")
            yield Case("one bad image in a folder", f"{name}: {label}", words, (target.name,), refused)
    range_of_shards = str(world.folder / "{000..999999999}.tar")
    for name in ("tokenize", "train-tokenizer"):
        command = with_option(commands[name], "--data", range_of_shards)
        yield Case("files: archives", f"{name}: a range of 10⁹ shards", command, ("999999999", ".tar"), True)


def model_cases(world: World) -> Iterator[Case]:
    """Model directories with a bad config.json or bad weights."""
    commands = world.commands("out")
    users = {"sample": "--checkpoint", "tokenize": "--checkpoint", "train": "--checkpoint", "plan": "--checkpoint",
             "finetune-from-var": "--var-checkpoint", "analyze-attention": "--checkpoint"}  # fmt: skip
    good = json.loads((world.model / "config.json").read_text())
    models: list[tuple[str, Path, bool]] = []
    for name in ("config.json", "transformer.safetensors", "tokenizer.safetensors"):
        suffix = f"-{name}"
        found = bad_files(world.folder / "bad" / name, world.model / name, suffix, world.canary)
        for label, path in found.items():
            model = copied(world.model, world.folder / "bad" / "models" / path.name, name, path)
            harmless = label in ("garbage after", "one byte short") and name == "config.json"
            models.append((f"{name}: {label}", model, not harmless))
    for label, changes in BAD_VALUES.items():
        model = copied(world.model, world.folder / "bad" / "models" / f"value-{len(models)}")
        (model / "config.json").write_text(json.dumps(replaced(good, changes)))
        models.append((f"config.json: {label}", model, label != "10⁶ class names"))
    for file in ("transformer.safetensors", "tokenizer.safetensors"):
        state = load_file(world.model / file)
        first = next(name for name, value in state.items() if value.ndim > 1)
        for label, change in {
            "NaN": state[first] * float("nan"), "infinite": state[first] / 0, "integers": state[first].long(),
            "booleans": state[first] > 0, "complex": torch.complex(state[first], state[first]),
            "another shape": state[first][:-1].contiguous(), "float8": state[first].to(torch.float8_e4m3fn),
        }.items():  # fmt: skip
            model = copied(world.model, world.folder / "bad" / "models" / f"{label.replace(' ', '-')}-{file}")
            save_file({**state, first: change}, model / file)
            models.append((f"{file}: {label} weights", model, label != "float8"))
    for label, model, refused in models:
        for name, option in users.items():
            needs = {"transformer.safetensors": ("sample", "analyze-attention", "finetune-from-var"),
                     "tokenizer.safetensors": ("sample", "tokenize", "train", "analyze-attention")}  # fmt: skip
            file = label.split(":")[0]
            if name in needs.get(file, users):
                command = with_option(commands[name], option, str(model))
                yield Case(
                    "model directories",
                    f"{name}: {label}",
                    command,
                    (model.name, file, "weights", "in this model"),
                    refused,
                )


def token_cases(world: World) -> Iterator[Case]:
    """Token caches with a bad manifest or bad shards."""
    commands = world.commands("out")
    shard = "tokens-00000.npy"
    caches: list[tuple[str, Path, bool]] = []
    for name in ("manifest.json", shard):
        found = bad_files(world.folder / "bad" / f"tokens-{name}", world.tokens / name, f"-{name}", world.canary)
        for label, path in found.items():
            cache = copied(world.tokens, world.folder / "bad" / "caches" / path.name, name, path)
            caches.append(
                (f"{name}: {label}", cache, not (label in ("one byte short", "garbage after") and name != shard))
            )
    cache = copied(world.tokens, world.folder / "bad" / "caches" / "flipped")
    content = bytearray((cache / shard).read_bytes())
    content[-1] ^= 1
    (cache / shard).write_bytes(content)
    caches.append((f"{shard}: a flipped bit", cache, True))
    good = json.loads((world.tokens / "manifest.json").read_text())
    for key in list(good):
        for value in (None, -1, 2**64, [], {}, "x" * 100_000):
            cache = copied(world.tokens, world.folder / "bad" / "caches" / f"key-{len(caches)}")
            (cache / "manifest.json").write_text(json.dumps({**good, key: value}))
            caches.append((f"manifest.json: {key} is {str(value)[:20]}", cache, False))
    for number, (label, cache, refused) in enumerate(caches):
        names = ("train", "analyze-attention", "evaluate likelihood")
        # Of the many manifests each is tried with one command, in turn.
        for name in names if refused else names[number % 3 :][:1]:
            command = with_option(commands[name], "--tokens", str(cache))
            yield Case("token caches", f"{name}: {label}", command, (cache.name,), refused)


def copied(source: Path, target: Path, name: str = "", content: Path | None = None) -> Path:
    """A copy of a directory, in which one file is another: a link, so that it may be a pipe or a device."""
    shutil.copytree(source, target)
    if content is not None:
        (target / name).unlink()
        (target / name).symlink_to(content)
    return target


def output_cases(world: World) -> Iterator[Case]:
    """Places where nothing can be written."""
    base = world.folder / "outputs"
    (base / "full").mkdir(parents=True)
    (base / "file").write_text("mine")
    (base / "full" / "mine").write_text("mine")
    (base / "loop").symlink_to(base / "loop")
    places = {"a file": base / "file", "below a file": base / "file" / "out", "a full directory": base / "full",
              "a loop of links": base / "loop" / "out", "a long name": base / ("x" * 300), "/proc": Path("/proc/out"),
              "a device": Path("/dev/null/out")}  # fmt: skip
    for label, path in places.items():
        for name, command in world.commands(str(path)).items():
            if any(str(path) in word for word in command):
                yield Case("outputs", f"{name}: {label}", tuple(command), (str(path)[:40], path.name[:40]), False)


def call_cases(world: World) -> Iterator[Case]:
    """Public functions and methods with wrong arguments."""
    pipe = mvar.Pipeline.from_pretrained(world.model, device="cpu", dtype="float32")
    good = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = pipe.encode(good)
    settings = mvar.SamplingConfig
    wrong: list[tuple[str, Callable[[], object]]] = [
        (f"sample({name}={value!r:.40})", lambda name=name, value=value: pipe.sample(**{"labels": [0, 1], name: value}))
        for name, values in {
            "labels": (None, [], [-1], [3], [2**64], [0.5], [float("nan")], ["cat"], "cat", 1.5, [[0]], [1j], [None]),
            "seed": (-1, 1.5, 2**64, float("nan"), "x", None, [1]),
            "batch_size": (0, -1, 1.5, float("nan"), "x", 2**64),
            "indices": ([-1, 0], [0], [0.5, 1], [2**64, 1], "ab"),
            "cfg": (float("nan"), float("inf"), "x", [1], -1e308), "top_k": (-1, 1.5, 2**64, "x", float("nan")),
            "top_p": (float("nan"), -1, 2, "x"), "nonsense": (1,), "settings": (1, {}, "x"),
            "conditions": (torch.zeros(2, 3), np.zeros(2), "x"),
        }.items() for value in values
    ]  # fmt: skip
    tensors: list[tuple[str, Any]] = [
        ("None", None), ("a list", [1, 2]), ("an empty batch", good[:0]), ("1 channel", good[:, :1]),
        ("4 channels", torch.rand(2, 4, 16, 16)), ("3 dimensions", good[0]), ("5 dimensions", good[None]),
        ("another size", good[..., :8]), ("NaN", good * float("nan")), ("infinity", good / 0),
        ("integers", good.long()), ("complex", good + 1j),
        ("booleans", good > 0), ("float16", good.half()), ("float64", good.double()), ("numpy", good.numpy()),
        ("sparse", good.to_sparse()), ("meta", good.to("meta")), ("text", "x"), ("values of 1e30", good * 1e30),
    ]  # fmt: skip
    wrong += [(f"encode({label})", lambda value=value: pipe.encode(value)) for label, value in tensors]
    indices: list[tuple[str, Any]] = [
        ("None", None), ("a list", [1]), ("empty", tokens[:0]), ("short", tokens[:, :-1]), ("1 dimension", tokens[0]),
        ("-1", tokens * 0 - 1), ("too large", tokens * 0 + 16), ("2⁶²", tokens * 0 + 2**62), ("floats", tokens.float()),
        ("NaN", tokens * float("nan")), ("int32", tokens.int()), ("uint8", tokens.byte()), ("numpy", tokens.numpy()),
        ("sparse", tokens.to_sparse()), ("meta", tokens.to("meta")), ("text", "x"), ("complex", tokens + 1j),
    ]  # fmt: skip
    wrong += [(f"decode({label})", lambda value=value: pipe.decode(value)) for label, value in indices]
    wrong += [(f"logits({label})", lambda value=value: pipe.logits(value, [0, 1])) for label, value in indices]
    wrong += [(f"logits(labels={value!r:.30})", lambda value=value: pipe.logits(tokens, value))
              for value in (None, [], [0], [0, 3], [0, -1], [0.5, 1], ["a", "b"], "ab", [1j, 0], [2**64])]  # fmt: skip
    wrong += [
        (f"SamplingConfig({name}={value!r})", lambda name=name, value=value: settings(**{name: value}))
        for name in settings.model_fields for value in (float("nan"), float("inf"), -1, 2**64, "x", [], {})
    ]  # fmt: skip
    wrong += [
        (f"from_pretrained({name}={value!r:.40})",
         lambda name=name, value=value: mvar.Pipeline.from_pretrained(**{"path": world.model, name: value}))
        for name, values in {"path": (None, 1, "", "\0", "/nowhere", [], b"x", world.image),
                             "device": ("x", "cuda:99", 1.5, ""), "dtype": ("x", "int8", 1, torch.int64),
                             "attention": ("x", 1, "")}.items()
        for value in values
    ]  # fmt: skip
    out, preset = {"out": world.folder / "calls" / "out"}, {"preset": str(world.preset)}
    trained = {"tokens": world.tokens, "tokenizer": world.model}
    measured = {"reference": world.images, "features": world.classifier}
    known: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
        "train": (mvar.train, {**trained, **preset, **out}),
        "tokenize": (mvar.tokenize, {"tokenizer": world.model, "data": str(world.images), **out}),
        "sample_to": (mvar.sample_to, {"checkpoint": world.model, "classes": [0], "num": 1, **out}),
        "evaluate": (mvar.evaluate, {"samples": world.samples, **measured}),
        "analyze_attention": (
            mvar.analyze_attention,
            {"checkpoint": world.model, "tokens": world.tokens, "num": 2, **out},
        ),
        "ablate": (mvar.ablate, {**preset, **trained, **out, "dry_run": True}),
        "plan": (mvar.plan, preset),
        "bench": (mvar.bench, {**preset, "repeats": 1, "batch_size": 1}),
        "convert": (mvar.convert, {"model": world.model, **out}),
    }
    for function_name, (function, arguments) in known.items():
        for name in inspect.signature(function).parameters:
            if name in ("progress", "machine", "dry_run", "overwrite", "loop", "resume", "fsdp"):
                continue
            for value in (-1, 1.5, float("nan"), 2**64, "", "x\0y", b"x", [], {}, object):
                wrong.append((f"{function_name}({name}={value!r:.20})",
                              lambda f=function, a=arguments, n=name, v=value: f(**{**a, n: v})))  # fmt: skip
    yield from (Case("public functions", label, call=call) for label, call in wrong)


def try_inputs(world: World, cases: Sequence[Case], jobs: int, timeout: float) -> list[dict[str, Any]]:
    """Try all cases, some at a time, and judge how each ended."""
    waiting, running, found = list(enumerate(cases))[::-1], {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop()
            folder = world.folder / "runs" / str(number)
            folder.mkdir(parents=True)
            log = folder.with_suffix(".log")
            pid = start(case.call or typed(case.command), log, folder)
            running[pid] = (case, folder, log, time.monotonic())
        for pid, (case, folder, log, begun) in list(running.items()):
            ended = finish(pid, log, begun, timeout)
            if ended is not None:
                del running[pid]
                shutil.rmtree(folder, ignore_errors=True)
                found.append(judged(world, case, ended))
                if len(found) % 100 == 0:
                    print(f"{len(found)} of {len(cases)} inputs", file=sys.stderr, flush=True)
        time.sleep(0.002)
    return found


def judged(world: World, case: Case, ended: Ended) -> dict[str, Any]:
    """A row of the results."""
    text = " ".join(ended.text.split())
    problem = ""
    if world.canary.exists():
        problem = "executed"
        world.canary.unlink()
    elif ended.code is None:
        problem = "hang"
    elif "fault in mvar" in text:
        problem = "fault in mvar"
    elif "Traceback" in text or ended.code == 70:
        problem = "traceback"
    elif ended.code not in (0, 1, 2):
        problem = f"exit code {ended.code}"
    elif ended.cpu_seconds > SLOW_SECONDS:
        problem = "slow"
    elif ended.code == 0 and case.refused:
        problem = "accepted"
    elif ended.code and case.names and not any(name in text for name in case.names):
        problem = "not named"
    words = [str(word) if len(str(word)) < 200 else f"{word[:40]}…" for word in case.command]
    return {
        "kind": case.kind, "label": case.label, "problem": problem, "code": ended.code,
        "seconds": round(ended.cpu_seconds, 2), "message": ended.text[-400:].strip() if problem else "",
        "command": " ".join(words) if problem else "",
    }  # fmt: skip


# --- kills and full disks

LONG = (
    "train-tokenizer", "tokenize", "train", "finetune-from-var", "sample", "edit", "evaluate",
    "evaluate make-reference", "analyze-attention", "ablate", "convert",
)  # fmt: skip
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


def watched(command: Sequence[str], folder: Path, act: Callable[[int, str], None]) -> Callable[[], object]:
    """A command that calls `act` with a number and a path before each operation that changes files in `folder`."""
    run = typed(command)

    def watching() -> object:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open":
                path, _, flags = arguments
                if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
                    return
            elif event in WRITES:
                path = arguments[0]
            else:
                return
            if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(f"{folder}/"):
                count += 1
                act(count, os.fsdecode(path))

        sys.addaudithook(hook)
        return run()

    return watching


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every directory."""
    return {
        str(path.relative_to(folder)): b"directory" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


class Expected:
    """What a command leaves when nothing happens to it: run twice, so that what the clock changes is known."""

    def __init__(self, world: World, name: str):
        self.world, self.name = world, name
        self.folder = world.folder / "clean" / name.replace(" ", "-")
        self.operations = 0
        first, second = self.run(counted=True), self.run()
        self.files = first
        self.clocked = {path for path in first if second.get(path) != first[path]}

    def command(self) -> Arguments:
        """The command, its output in `folder`."""
        return self.world.commands(str(self.folder / "out"))[self.name]

    def run(self, counted: bool = False) -> dict[str, bytes]:
        """One run into an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        counter = self.folder.parent / "count"

        def count(number: int, path: str) -> None:
            counter.write_text(str(number))

        ended = run_one(watched(self.command(), self.folder, count if counted else lambda *_: None), self.folder, 300)
        assert ended.code == 0, ended.text
        if counted:
            self.operations = int(counter.read_text())
        return contents(self.folder)

    def points(self, count: int) -> list[int]:
        """Operations at which something happens, spread evenly."""
        return sorted({1 + round(index * (self.operations - 1) / max(1, count - 1)) for index in range(count)})

    def different(self, folder: Path) -> str:
        """How a folder differs from what is expected."""
        found = contents(folder)
        if extra := found.keys() - self.files.keys():
            return f"left behind: {', '.join(sorted(extra)[:3])}"
        if missing := self.files.keys() - found.keys():
            return f"missing: {', '.join(sorted(missing)[:3])}"
        changed = [path for path in found if path not in self.clocked and found[path] != self.files[path]]
        return f"other bytes: {', '.join(changed[:3])}" if changed else ""


def try_kills(expected: Expected) -> Iterator[dict[str, Any]]:
    """Kill a command before chosen operations, run it again, and compare."""
    folder = expected.folder
    for point in expected.points(KILL_POINTS):
        shutil.rmtree(folder)
        folder.mkdir()

        def kill(number: int, path: str, point: int = point) -> None:
            if number == point:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = run_one(watched(expected.command(), folder, kill), folder, 300)
        again = run_one(typed(expected.command()), folder, 300)
        problem = f"exit code {again.code}" if again.code else expected.different(folder)
        if killed.code != -signal.SIGKILL:
            problem = f"not killed: {killed.code}"
        yield {
            "kind": "kills", "label": f"{expected.name} at operation {point} of {expected.operations}",
            "problem": problem, "code": again.code, "seconds": round(again.cpu_seconds, 2),
            "message": again.text[-400:] if problem else "", "command": "",
        }  # fmt: skip


def refused_by_disk(ended: Ended) -> str:
    """What is wrong with how a command ended on a full disk."""
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    if ended.code is None:
        return "hang"
    if "fault in mvar" in ended.text or "Traceback" in ended.text:
        return "fault in mvar"
    if ended.code not in (0, 1):
        return f"exit code {ended.code}"
    if ended.code and (len(errors) != 1 or "pace" not in errors[0]):
        return "not named"
    return ""


def try_disks(expected: Expected) -> Iterator[dict[str, Any]]:
    """A disk that is full at chosen operations, and small file systems; then room is made and the command run again."""
    folder = expected.folder

    def row(label: str, full: Ended, again: Ended) -> dict[str, Any]:
        problem, message = refused_by_disk(full), full.text[-600:]
        if not problem:
            message = again.text[-600:]
            problem = f"exit code {again.code} with room" if again.code else expected.different(folder)
        return {
            "kind": "full disks", "label": f"{expected.name}, {label}", "problem": problem, "code": full.code,
            "seconds": round(full.cpu_seconds, 2), "message": message if problem else "",
            "command": "",
        }  # fmt: skip

    for point in expected.points(DISK_POINTS):
        shutil.rmtree(folder)
        folder.mkdir()

        def fill(number: int, path: str, point: int = point) -> None:
            # What frees room still works on a full disk; the rest fails from here on.
            if number >= point and not sys._getframe(2).f_code.co_name.startswith(("unlink", "remove", "rm")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        full = run_one(watched(expected.command(), folder, fill), folder, 300)
        yield row(f"full at operation {point}", full, run_one(typed(expected.command()), folder, 300))
    for size in DISK_SIZES:
        shutil.rmtree(folder)
        folder.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        )
        if mount.returncode:
            return
        try:
            full = run_one(typed(expected.command()), folder, 300)
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
            yield row(f"file system of {size}", full, run_one(typed(expected.command()), folder, 300))
        finally:
            subprocess.run(["umount", str(folder)], check=True)


# --- the report

HELD_BY = {
    "option values": "tests/cli/test_app.py",
    "configuration values": "tests/config/test_section.py",
    "one bad image in a folder": "tests/data/test_folders.py",
    "model directories": "tests/models/test_directory.py",
    "token caches": "tests/data/test_tokens.py",
    "files: images": "tests/data/test_images.py",
    "files: archives": "tests/data/test_tar.py",
    "files: npz": "tests/data/test_evaluation_images.py",
    "files: npy": "tests/data/test_vectors.py",
    "files: presets": "tests/test_untrusted.py",
    "files: weights": "tests/models/test_official.py",
    "files: programs": "tests/evaluation/test_extractors.py",
    "files: classifiers": "tests/evaluation/test_demo.py",
    "files: directories": "tests/cli/test_bad_input.py",
    "outputs": "tests/cli/test_bad_input.py",
    "public functions": "tests/config/test_section.py",
    "kills": "tests/cli/test_kill.py",
    "full disks": "tests/training/test_faults.py",
}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many cases of each kind ended in what, and those that failed."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        kinds[row["kind"]]["failed" if row["problem"] else "works" if row["code"] == 0 else "refused"] += 1
    return {"cases": len(rows), "kinds": kinds, "failed": [row for row in rows if row["problem"]]}


def write_page(parts: Iterable[dict[str, Any]]) -> None:
    """Put the table into docs/reliability.md."""
    lines = [
        "| kind | cases | refused by name | harmless | same bytes in the end | failed | held by |",
        "|---" * 7 + "|",
    ]
    for kind, counts in (item for part in parts for item in part["kinds"].items()):
        refused, works, failed = (counts.get(name, 0) for name in ("refused", "works", "failed"))
        good = ["", "", refused + works] if kind in ("kills", "full disks") else [refused, works, ""]
        cells = [kind, refused + works + failed, *good, failed, HELD_BY[kind]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


def run_all() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--match", default="", help="only cases whose kind and label hold this text")
    parser.add_argument("--every", type=int, default=150 if machine.SMOKE else 1, help="only every so many inputs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=60.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS if asked.only in (None, part)}
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name))
        if "inputs" in rows:
            makers = (option_cases(world), file_cases(world), output_cases(world), call_cases(world))
            cases = [case for made in makers for case in made if asked.match in f"{case.kind} {case.label}"]
            rows["inputs"] = try_inputs(world, cases[:: asked.every], asked.jobs, asked.timeout)
        for command in LONG if rows.keys() - {"inputs"} else ():
            if asked.match in command and (not machine.SMOKE or command in ("sample", "convert")):
                expected = Expected(world, command)
                for part, attempts in (("kills", try_kills), ("disks", try_disks)):
                    if part in rows:
                        rows[part] += attempts(expected)
                print(f"{command}: {expected.operations} operations", file=sys.stderr, flush=True)
    assert all((ROOT / path).is_file() for path in HELD_BY.values())
    found = {part: summary(own) for part, own in rows.items()}
    failed = [row for part in found.values() for row in part["failed"]]
    for row in failed:
        print(f"{row['problem']}: {row['kind']}: {row['label']}\n    {row['command']}\n    {row['message'][-300:]}",
              file=sys.stderr)  # fmt: skip
    if machine.SMOKE or asked.match:
        print(json.dumps(found, indent=2))
    else:  # a part keeps what others have found before
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        parts = {part: found.get(part, known.get(part)) for part in PARTS if part in found or part in known}
        machine.save("faults", parts)
        write_page(parts.values())
    sys.exit(machine.exit_code([not failed]))


if __name__ == "__main__":
    run_all()
