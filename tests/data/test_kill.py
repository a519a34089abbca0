"""A token cache whose writing is killed: at every moment between two operations on files, and in the midst of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
import json, os, random, signal, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
from test_tokens import HASH, MeanTokenizer, TokenCache, contents, small_config
from mvar_core.config.training import DataConfig
from mvar_core.data.images import open_images
from mvar_core.data.tokens import MANIFEST, Shard, find_problem
from mvar_core.data.token_writer import CacheWriter

folder, pictures = Path({folder!r}), {pictures!r}


def write(out, ranks=1, pause=0.0):
    config = small_config()
    tokenizer = MeanTokenizer(config)

    def encode(images):
        time.sleep(pause)
        return tokenizer(images)

    settings = dict(config=config, tokenizer_hash=HASH, data=DataConfig(flip=True), batch_size=2, images_per_shard=3)
    writers = [
        CacheWriter(out, open_images(pictures), encode, **settings, rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]
    work = writers[0].prepare()
    for writer in writers:
        writer.accept(*work)
    for writer in writers:
        writer.check()
        writer.write()
    writers[0].finish()


def child(act, kill_after=None):
    """Run `act` in a process of its own; returns how it ended."""
    process = os.fork()
    if process == 0:
        try:
            act()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def write_until(out, moment):
    """Write, and die just before the operation on the cache's files that has this number."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir") and str(out) in str(arguments[0]):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    write(out)


def check_and_resume(out, whole, ranks):
    """Nothing under a final name is partial, and the same call completes the cache."""
    for path in out.glob("[!.]*") if out.exists() else ():
        if path.name.startswith(("tokens", "labels", "names")):
            assert path.read_bytes() == whole[path.name], path
        if path.name.startswith("shard"):
            assert find_problem(Shard.read(path).files, out, verify=True) is None
        if path.name == MANIFEST:
            TokenCache.open(out, verify=True)
    assert child(lambda: write(out, ranks)) == 0
    assert contents(out) == whole, out


child(lambda: write(folder / "whole"))
whole = contents(folder / "whole")
moment, killed = 0, 0
while True:
    out = folder / f"moment-{{moment}}"
    if child(lambda: write_until(out, moment)) == 0:
        break
    check_and_resume(out, whole, ranks=1 + moment % 2)
    killed += 1
    moment += {stride}
random_kills = 0
out = folder / "random"
for seed in range(3):
    random_kills += child(lambda: write(out, pause=0.05), kill_after=0.05 + 0.2 * random.Random(seed).random()) == -9
check_and_resume(out, whole, ranks=1)
print(json.dumps({{"moments": killed, "random": random_kills, "files": sorted(whole)}}))
'''


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cache_killed_at_any_moment_is_completed_to_the_same_bytes(tmp_path, class_folders, stride):
    tests = str(Path(__file__).parent)
    program = PROGRAM.format(tests=tests, folder=str(tmp_path), pictures=str(class_folders), stride=stride)
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["random"] == 3
    assert result["moments"] >= 90 // stride  # three shards of three files and a receipt: made, written and renamed
    kinds = [f"{kind}-{number:05d}" for kind in ("labels", "names", "tokens") for number in range(3)]
    assert [name.partition(".")[0] for name in result["files"]] == sorted([*kinds, "manifest"])
