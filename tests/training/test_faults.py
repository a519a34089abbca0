"""Faults while training: weights that are not finite, disks that are full, damaged checkpoints; nothing is lost."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvar_core.errors import CheckpointError, ConfigError, MvarError, WriteError
from mvar_core.io.files import atomic_path
from mvar_core.training.checkpoints import checkpoints, latest_checkpoint, load_checkpoint
from mvar_core.training.tokenizer import train_tokenizer
from mvar_core.training.transformer import train_transformer


@pytest.fixture
def train(make_config, make_models, make_tokens):
    def run(out: Path, *settings: str, **options):
        config = make_config(*settings)
        transformer, tokenizer = make_models(config)
        result = train_transformer(transformer, tokenizer, make_tokens(config), config, out, **options)
        return result, transformer.state_dict()

    return run


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond this size fails, in C++ and Rust too, as it does where a disk or a quota is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def temporary(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("key", ["lr", "weight_decay", "grad_clip", "warmup", "end", "betas"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1"])
def test_numbers_that_cannot_be_are_refused_by_name(make_config, key, value):
    text = f"[{value}, 0.9]" if key == "betas" else value
    for section in ("train", "train_tokenizer", "train_tokenizer.adversarial"):
        with pytest.raises(ConfigError, match=rf"{section}.optimizer.{key}"):
            make_config(f"{section}.optimizer.{key}={text}")


@pytest.mark.parametrize("setting", ["steps=0", "steps=1.5", "epochs=.inf", "epochs=-1", "batch_size=0", "ema=1"])
def test_lengths_that_cannot_be_are_refused_by_name(make_config, setting):
    with pytest.raises(ConfigError, match=rf"train\.{setting.partition('=')[0]}"):
        make_config(f"train.{setting}")


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_weights_that_are_not_finite_are_never_saved(train, tmp_path, checkpoint_every):
    """The first step at a rate near float32's limit, or weights that something else has spoilt."""
    settings = ("train.optimizer.lr=1e38", "train.optimizer.lr_batch=null", "train.optimizer.warmup=0")
    with pytest.raises(MvarError, match=r"(not finite|in a row).*checkpoint.*lr"):
        train(tmp_path, *settings, f"train.checkpoint_every={checkpoint_every}")
    assert not (tmp_path / "transformer.safetensors").exists()
    for path in checkpoints(tmp_path):
        assert all(value.isfinite().all() for value in load_checkpoint(path).model.values())


def test_the_error_names_the_last_good_checkpoint(make_config, make_models, make_tokens, tmp_path):
    config = make_config("train.max_skipped=2")
    transformer, tokenizer = make_models(config)

    def spoil(report) -> None:
        if report.step == 6:
            with torch.no_grad():
                transformer.head.weight[0, 0] = float("nan")

    with pytest.raises(MvarError, match=r"2 steps in a row.*step 8 .*step-00000004\.pt"):
        train_transformer(transformer, tokenizer, make_tokens(config), config, tmp_path, on_step=spoil)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004.pt"]


@pytest.mark.parametrize("size", [0, 300, 20_000, 150_000, 400_000])
def test_a_full_disk_is_named_and_the_same_call_resumes_to_the_same_bits(train, tmp_path, size):
    """Whatever is written when no more fits: config.yaml, metrics, a checkpoint, the model."""
    _, expected = train(tmp_path / "whole")
    out = tmp_path / "run"
    with files_of_at_most(size), pytest.raises(WriteError, match=rf"{out}.*cannot be written.*run the same|Make room"):
        train(out)
    assert not temporary(out)
    for path in checkpoints(out):
        load_checkpoint(path)
    _, resumed = train(out)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size", [0, 100, 10_000])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_errors_of_other_writers_name_the_final_path(tmp_path, write, size):
    path = tmp_path / "weights"
    with files_of_at_most(size), pytest.raises(WriteError, match=str(path)) as found, atomic_path(path) as temporary:
        write({"w": torch.zeros(10_000)}, temporary)
    assert found.value.errno
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_in_a_checkpoint_is_found(train, tmp_path):
    train(tmp_path, "train.steps=4")
    path = latest_checkpoint(tmp_path)
    content = bytearray(path.read_bytes())
    weights = load_checkpoint(path).model["head.weight"].numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path.name}.*checksum.*--overwrite"):
        train(tmp_path, "train.steps=5")


def test_what_killed_writers_left_is_removed(train, tmp_path):
    for folder in ("", "checkpoints", "samples", "best"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".step-00000009.pt.abc.tmp").write_bytes(b"half")
    train(tmp_path, "train.steps=1", "train.checkpoint_every=5")
    assert not temporary(tmp_path)


