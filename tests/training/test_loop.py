from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mvar_core.config import RunConfig
from mvar_core.config.section import validate
from mvar_core.errors import CheckpointError, DataError, MvarError
from mvar_core.models.directory import load_transformer, read_model_config
from mvar_core.training.checkpoints import checkpoints, latest_checkpoint, load_checkpoint
from mvar_core.training.metrics import read_metrics
from mvar_core.training.trainer import batch_rows
from mvar_core.training.transformer import train_transformer

FAST = ("train.steps=60", "train.checkpoint_every=30", "train.optimizer.lr=0.05", "transformer.gate_init=1.0")


@pytest.fixture
def train(make_config, make_models, make_tokens):
    """Train the tiny model; returns result and weights."""

    def run(out: Path, *settings: str, tokens=None, prepare=None, other_codebook=False, **options):
        config = make_config(*settings)
        transformer, tokenizer = make_models(config)
        if other_codebook:
            torch.nn.init.zeros_(tokenizer.quantizer.codebook)
        if prepare is not None:
            prepare(transformer)
        result = train_transformer(
            transformer,
            tokenizer,
            tokens or make_tokens(config),
            config,
            out,
            **options,
        )
        return result, transformer.state_dict()

    return run


def stop_after(step: int, error: type[BaseException]):
    def on_step(report) -> None:
        if report.step == step:
            raise error

    return on_step


