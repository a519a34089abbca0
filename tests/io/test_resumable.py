"""One process writes in a directory at a time, and what it held does not stay behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvar_core.errors import DataError
from mvar_core.io.files import LOCK_FILE, require_new_directory
from mvar_core.io.resumable import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from mvar_core.io.resumable import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_writer_is_told_who_is_first_and_a_killed_one_blocks_nobody(tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(DataError, match=rf"Process {first.pid} on .* is at work in .*out.*--out"):
            DirectoryLock(out).acquire()
    finally:
        first.kill()
        first.communicate()
    require_new_directory(out, overwrite=False)  # the lock that is left does not count
    with DirectoryLock(out) as lock:
        lock.acquire()  # its own
        assert str(os.getpid()) in (out / LOCK_FILE).read_text()
        (out / "result").write_text("done")
    assert [path.name for path in out.iterdir()] == ["result"]


def test_nothing_stays_behind(tmp_path):
    with DirectoryLock(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a/b").exists()
    (tmp_path / "file").write_text("x")
    with DirectoryLock(tmp_path / "file/below"):  # cannot be: the writer's own error will say so
        pass


def test_a_full_disk_is_not_taken_for_one_without_locks(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        DirectoryLock(tmp_path / "out").acquire()
