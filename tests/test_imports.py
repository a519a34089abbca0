"""Imports point one way through the rooms, and importing does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def rooms_of_the_document() -> list[tuple[str, ...]]:
    """The rows of the table of rooms in docs/architecture.md, top to bottom."""
    section = (
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [tuple(re.findall(r"`(\w+)`", row)) for row in rows]


FLOORS = rooms_of_the_document()
MAY_IMPORT = {
    room: {below for rooms in FLOORS[:number] for below in rooms}
    for number, floor in enumerate(FLOORS)
    for room in floor
}
FILES = sorted((ROOT / "mvar_core").rglob("*.py"))


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        rooms |= {module.split(".")[1] for module in modules if module.startswith("mvar_core.")}
        assert not any(module.startswith("mvar_cli") for module in modules), path
    return rooms


def test_the_document_lists_every_room() -> None:
    found = {
        path.stem for path in (ROOT / "mvar_core").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(room for floor in FLOORS for room in floor) == sorted(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "mvar_core").parts[0].removesuffix(".py")
    assert imported_rooms(path) - {room, "__version__"} <= MAY_IMPORT[room]


def test_every_module_has_one_purpose_line_() -> None:
    for path in [*FILES, *(ROOT / "mvar_cli").rglob("*.py")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path


def test_importing_loads_no_optional_library() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
    ]  # fmt: skip
    heavy = ["torch_fidelity", "torchvision", "natten", "matplotlib", "sklearn"]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}];"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_the_document_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+/[\w/.]*)`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "mvar_core")), name
