import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from mvar_core.errors import DataError
from mvar_core.io.files import (
    atomic_path,
    require_new_directory,
    sha256_of_file,
    write_json,
)
from mvar_core.untrusted import read_json


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert list(target.parent.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_json(target, {"a": 1})
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert read_json(target) == {"a": 1}


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("not json")
    with pytest.raises(DataError, match="not a JSON file"):
        read_json(tmp_path / "x")
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "y")
    with pytest.raises(DataError, match="is not empty.*--overwrite"):
        require_new_directory(tmp_path, overwrite=False)
    with pytest.raises(DataError, match="is a file"):
        require_new_directory(tmp_path / "x", overwrite=True)
    require_new_directory(tmp_path, overwrite=True)
    require_new_directory(tmp_path / "new", overwrite=False)


KILLED_WRITER = """
import os, pathlib, signal, sys
from mvar_core.io.files import atomic_path
with atomic_path(pathlib.Path(sys.argv[1]) / "one"), atomic_path(pathlib.Path(sys.argv[1]) / "file"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_goes_with_the_next_write(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_path(tmp_path / "other") as first, atomic_path(tmp_path / "file") as second:
        assert set(tmp_path.iterdir()) == {first, second}
        # Nobody removes what a writer that runs is at.
        with_another = (
            "import pathlib, sys; from mvar_core.io.files import *; write_text(pathlib.Path(sys.argv[1]), 'x')"
        )
        subprocess.run([sys.executable, "-c", with_another, str(tmp_path / "third")], check=True)
        assert set(tmp_path.iterdir()) == {first, second, tmp_path / "third"}