def test_a_finished_run_says_so(train, tmp_path, caplog):
    caplog.set_level("INFO", logger="mvar")
    train(tmp_path, "train.steps=2")
    assert "finished" not in caplog.text
    result, _ = train(tmp_path, "train.steps=2")
    assert result.steps == 2
    assert f"{tmp_path} has finished its 2 steps already" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "4"},
        {"step": 10**30},
        {"settings": "[]"},
        {"settings": "{"},
        {"settings": 3},
        {"model": {}},
        {"model": 5},
        {"model": {"head.weight": torch.zeros(3)}},
        {"optimizer": {"head.weight": {"exp_avg": "text"}}},
        {"optimizer": {"nobody": {"step": torch.zeros(())}}},
        {"optimizer": []},
        {"average": {"head.weight": 1}},
        {"window": "text"},
        {"window": torch.zeros(7)},
        {"skipped": "many"},
        {"seconds": None},
        {"random": {"torch": "text"}},
        {"random": {"torch": torch.zeros(3, dtype=torch.uint8), "numpy": (), "python": ()}},
        {"objective": {"val_loss": "low"}},
        {"best_score": "good"},
        {"format": 99},
    ],
    ids=lambda changes: ",".join(f"{name}={value!r:.20}" for name, value in changes.items()),
)
def test_a_checkpoint_of_anything_else_is_refused_by_name(train, tmp_path, changes):
    train(tmp_path, "train.steps=4", "train.ema=0.9")
    path = latest_checkpoint(tmp_path)
    torch.save({**torch.load(path), **changes}, path)
    try:
        with pytest.raises(CheckpointError, match=path.name):
            train(tmp_path, "train.steps=5", "train.ema=0.9")
    finally:
        assert [found.name for found in checkpoints(tmp_path)] == [path.name]


def test_a_pipe_instead_of_a_checkpoint_is_refused_at_once(train, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints" / "step-00000004.pt")
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt.*regular file"):
        train(tmp_path)


DIVERGING = ("lr=1", "lr_batch=null", "warmup=0")


def diverging(section: str, *settings: str) -> list[str]:
    return [f"{section}.optimizer.{setting}" for setting in DIVERGING] + [
        f"{section}.{setting}" for setting in settings
    ]


@pytest.mark.parametrize("steps", [10, 60])
def test_a_training_that_diverges_fails_and_leaves_no_model(train, tmp_path, steps):
    """After 60 steps this one is back at the loss where it began, and has learned nothing."""
    settings = diverging("train", f"steps={steps}", "checkpoint_every=20")
    for _ in range(2):  # the same command again finds the run finished, and its weights are no better
        with pytest.raises(MvarError, match=rf"{tmp_path}.*--overwrite --set train\.optimizer\.lr=0\.1") as failure:
            train(tmp_path, *settings)
        assert "max_loss_ratio=0" in str(failure.value)
        assert not (tmp_path / "transformer.safetensors").exists()
        assert not (tmp_path / "config.json").exists()
    result, _ = train(tmp_path, *settings, "train.max_loss_ratio=0")
    assert result.steps == steps
    assert (tmp_path / "transformer.safetensors").exists()


def test_the_last_good_checkpoint_of_a_training_that_diverges_is_kept_as_a_model(train, tmp_path):
    settings = ("train.optimizer.schedule=constant", "train.optimizer.lr=0.005", "train.keep=1")
    train(tmp_path / "run", *settings, "train.steps=4")
    path = latest_checkpoint(tmp_path / "run")
    state = torch.load(path)
    # What the optimizer remembers is changed so that its next steps are far too large.
    for slots in state["optimizer"].values():
        slots["exp_avg_sq"].fill_(1e-12)
        slots["exp_avg"].fill_(1.0)
    torch.save(state, path)
    with pytest.raises(MvarError, match=r"best.*step 4") as failure:
        train(tmp_path / "run", *settings, "train.steps=20", "train.checkpoint_every=4")
    assert "diverged" in str(failure.value)
    kept = load_file(tmp_path / "run" / "best" / "transformer.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in state["model"].items() if name in kept)
    assert "step-00000004.pt" in [found.name for found in checkpoints(tmp_path / "run")]


def test_a_training_that_skips_most_steps_fails(make_config, make_models, make_tokens, tmp_path):
    config = make_config("train.steps=10")
    transformer, tokenizer = make_models(config)
    whole = transformer.head.weight[0, 0].item()

    def spoil_and_heal(report) -> None:
        with torch.no_grad():
            transformer.head.weight[0, 0] = whole if report.step in (4, 8, 10) else float("nan")

    with pytest.raises(MvarError, match=r"7 of 10 steps.*left out"):
        train_transformer(transformer, tokenizer, make_tokens(config), config, tmp_path, on_step=spoil_and_heal)
    assert not (tmp_path / "transformer.safetensors").exists()


def test_a_tokenizer_that_diverges_fails_and_leaves_no_model(make_config, make_models, make_images, tmp_path):
    config = make_config(*diverging("train_tokenizer", "steps=20", "checkpoint_every=20"))
    with pytest.raises(MvarError, match=rf"{tmp_path}.*--set train_tokenizer\.optimizer\.lr=0\.1"):
        train_tokenizer(make_models(config)[1], make_images(), config, tmp_path, validation=make_images(seed=1))
    assert not (tmp_path / "tokenizer.safetensors").exists()
    assert not (tmp_path / "best").exists()  # the only validation is that of ruined weights