def measures(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    clocked = {"images_per_second", "tokens_per_second", "peak_memory_bytes"}
    return [
        {key: value for key, value in line.items() if key not in clocked}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_loss_falls_and_the_run_directory_is_a_model_directory(train, tmp_path):
    result, weights = train(tmp_path, *FAST, provenance={"data": "fake"})
    lines = measures(tmp_path)
    assert [line["step"] for line in lines] == list(range(4, 61, 4))
    assert lines[0]["loss"] > 2.5  # ln 16 = 2.77 before training
    assert result.loss == pytest.approx(lines[-1]["loss"], rel=1e-5)
    assert result.loss < 2.0
    assert (result.steps, result.interrupted, result.skipped) == (60, False, 0)
    assert lines[-1]["scale_loss"][0] < lines[0]["scale_loss"][0]
    assert lines[-1]["scale_accuracy"][2] > lines[0]["scale_accuracy"][2]
    assert len(checkpoints(tmp_path)) == 2
    config = read_model_config(tmp_path)
    assert config.provenance["training_steps"] == 60
    assert config.provenance["data"] == "fake"
    assert_same(load_transformer(tmp_path, config, "cpu", torch.float32).state_dict(), weights)


def test_config_yaml_is_the_whole_configuration(train, make_config, tmp_path):
    train(tmp_path, "train.steps=1")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert validate(RunConfig, written, "config.yaml") == make_config("train.steps=1")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train, tmp_path, step, error):
    _, expected = train(tmp_path / "whole")
    parts = tmp_path / "parts"
    if error is KeyboardInterrupt:
        result, _ = train(parts, on_step=stop_after(step, error))
        assert (result.steps, result.interrupted) == (step, True)
        assert latest_checkpoint(parts).name == f"step-{step:08d}.pt"
        assert not (parts / "transformer.safetensors").exists()
    else:  # a crash: the run falls back to the last checkpoint, if it has one
        with pytest.raises(error):
            train(parts, on_step=stop_after(step, error))
    result, resumed = train(parts)
    assert (result.steps, result.interrupted) == (10, False)
    assert_same(resumed, expected)
    assert measures(parts) == measures(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tiny_training import FakeTokens, make_config, make_models
from mvar_core.training.transformer import train_transformer
torch.set_num_threads(1)
def kill(report):
    if report.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
config = make_config()
train_transformer(*make_models(config), FakeTokens(config), config, Path(sys.argv[1]), on_step=kill)
"""


def test_a_killed_run_resumes_to_the_same_bits(train, tmp_path):
    _, expected = train(tmp_path / "whole")
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert latest_checkpoint(tmp_path / "parts").name == "step-00000004.pt"
    _, resumed = train(tmp_path / "parts")
    assert_same(resumed, expected)
    assert measures(tmp_path / "parts") == measures(tmp_path / "whole")


def test_ctrl_c_finishes_the_step_and_saves(train, tmp_path):
    def press(report) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGINT)

    result, _ = train(tmp_path, on_step=press)
    assert (result.steps, result.interrupted) == (3, True)
    assert latest_checkpoint(tmp_path).name == "step-00000003.pt"


def test_sigterm_saves_and_stops(train, tmp_path):
    def terminate(report) -> None:
        if report.step == 3:
            signal.raise_signal(signal.SIGTERM)

    result, _ = train(tmp_path / "parts", on_step=terminate)
    assert (result.steps, result.interrupted) == (3, True)
    _, resumed = train(tmp_path / "parts")
    assert_same(resumed, train(tmp_path / "whole")[1])


EVERYTHING = ("train.ema=0.9", "train.accumulate=3", "train.keep=1", "train.checkpoint_every=2", "train.log_every=1")


@pytest.mark.parametrize("step", [3, 5, 9])
def test_averages_and_the_best_checkpoint_survive_a_crash(train, make_config, make_tokens, tmp_path, step):
    held_out = make_tokens(make_config(), rows=9, seed=1)
    whole, expected = train(tmp_path / "whole", *EVERYTHING, validation=held_out)
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError):
        train(parts, *EVERYTHING, validation=held_out, on_step=stop_after(step, RuntimeError))
    result, resumed = train(parts, *EVERYTHING, validation=held_out)
    assert_same(resumed, expected)
    assert measures(parts) == measures(tmp_path / "whole")
    assert (result.best_step, result.val_loss) == (whole.best_step, whole.val_loss)
    first, second = (load_checkpoint(latest_checkpoint(out)) for out in (parts, tmp_path / "whole"))
    assert_same(first.model, second.model)
    assert_same(first.average, second.average)
    assert not torch.equal(first.model["head.weight"], first.average["head.weight"])


def test_the_model_directory_has_the_average_and_validation_measures_it(
    train, make_config, make_models, make_tokens, tmp_path
):
    held_out = make_tokens(make_config(), rows=9, seed=1)
    _, weights = train(tmp_path, *EVERYTHING, validation=held_out)
    state = load_checkpoint(latest_checkpoint(tmp_path))
    assert_same({name: weights[name] for name in state.average}, state.average)
    config = read_model_config(tmp_path)
    assert_same(load_transformer(tmp_path, config).state_dict(), weights)
    transformer, tokenizer = make_models(make_config())
    transformer.load_state_dict(weights)
    tokens, labels = held_out.batch(np.arange(9))
    with torch.no_grad():
        logits = transformer.eval()(labels, tokenizer.quantizer.teacher_forcing_inputs(tokens))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert measures(tmp_path)[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_best_validation_has_a_model_directory_of_its_own(train, make_config, make_tokens, tmp_path):
    held_out = make_tokens(make_config(), rows=9, seed=1)
    settings = (
        "train.checkpoint_every=2",
        "train.keep=1",
        "train.optimizer.lr=40",
        "train.max_loss_ratio=0",
    )  # diverges after a while
    result, _ = train(tmp_path, *settings, validation=held_out)
    losses = {line["step"]: line["val_loss"] for line in measures(tmp_path) if "val_loss" in line}
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.best_step < 10
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{result.best_step:08d}.pt", "step-00000010.pt"]
    best = read_model_config(tmp_path / "best")
    assert best.provenance["training_steps"] == result.best_step
    state = load_checkpoint(checkpoints(tmp_path)[0])
    assert_same(load_transformer(tmp_path / "best", best).state_dict(), state.model)
    train(tmp_path, "train.steps=1", resume=False)
    assert not (tmp_path / "best").exists()


def test_pictures_are_made_with_the_averaged_weights_and_change_nothing(train, tmp_path):
    seen: dict[int, torch.Tensor] = {}
    models = []

    def on_sample(step: int) -> None:
        assert not models[0].training
        assert not torch.is_grad_enabled()
        seen[step] = models[0].head.weight.detach().clone()
        torch.rand(3)

    settings = ("train.ema=0.9", "train.sample_every=4")
    _, expected = train(tmp_path / "without", *settings)
    _, weights = train(tmp_path / "with", *settings, on_sample=on_sample, prepare=models.append)
    assert sorted(seen) == [4, 8, 10]
    assert_same(weights, expected)
    assert torch.equal(seen[10], weights["head.weight"])
    assert not torch.equal(seen[8], seen[10])


def test_global_random_generators_continue_where_they_stopped(train, make_config, make_tokens, tmp_path):
    class Noisy(make_tokens):
        """Data that uses the global generators."""

        def batch(self, rows):
            tokens, labels = super().batch(rows)
            shift = int(torch.randint(4, ()) + np.random.randint(4) + random.randrange(4))
            return (tokens + shift) % 16, labels

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    _, expected = train(tmp_path / "whole", tokens=Noisy(make_config()))
    seed()
    with pytest.raises(RuntimeError):
        train(tmp_path / "parts", tokens=Noisy(make_config()), on_step=stop_after(6, RuntimeError))
    _, resumed = train(tmp_path / "parts", tokens=Noisy(make_config()))
    assert_same(resumed, expected)


def test_a_finished_run_does_nothing_more(train, tmp_path):
    first, weights = train(tmp_path)
    before = measures(tmp_path)
    again, same = train(tmp_path, on_step=stop_after(1, AssertionError))
    assert (again.steps, again.loss) == (first.steps, first.loss)
    assert_same(same, weights)
    assert measures(tmp_path) == before


def test_a_run_can_be_extended_and_started_over(train, tmp_path):
    train(tmp_path)
    longer, _ = train(tmp_path, "train.steps=12")
    assert longer.steps == 12
    steps: list[int] = []
    train(tmp_path, "train.steps=3", resume=False, on_step=lambda report: steps.append(report.step))
    assert steps == [1, 2, 3]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003.pt"]


def test_a_checkpoint_of_other_settings_is_refused(train, make_tokens, make_config, tmp_path):
    train(tmp_path, "train.steps=4")
    with pytest.raises(
        CheckpointError, match=r"attention\.windows.*train\.optimizer\.lr \(checkpoint 0\.005, now 0\.01\)"
    ):
        train(tmp_path, "train.optimizer.lr=0.01", "attention.windows=[0,0,0]")
    with pytest.raises(CheckpointError, match="seed"):
        train(tmp_path, "seed=5")
    with pytest.raises(CheckpointError, match=r"rows \(checkpoint 20, now 21\)"):
        train(tmp_path, tokens=make_tokens(make_config(), rows=21))
    with pytest.raises(CheckpointError, match=r"codebook \(checkpoint \w{12}, now \w{12}\)"):
        train(tmp_path, other_codebook=True)
    train(tmp_path, "train.checkpoint_every=5", "train.log_every=1", "train.steps=5")  # how often may change


def test_seeds_differ(train, tmp_path):
    _, first = train(tmp_path / "a", "seed=1")
    _, second = train(tmp_path / "b", "seed=2")
    assert not torch.equal(first["head.weight"], second["head.weight"])


def test_steps_that_are_not_finite_end_the_run_and_name_the_rows(train, tmp_path, caplog):
    def poison(transformer) -> None:
        with torch.no_grad():
            transformer.head.bias[0] = float("nan")

    with pytest.raises(MvarError, match=r"10 steps in a row.*step 10 .*rows (\d+, ){5}\d+"):
        train(tmp_path, "train.steps=30", "train.checkpoint_every=30", prepare=poison)
    assert "Step 1 was left out" in caplog.text
    lines = read_metrics(tmp_path / "skipped.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[1]["rows"] == batch_rows(1, 6, 20, 0).tolist()
    assert lines[1]["loss"] is None
    with pytest.raises(MvarError, match=r"3 steps in a row"):
        train(tmp_path / "strict", "train.steps=30", "train.max_skipped=3", prepare=poison)


def test_one_bad_step_is_left_out(train, tmp_path, monkeypatch, caplog):
    from mvar_core.training.transformer import Curriculum

    original = Curriculum.losses

    def losses(self, *args, step, **options):
        found = original(self, *args, step=step, **options)
        return found._replace(loss=found.loss * float("inf")) if step == 2 else found

    monkeypatch.setattr(Curriculum, "losses", losses)
    reports = []
    result, weights = train(tmp_path, on_step=reports.append)
    assert result.skipped == 1
    assert np.isnan(reports[2].loss)
    assert all(np.isfinite(report.loss) for report in reports if report.step != 3)
    assert all(value.isfinite().all() for value in weights.values())
    assert measures(tmp_path)[0]["skipped"] == 1
    assert [record.getMessage()[:19] for record in caplog.records] == ["Step 3 was left out"]
    assert measures(tmp_path)[0]["loss"] == pytest.approx(np.mean([reports[i].loss for i in (0, 1, 3)]), rel=1e-4)


def test_validation_is_measured_without_dropping(train, make_config, make_models, make_tokens, tmp_path):
    config = make_config()
    held_out = make_tokens(config, rows=9, seed=1)
    result, weights = train(tmp_path, validation=held_out)
    lines = [line for line in measures(tmp_path) if "val_loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 10]
    transformer, tokenizer = make_models(config)
    transformer.load_state_dict(weights)
    transformer.eval()
    tokens, labels = held_out.batch(np.arange(9))
    with torch.no_grad():
        logits = transformer(labels, tokenizer.quantizer.teacher_forcing_inputs(tokens))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert result.val_loss == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["val_loss"] == pytest.approx(expected, rel=1e-4)
    again, _ = train(tmp_path, validation=held_out)
    assert again.val_loss == result.val_loss


def test_bfloat16_autocast_trains_float32_weights(train, tmp_path):
    result, weights = train(tmp_path, "train.steps=40", dtype=torch.bfloat16)
    assert result.loss < measures(tmp_path)[0]["loss"]
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_tokens_that_do_not_fit_are_refused(train, make_config, make_tokens, tmp_path):
    tokens = make_tokens(make_config())
    tokens.tokens = tokens.tokens[:, :-1]
    with pytest.raises(DataError, match="has 20 tokens.*has 21"):
        train(tmp_path, tokens=tokens)
    tokens = make_tokens(make_config())
    tokens.tokens[0, 0] = 16
    with pytest.raises(DataError, match="code 16.*16 entries"):
        train(tmp_path, tokens=tokens)
    tokens = make_tokens(make_config())
    tokens.labels[0] = 3
    with pytest.raises(DataError, match="label 3.*3 classes"):
        train(tmp_path, tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_lines_of_metrics_are_json_without_nan(train, tmp_path):
    train(tmp_path, "train.log_every=1", "train.steps=2")
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        assert {"lr", "grad_norm", "images_per_second", "tokens_per_second", "peak_memory_bytes"} <= line.keys()
