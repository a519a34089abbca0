"""What a first image must not wait for: packages that sampling has no use for."""

import json
import subprocess
import sys

NEEDLESS = {
    "matplotlib",
    "natten",
    "pandas",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.onnx",
    "torch_fidelity",
    "torchvision",
    "triton",
}

PROGRAM = """
import json, sys
from mvar_cli.app import app
try:
    app(sys.argv[1:], prog_name="mvar")
except SystemExit as end:
    assert end.code == 0, end.code
print(json.dumps(sorted(sys.modules)))
"""


def test_sampling_imports_no_package_that_it_has_no_use_for(model, tmp_path):
    arguments = ["sample", "--checkpoint", model, "--class", "0", "--out", tmp_path / "out", "--attention", "auto"]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "torch" in imported
    assert not imported & NEEDLESS
    assert (tmp_path / "out" / "00000_0.png").is_file()
