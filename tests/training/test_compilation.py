from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mvar_core.errors import BackendError
from mvar_core.models.compilation import check_compiler, compiled_blocks, uncompiled
from mvar_core.runtime import RowDraws, generator
from mvar_core.training.transformer import Curriculum, train_transformer

# torch's compiler imports parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


@pytest.fixture
def gradients(make_config, make_models, make_tokens):
    """Loss and gradients of one step with much dropping, after `change` was done to the transformer."""

    def run(*settings: str, change=lambda transformer: None):
        config = make_config("transformer.drop_path=0.5", "transformer.depth=4", *settings)
        transformer, tokenizer = make_models(config)
        change(transformer.train())
        tokens, labels = make_tokens(config).batch(torch.arange(6).numpy())
        loss = Curriculum(config.pyramid).losses(
            transformer,
            labels,
            tokens,
            tokenizer.quantizer.teacher_forcing_inputs(tokens),
            step=0,
            attention="auto",
            generator=RowDraws(generator("test", 1), 0, 6),
        )
        loss.loss.backward()
        return loss.loss.detach(), {name: p.grad for name, p in transformer.named_parameters()}, transformer

    return run


@pytest.mark.parametrize("attention", ["attention.scale_prefixes=1", "attention.scale_prefixes=all"])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(gradients, attention):
    kept: dict[bool, int] = {}

    def count(recompute: bool):
        def change(transformer) -> None:
            transformer.recompute_blocks = recompute

        kept[recompute] = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[recompute] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return gradients(attention, change=change)

    loss, expected, _ = count(False)
    other_loss, found, _ = count(True)
    assert torch.equal(loss, other_loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    assert kept[True] < kept[False] / 2


def test_training_with_recomputed_blocks_gives_the_same_weights(make_config, make_models, make_tokens, tmp_path):
    states = []
    for setting in ("false", "true"):
        config = make_config(f"train.activation_checkpointing={setting}", "train.steps=3")
        transformer, tokenizer = make_models(config)
        tokens = make_tokens(config)
        train_transformer(transformer, tokenizer, tokens, config, tmp_path / setting)
        states.append(transformer.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_missing_compiler_is_a_clear_error(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="needs a C\\+\\+ compiler.*leave out --compile"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(BackendError, match="CXX is 'absent-compiler'"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(BackendError, match="MPS"):
        check_compiler(torch.device("mps"))


def test_compiling_is_undone_and_stands_back_for_measuring(make_config, make_models):
    transformer, _ = make_models(make_config())
    names = list(transformer.state_dict())
    with compiled_blocks(transformer, wanted=True):
        assert list(transformer.state_dict()) == names
        assert all(block._compiled_call_impl is not None for block in transformer.blocks)
        with uncompiled(transformer):
            pass
    assert all(block._compiled_call_impl is None for block in transformer.blocks)


COMPILED = """
import json, sys
import torch
from tiny_training import FakeTokens, make_config, make_models
from mvar_core.training.transformer import train_transformer
torch.set_num_threads(1)
out, recompute = Path(sys.argv[1]), sys.argv[2]
weights, losses = [], []
for compiled in ("false", "true"):
    config = make_config(f"train.compile={compiled}", f"train.activation_checkpointing={recompute}", "train.steps=3",
                         "train.checkpoint_every=2", "transformer.depth=12")
    transformer, tokenizer = make_models(config)
    validation = FakeTokens(config, rows=7, seed=1)
    result = train_transformer(
        transformer, tokenizer, FakeTokens(config), config, out / compiled, validation=validation)
    weights.append(transformer.state_dict())
    losses.append([result.loss, result.val_loss])
difference = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
counters = torch._dynamo.utils.counters
print(json.dumps({"difference": difference, "losses": losses,
                  "graphs": counters["stats"]["unique_graphs"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_compiled_blocks_train_the_same_and_share_what_is_compiled(tmp_path, recompute):
    """In a process of its own: the tests' checks of annotations cannot be compiled."""
    command = [sys.executable, "-c", COMPILED, str(tmp_path), recompute]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["difference"] < 1e-4
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-4)
    # The first block, in which no branch is dropped, and one of the others serve all 12; each breaks into a few graphs.
    # One compilation for every block would soon exceed torch's limit, beyond which the rest runs uncompiled.
    assert 0 < found["graphs"] <= 11
    assert "recompile_limit" not in done.stderr
