"""Time from `mvar sample` to its first image, with files in the system's cache, for a model of the digits preset.

python benchmarks/startup.py [--runs 7] writes benchmarks/results/startup.json. Each run is a process of its own; the
whole command counts, its end included. For comparison: the bare interpreter, `import torch`, the command's imports.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

PROMISES = {"first_image": 4.0, "imports": 2.5}


def make_model(directory: Path) -> None:
    """A model of the digits preset with random weights."""
    from mvar_core.analysis.random_models import random_tokenizer, random_transformer
    from mvar_core.config.presets import load_config
    from mvar_core.models.directory import save_model

    config = load_config("digits").model
    vqvae, transformer = random_tokenizer(config), random_transformer(config)
    save_model(directory, config, tokenizer=vqvae.state_dict(), transformer=transformer.state_dict())


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1 if machine.SMOKE else 7)
    runs = parser.parse_args().runs
    imports = "import mvar_cli.app, mvar_cli.commands.sample, mvar_core.workflows.sample"
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        image = ["--checkpoint", f"{folder}/model", "--class", "3", "--out", f"{folder}/out.png", "--overwrite"]
        cases = {
            "interpreter": ["-c", "pass"],
            "torch": ["-c", "import torch"],
            "imports": ["-c", imports],
            "first_image": ["-m", "mvar_cli", "sample", *image, "--device", "cpu"],
        }
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for arguments in cases.values() if not machine.SMOKE else ():
            seconds(arguments)  # fills the system's cache
        for _ in range(runs):
            for name, arguments in cases.items():
                taken[name].append(seconds(arguments))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    worst = {name: max(times) for name, times in taken.items()}
    kept = {name: worst[name] <= bound for name, bound in PROMISES.items()}
    machine.save("startup", {"runs": runs, "promises": PROMISES, "kept": kept, "median": medians, "worst": worst})
    sys.exit(machine.exit_code(kept.values()))


if __name__ == "__main__":
    main()
