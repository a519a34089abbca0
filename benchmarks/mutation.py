"""Small faults, one at a time, and whether the tests of the module notice: the strength of the tests, not of the code.

    python benchmarks/mutation.py [--only 3,17] [--jobs 2]

Each fault replaces one line of `mvar_core`, found by its text, in a temporary copy of the tree; the quick tests of the
folder that belongs to the file then run until the first failure. A fault that survives asks for a test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
"""Longest time that the tests of a fault may take; a fault that makes them hang is caught."""


@dataclass(frozen=True)
class Fault:
    """One changed line.

    Attributes:
        line: Text that stands in exactly one line of `mvar_core`.
        instead: What replaces the text.
        file: The line's file relative to `mvar_core`, where several have the text.
    """

    line: str
    instead: str
    file: str = ""


FAULTS = (
    Fault(
        "return min(max(position - window // 2, 0), side - window)",
        "return min(max(position - window // 2, 0), side - window - 1)",
    ),
    Fault(
        'return 0 if scale_prefixes == "all" else max(0, scale - scale_prefixes + 1)',
        'return 0 if scale_prefixes == "all" else max(0, scale - scale_prefixes)',
    ),
    Fault("return self.prefix_tokens + self.window_grid.tokens", "return self.prefix_tokens + self.grid.tokens"),
    Fault("return self.window_grid != self.grid", "return self.window_grid == self.grid"),
    Fault("(2 * side * axis + published[-1]) // (2 * published[-1])", "(2 * side * axis) // (2 * published[-1])"),
    Fault(
        "return scale / (self.num_scales - 1) if self.num_scales > 1",
        "return scale / self.num_scales if self.num_scales > 1",
    ),
    Fault("own_NN, (pattern.prefix_tokens, 0), value=True", "own_NN, (pattern.prefix_tokens, 0), value=False"),
    Fault(
        "return (positions >= starts) & (positions < starts + window)",
        "return (positions >= starts) & (positions <= starts + window)",
    ),
    Fault("torch.baddbmm(bias_qk, q_gqD, k_gkD.mT, alpha=scale)", "torch.baddbmm(bias_qk, q_gqD, k_gkD.mT)"),
    Fault("ds_gqk = ds_gqk.mul_(ctx.scale).to(q_gqD.dtype)", "ds_gqk = ds_gqk.to(q_gqD.dtype)"),
    Fault("dk_GKD[part, keys] += ds_gqk.mT @ q_gqD", "dk_GKD[part, keys] = ds_gqk.mT @ q_gqD"),
    Fault("window_start(bottom - 1, height, window) + window", "window_start(bottom - 1, height, window) + window - 1"),
    Fault("if pattern.window_grid.tokens == 1:", "if pattern.window_grid.tokens == 0:"),
    Fault("return (key < prefix) | inside", "return inside"),
    Fault(
        "top = (query // width - window_height // 2).clamp(0, height - window_height)",
        "top = (query // width - window_height // 2).clamp(0)",
    ),
    Fault(
        "halo_rows = max(ends) + window_height - first_key_row",
        "halo_rows = max(ends) + window_height - first_key_row - 1",
    ),
    Fault("(y >= rows) & (y < rows + window.height)", "(y >= rows) & (y <= rows + window.height)"),
    Fault("MAX_LOG_HEAD_SCALE = math.log(100)", "MAX_LOG_HEAD_SCALE = math.log(10)"),
    Fault(
        "self.softmax_scale = 0.25 / math.sqrt(config.head_dim)", "self.softmax_scale = 1 / math.sqrt(config.head_dim)"
    ),
    Fault("return x_BLC + branch_BLC * gate_B1C", "return x_BLC + branch_BLC"),
    Fault(
        "return gate_B1C * kept_B.to(gate_B1C).view(-1, 1, 1) / keep",
        "return gate_B1C * kept_B.to(gate_B1C).view(-1, 1, 1)",
    ),
    Fault(
        "self.drop_path = config.drop_path * layer / (config.depth - 1)",
        "self.drop_path = config.drop_path * layer / config.depth",
    ),
    Fault(
        "dx = torch.addcmul(gradient, directions, along_bLH1, value=-1).div_(lengths_bLH1)",
        "dx = torch.addcmul(gradient, directions, along_bLH1, value=1).div_(lengths_bLH1)",
    ),
    Fault("total_BLHD[:, start:stop] += gradient", "total_BLHD[:, start:stop] = gradient"),
    Fault(
        "torch.lerp(unconditional_BLC, conditional_BLC, 1 + guidance)",
        "torch.lerp(unconditional_BLC, conditional_BLC, guidance)",
    ),
    Fault("cache.drop_before(self.first_visible[scale + 1])", "cache.drop_before(self.first_visible[scale + 1] + 1)"),
    Fault("while (first := self.first_visible[scale]) < scale:", "if (first := self.first_visible[scale]) < scale:"),
    Fault(
        "return x_BZhw * (1 - self.ratio) + refined * self.ratio",
        "return x_BZhw * self.ratio + refined * (1 - self.ratio)",
    ),
    Fault("rest_BZhw = rest_BZhw - self.increment(self.embed(tokens_Bl), scale)", "rest_BZhw = rest_BZhw"),
    Fault("F.pad(x_BCHW, (0, 1, 0, 1))", "F.pad(x_BCHW, (1, 0, 1, 0))"),
    Fault(
        'size=tuple(grid), mode="bicubic", align_corners=False',
        'size=tuple(grid), mode="bilinear", align_corners=False',
        "models/quantizer.py",
    ),
    Fault(
        "strengths = [settings.cfg * ratio for ratio in ratios]",
        "strengths = [settings.cfg for ratio in ratios]",
    ),
    Fault(
        "strength if first_guided <= scale <= last_guided else 0.0",
        "strength if first_guided <= scale < last_guided else 0.0",
    ),
    Fault(
        "return (1 + strength) * conditional_BlV - strength * unconditional_BlV",
        "return conditional_BlV - strength * unconditional_BlV",
    ),
    Fault(
        "masked_fill(logits_BlV < smallest_kept, -torch.inf)", "masked_fill(logits_BlV <= smallest_kept, -torch.inf)"
    ),
    Fault("cumsum(dim=-1) <= 1 - top_p", "cumsum(dim=-1) <= top_p"),
    Fault("dropped[..., -1] = False", "dropped[..., 0] = False"),
    Fault(
        "return torch.searchsorted(cumulative_Blk, targets_Bl1, right=True).squeeze(-1)",
        "return torch.searchsorted(cumulative_Blk, targets_Bl1).squeeze(-1)",
    ),
    Fault("temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)", "temperature = max(0.27 * (1 - 0.05 * ratio), 0.005)"),
    Fault("needed[seen] = True", "needed[seen] = False"),
    Fault("return area_yx >= coverage * height * width", "return area_yx > coverage * height * width"),
    Fault(
        "return torch.where(pixels.unsqueeze(-1), given_NHWC, images_NHWC)",
        "return torch.where(pixels.unsqueeze(-1), images_NHWC, given_NHWC)",
    ),
    Fault("(1 - config.warmup_start) * step / warmup", "step / warmup"),
    Fault(
        "factor = config.end + (1 - config.end) * (1 - passed) / (1 - _CONSTANT_SHARE)",
        "factor = config.end + (1 - config.end) * (1 - passed)",
    ),
    Fault(
        "factor = config.end + (1 - config.end) * (0.5 + 0.5 * math.cos(math.pi * passed))",
        "factor = config.end + (1 - config.end) * math.cos(math.pi * passed)",
    ),
    Fault(
        'spared = parameter.ndim <= 1 or name.endswith("bias") or name in no_decay',
        'spared = parameter.ndim <= 1 or name.endswith("bias")',
    ),
    Fault("losses.append(-(1 - label_smoothing) * true_n", "losses.append(-true_n"),
    Fault("self.weights_L = (weights_L / weights_L.mean()).float()", "self.weights_L = weights_L.float()"),
    Fault(
        "return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())",
        "return 0.5 * (F.relu(1 - real).mean() + F.relu(fake).mean())",
    ),
    Fault(
        "weight = weight * (norms[0] / (norms[1] + _EPSILON))", "weight = weight * (norms[1] / (norms[0] + _EPSILON))"
    ),
    Fault("moments[name][dead] = 0", "moments[name][dead] = moments[name][dead]"),
    Fault("sigma=total[2] / (self.count - 1)", "sigma=total[2] / self.count"),
    Fault("np.outer(delta, delta) * (merged * count / total)", "np.outer(delta, delta) * (count / total)"),
    Fault("return (1 if num_samples == num_reference == size else KID_SUBSETS), size", "return KID_SUBSETS, size"),
    Fault('"shuffle": True', '"shuffle": False'),
    Fault('check_whole("neighbourhood", neighbourhood, 1) + 1', 'check_whole("neighbourhood", neighbourhood, 1)'),
    Fault("content.seek(offset)", "content.seek(0)"),
    Fault('suffix, key = suffix.lower(), "/".join((*parts[:-1], stem))', "suffix, key = suffix.lower(), stem"),
    Fault(
        "return (rows, columns), ((rows - height) // 2, (columns - width) // 2)",
        "return (rows, columns), ((rows - height) // 2, (columns - width + 1) // 2)",
    ),
    Fault("image_index, view)).random(4) * 2 - 1", "image_index)).random(4) * 2 - 1"),
    Fault("*(index[here] for index in within))]", "*(0 * index[here] for index in within))]"),
)


def locate(fault: Fault, tree: Path) -> tuple[Path, int]:
    """The file and the line's number, from 0.

    Raises:
        LookupError: No line of mvar_core has the text, or several.
    """
    core = tree / "mvar_core"
    found = [
        (path, number)
        for path in sorted(core.rglob("*.py"))
        if not fault.file or path.relative_to(core).as_posix() == fault.file
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines())
        if fault.line in line
    ]
    if len(found) != 1:
        where = ", ".join(f"{path.relative_to(tree)}:{number + 1}" for path, number in found) or "nowhere"
        raise LookupError(f"{fault.line!r} stands in {where}; expected exactly one line")
    return found[0]


def tests_of(path: Path, tree: Path) -> list[str]:
    """The tests that should notice a fault in a file: those of its room, or of a module next to the rooms."""
    parts = path.relative_to(tree / "mvar_core").with_suffix("").parts
    if len(parts) > 1:
        return [f"tests/{parts[0]}"]
    return [f"tests/test_{parts[0]}.py"]


def run(number: int) -> tuple[int, str, str]:
    """The fault's number, its place, and caught, survived or the reason why it could not be tried."""
    fault = FAULTS[number]
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary)
        for name in ("mvar_core", "mvar_cli", "presets", "tests", "docs", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, tree / path.name)
        try:
            path, position = locate(fault, tree)
        except LookupError as error:
            return number, "", str(error)
        lines = path.read_text(encoding="utf-8").split("\n")
        lines[position] = lines[position].replace(fault.line, fault.instead)
        path.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, *tests_of(path, tree)],
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return number, f"{path.relative_to(tree)}:{position + 1}", "caught (no end)"
    outcomes = {0: "SURVIVED", 1: "caught", 2: "caught"}  # 2: the tests cannot even be collected
    return number, f"{path.relative_to(tree)}:{position + 1}", outcomes.get(done.returncode, done.stdout[-300:])


def main() -> int:
    """Try the faults and print what became of them; 1 where one survived or could not be placed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="numbers from the list, as in 3,17")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--locate", action="store_true", help="only find the lines")
    given = parser.parse_args()
    numbers = [int(number) for number in given.only.split(",")] if given.only else list(range(len(FAULTS)))
    if given.locate:
        lost = 0
        for number in numbers:
            try:
                path, position = locate(FAULTS[number], ROOT)
                print(f"{number:>3}  {path.relative_to(ROOT)}:{position + 1}")
            except LookupError as error:
                lost += 1
                print(f"{number:>3}  {error}")
        return 1 if lost else 0
    caught = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for number, place, outcome in pool.map(run, numbers):
            caught += outcome.startswith("caught")
            print(f"{number:>3}  {outcome:<10} {place}  {FAULTS[number].instead.strip()}", flush=True)
    print(f"{caught} of {len(numbers)} faults were caught.")
    return 0 if caught == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
