"""The two ablations on the bundled digits, over three seeds, by one command; and their place in docs/ablations.md.

python benchmarks/ablation.py [--out runs/ablation] runs `mvar ablate` (what is there already is not made again), writes
benchmarks/results/ablation.json and docs/images/ablation.png and .svg, and puts the tables into docs/ablations.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ablations.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
PROMISED_MINUTES = 60
COMMAND = (
    "ablate", "--preset", "digits", "--data", "digits", "--windows", "3,5,7,9,whole", "--windows", "0,0,3,3", "--seeds",
    "3",
)  # fmt: skip


def embed(page: str, tables: str) -> str:
    """The page with the tables between its marks, and the picture where the docs have it."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables.strip().replace('](ablation.png)', '](images/ablation.png)')}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    out = parser.parse_args().out
    fresh = not out.exists()
    start = time.monotonic()
    command = [sys.executable, "-m", "mvar_cli", *COMMAND, "--out", str(out), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    minutes = (time.monotonic() - start) / 60
    # A run that was stopped and resumed has no time of its own as a whole.
    found["minutes"] = minutes if fresh else None
    found["promised_minutes"] = PROMISED_MINUTES
    for name in ("outputs", "seconds", "machine"):  # the machine is described again, with the commit
        del found[name]
    machine.save("ablation", found)
    for name in ("ablation.png", "ablation.svg"):
        shutil.copy(out / name, ROOT / "docs" / "images" / name)
    took = f"\n\nThe whole command took {minutes:.0f} minutes.\n" if fresh else ""
    PAGE.write_text(embed(PAGE.read_text(), (out / "ablation.md").read_text().rstrip() + took))
    print(f"{minutes:.1f} minutes; tables are in {PAGE}", file=sys.stderr)
    sys.exit(0 if minutes <= PROMISED_MINUTES else 1)


if __name__ == "__main__":
    main()
