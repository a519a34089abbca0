"""The same command again, once its output is finished: exit 0, it says so, and no byte changes."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def commands(preset, model, tokens, images, classifier, golden_mvar, tmp_path) -> dict[str, list[Any]]:
    """A quick call of every command that writes, without --out, by a name of its own."""
    sampled = ["--checkpoint", model, "--device", "cpu"]
    image = next(images.rglob("*.png"))
    trained = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    official = [
        "--model", golden_mvar.model, "--tokenizer", golden_mvar.tokenizer, "--kind", "mvar",
        "--pyramid", ",".join(map(str, golden_mvar.spec["patch_nums"])), "--windows", golden_mvar.spec["k"],
    ]  # fmt: skip
    return {
        "train-tokenizer": ["train-tokenizer", "--preset", preset, "--data", images, *trained],
        "tokenize": ["tokenize", "--checkpoint", model, "--data", images, "--device", "cpu"],
        "train": ["train", "--preset", preset, "--tokens", tokens, "--checkpoint", model, *trained],
        "finetune-from-var": [
            "finetune-from-var", "--preset", preset, "--tokens", tokens, "--var-checkpoint", model, *trained
        ],
        "sample": ["sample", *sampled, "--class", "all", "--num", 2],
        "sample.npz": ["sample", *sampled, "--class", "0", "--num", 2],
        "sample.png": ["sample", *sampled, "--class", "0", "--num", 2, "--format", "grid"],
        "edit": ["edit", *sampled, "--image", image, "--box", "0,0,8,16"],
        "reference.npz": ["evaluate", "make-reference", "--data", images, "--features", classifier],
        "analyze-attention": ["analyze-attention", *sampled, "--tokens", tokens, "--num", 2],
        "convert": ["convert", *official],
        "convert-official": ["convert", "--model", model, "--to", "official"],
        "ablate": [
            "ablate", "--preset", preset, "--tokens", tokens, "--tokenizer", model, "--validation", tokens,
            "--prefixes", "none", "--windows", "whole", "--seeds", "4,", "--steps", 1, "--features", classifier,
            "--reference", images, "--device", "cpu",
        ],
    }  # fmt: skip


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {str(each): each.read_bytes() for each in files}


NAMES = (
    "train-tokenizer", "tokenize", "train", "finetune-from-var", "sample", "sample.npz", "sample.png", "edit",
    "reference.npz", "analyze-attention", "convert", "convert-official", "ablate",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_output_is_done(mvar, commands, tmp_path, name):
    command = [*commands[name], "--out", tmp_path / "out" / name]
    assert mvar(*command).code == 0
    before = content(tmp_path / "out" / name)
    again = mvar(*command)
    assert again.code == 0, again.err
    said = again.out + again.err
    assert any(word in said for word in ("finished", "complete", "Complete", "done")), said
    assert content(tmp_path / "out" / name) == before
    assert mvar(*command, "--json").json  # the same keys as the first time
