"""How far the loss curves of two processes lie from that of one: DDP and FSDP2, 50 steps, equal batches, on a CPU.

    python benchmarks/distributed.py [--smoke]

Also whether a run that changes its number of processes continues as if it had not. Writes results/distributed.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

JOB = Path(__file__).parents[1] / "tests" / "training" / "distributed_job.py"
STEPS = 4 if machine.SMOKE else 50
SETTINGS = (
    "train.ema=0.9", "train.log_every=1", f"train.checkpoint_every={STEPS // 2}", "train.optimizer.lr=0.02",
    "transformer.gate_init=1.0", "transformer.depth=4", "transformer.embed_dim=64", "train.batch_size=12",
    f"train.steps={STEPS}",
)  # fmt: skip
ALLOWED = 1e-4


def run(tasks: list[dict[str, Any]], folder: Path, processes: int) -> None:
    path = folder / "tasks.json"
    path.write_text(json.dumps(tasks))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([sys.executable, *(launcher if processes > 1 else []), str(JOB), str(path)], check=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def task(run_name: str, **more: Any) -> dict[str, Any]:
            losses = folder / f"{run_name}-{'part' if 'interrupt' in more else 'end'}.json"
            return {"out": str(folder / run_name), "losses": str(losses), "settings": SETTINGS, **more}

        def curve(run_name: str) -> list[float]:
            parts = [folder / f"{run_name}-{part}.json" for part in ("part", "end")]
            return [loss for path in parts if path.exists() for loss in json.loads(path.read_text())["losses"].values()]

        half = [0, STEPS // 2]
        run([task("one"), task("1 to 2, DDP", interrupt=half), task("1 to 2, FSDP", interrupt=half)], folder, 1)
        run(
            [
                task("DDP"),
                task("FSDP", fsdp=True),
                task("1 to 2, DDP"),
                task("1 to 2, FSDP", fsdp=True),
                task("2 to 1, DDP", interrupt=half),
                task("2 to 1, FSDP", interrupt=half, fsdp=True),
                task("FSDP to DDP", interrupt=half, fsdp=True),
                task("FSDP to DDP"),
            ],
            folder,
            2,
        )
        run([task("2 to 1, DDP"), task("2 to 1, FSDP")], folder, 1)
        expected = curve("one")
        names = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.name != "one"]
        rows = []
        for run_name in names:
            found = curve(run_name)
            assert len(found) == STEPS, (run_name, len(found))
            differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
            rows.append({"run": run_name, "largest_difference": max(differences), "last_difference": differences[-1]})
    met = all(row["largest_difference"] < ALLOWED for row in rows)
    machine.save(
        "distributed",
        {
            "what": f"losses of each step against one process, equal batch of 12; {STEPS} steps, a change half-way",
            "first_loss": expected[0],
            "last_loss": expected[-1],
            "allowed": ALLOWED,
            "met": met,
            "rows": rows,
        },
    )
    return machine.exit_code([met])


if __name__ == "__main__":
    machine.parse_no_options(__doc__)
    sys.exit(main())
