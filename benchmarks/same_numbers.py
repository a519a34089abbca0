"""Compare two checkouts of mvar bit for bit: token caches, weights, samples, scores, and old files opened by the new.

    python benchmarks/same_numbers.py OLD_CHECKOUT NEW_CHECKOUT [--smoke] [--out DIR]

Runs the same command lines in both checkouts, on a CPU in float32 with one thread, for three presets; prints a table
and exits with 1 where something differs. Only options that both checkouts understand are used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

PRESETS = ("digits", "digits-var", "digits-words")
STEPS = 20
VARYING = ("seconds", "cpu_seconds", "images_per_second", "peak_memory_bytes", "bytes_per_second", "machine")
"""Keys of --json that measure the run and not its result."""


class CommandError(Exception):
    """A command that did not exit with 0."""


class Checkout:
    """One checkout, and the folder where it writes.

    Args:
        root: The checkout.
        out: Its results.
    """

    def __init__(self, root: Path, out: Path):
        self.root = root
        self.out = out

    def mvar(self, *arguments: object) -> Any:
        """The JSON object that a command line prints.

        Raises:
            CommandError: It did not exit with 0.
        """
        command = [sys.executable, "-m", "mvar_cli", *map(str, arguments), "--json", "--device", "cpu"]
        environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        # Not in the checkout: python -m would put the current directory before PYTHONPATH.
        done = subprocess.run(command, cwd=self.out, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"{self.root}: mvar {' '.join(map(str, arguments))}: {done.stderr.strip()[-2000:]}")
        return json.loads(done.stdout)

    def tokenizer(self) -> None:
        """Train a tokenizer for a few steps."""
        settings = ["--set", f"train_tokenizer.steps={STEPS}", "--set", "train_tokenizer.batch_size=8"]
        self.mvar("train-tokenizer", "--preset", "digits", "--data", "digits", "--out", "tokenizer", *settings)

    def tokens(self, preset: str, tokenizer: Path) -> None:
        """Write a cache of the digits."""
        given = ["--preset", preset, "--checkpoint", tokenizer, "--data", "digits", "--set", "data.augmented_views=1"]
        self.mvar("tokenize", *given, "--out", f"tokens-{preset}")

    def train(self, preset: str, tokenizer: Path, tokens: Path, out: str, steps: int = STEPS) -> None:
        """Train a model for `steps` steps."""
        given = ["--preset", preset, "--tokens", tokens, "--checkpoint", tokenizer, "--out", out]
        settings = ["train.batch_size=8", "train.checkpoint_every=5", f"train.steps={steps}"]
        # A constant rate, so that the first steps are the same however many are to come.
        settings += ["train.optimizer.schedule=constant", "train.optimizer.warmup=0"]
        self.mvar("train", *given, *(word for setting in settings for word in ("--set", setting)))

    def sample(self, preset: str, model: Path) -> None:
        """Generate a few images, and keep their tokens."""
        what = ["--words", "three"] if preset == "digits-words" else ["--class", "0,3,7"]
        settings = ["--num", 2, "--cfg", 1.5, "--top-k", 30, "--top-p", 0.9, "--seed", 5]
        self.mvar("sample", "--checkpoint", model, *what, *settings, "--save-tokens", "--out", f"samples-{preset}.npz")

    def evaluate(self, preset: str, model: Path, classifier: Path | None) -> Any:
        """Scores of samples of a model."""
        given = ["--checkpoint", model, "--reference", "digits", "--num-samples", 40, "--batch-size", 20]
        return self.mvar("evaluate", *given, "--features", "demo")


ADDED = {"class_names"}
"""What files hold that did not before the redesign."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of entries that are missing on one side or whose values differ in a bit."""
    found = [f"{name} only in one" for name in old.keys() ^ new.keys() if name not in ADDED]
    for name in old.keys() & new.keys():
        one, other = old[name], new[name]
        if isinstance(one, torch.Tensor):
            same = one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        elif isinstance(one, np.ndarray):
            same = one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        else:
            same = one == other
        if not same:
            found.append(name)
    return sorted(found)


