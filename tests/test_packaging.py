"""What a user gets who installs the wheel rather than a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mvar_core.config.presets import preset_names

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_code_templates_and_presets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert "mvar_core/reports/templates/attention.html.j2" in archive.namelist()
        top_level = {name.split("/")[0] for name in archive.namelist()}
    assert top_level == {"mvar_cli", "mvar_core", "mvar-0.1.0.dist-info"}
    entry_points = (tmp_path / "site" / "mvar-0.1.0.dist-info" / "entry_points.txt").read_text()
    assert "mvar = mvar_cli.__main__:main" in entry_points
    code = (
        "import mvar_core, mvar_core.config.presets as presets; print(mvar_core.__file__);"
        "print(','.join(presets.preset_names())); print(presets.load_config('mvar-d16-256').windows[-1])"
    )
    found = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert found[0].startswith(str(tmp_path / "site"))
    assert found[1].split(",") == preset_names()
    assert found[2] == "7"
