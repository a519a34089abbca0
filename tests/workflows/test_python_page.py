"""The code of docs/python.md runs as it stands, with fewer steps."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_runs(monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks[0].splitlines()) < 40
    code = re.sub(r"steps=\d+", "steps=2", "\n".join(blocks))
    code = re.sub(r"num=\d+", "num=1", code)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert tuple(names["images"].shape) == (3, 3, 32, 32)