def weights(directory: Path) -> dict[str, Any]:
    """The tensors of a model directory."""
    return {
        f"{path.stem}.{name}": tensor.flatten()
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def arrays(path: Path) -> dict[str, Any]:
    """The arrays of an npz file."""
    with np.load(path) as file:
        return dict(file)


def shards(directory: Path) -> dict[str, Any]:
    """The files of a token cache that hold tokens, labels or vectors."""
    ends = (".npy", ".npz", ".bin", ".safetensors")
    return {path.name: path.read_bytes() for path in sorted(directory.rglob("*")) if path.suffix in ends}


def scores(values: dict[str, Any]) -> dict[str, Any]:
    """The figures of --json that are results, under the names that both checkouts have."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and name not in VARYING}


def compare(old: Checkout, new: Checkout, presets: tuple[str, ...], classifier: Path | None) -> list[tuple[str, str]]:
    """All comparisons as rows (what, outcome); an outcome other than "same" is a difference."""
    rows: list[tuple[str, str]] = []

    def check(what: str, run: Callable[[], list[str]]) -> None:
        try:
            differing = run()
        except (CommandError, FileNotFoundError) as error:
            differing = [str(error)]
        rows.append((what, "same" if not differing else f"DIFFERENT: {'; '.join(differing[:4])}"))
        print(f"{rows[-1][0]:<44} {rows[-1][1]}", flush=True)

    def both(run: Callable[[Checkout], Any], read: Callable[[Path], dict[str, Any]], name: str) -> list[str]:
        for checkout in (old, new):
            run(checkout)
        found = [read(checkout.out / name) for checkout in (old, new)]
        return differences(*found) if found[0] else [f"{name} holds nothing to compare"]

    # Each checkout reads what the old one wrote, so that a difference shows where it arises.
    tokenizer = old.out / "tokenizer"
    check("weights of the tokenizer", lambda: both(Checkout.tokenizer, weights, "tokenizer"))

    def preset_rows(preset: str) -> None:
        cache, run, half = old.out / f"tokens-{preset}", f"run-{preset}", f"half-{preset}"
        check(f"{preset}: token cache", lambda: both(lambda c: c.tokens(preset, tokenizer), shards, cache.name))
        train = f"{preset}: weights after {STEPS} steps (old cache)"
        check(train, lambda: both(lambda c: c.train(preset, tokenizer, cache, run), weights, run))
        samples = f"samples-{preset}.npz"
        check(f"{preset}: samples (old run)", lambda: both(lambda c: c.sample(preset, old.out / run), arrays, samples))

        def resumed() -> list[str]:
            old.train(preset, tokenizer, cache, half, STEPS // 2)
            shutil.copytree(old.out / half, new.out / half)
            return both(lambda c: c.train(preset, tokenizer, cache, half), weights, half)

        check(f"{preset}: an old run of {STEPS // 2} steps resumed", resumed)

        def scored() -> list[str]:
            return differences(*(scores(c.evaluate(preset, old.out / run, classifier)) for c in (old, new)))

        if classifier is not None:
            check(f"{preset}: scores (old run)", scored)

    for preset in presets:
        preset_rows(preset)
    return rows


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--smoke", action="store_true", help="the preset digits alone, without scores")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--classifier", type=Path, help="of the demo features; by default trained by the new checkout")
    parser.add_argument("--out", type=Path, help="an empty folder to keep what is written")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (given.out or Path(temporary)).resolve()
        old, new = (Checkout(root.resolve(), out / name) for name, root in (("old", given.old), ("new", given.new)))
        for checkout in (old, new):
            checkout.out.mkdir(parents=True)
        presets = PRESETS[:1] if given.smoke else tuple(given.presets.split(","))
        classifier = None if given.smoke else given.classifier or train_classifier(out / "classifier.safetensors")
        rows = compare(old, new, presets, classifier)
    different = sum(outcome != "same" for _, outcome in rows)
    print(f"{len(rows) - different} of {len(rows)} comparisons are the same to the bit.")
    return 1 if different else 0


def train_classifier(path: Path) -> Path:
    """A network for demo features, with random weights: the comparison needs the same one twice, not a good one."""
    from mvar_core.evaluation.demo import DemoClassifier

    network = DemoClassifier(10, (32, 32))
    network.initialise(torch.Generator().manual_seed(0))
    network.save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
