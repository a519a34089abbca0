from __future__ import annotations

import numpy as np
import pytest
import torch

from mvar_core.distributed import World
from mvar_core.errors import ConfigError
from mvar_core.training.optim import learning_rate
from mvar_core.training.parallel import BatchPart, Parallel
from mvar_core.training.trainer import Plan, Trainer, take_rows
from mvar_core.training.transformer import TransformerObjective, build_curriculum

DROPPING = ("transformer.drop_path=0.5", "transformer.class_dropout=0.5")


@pytest.fixture
def make_trainer(make_config, make_models, make_tokens, tmp_path):
    """A trainer of the tiny model with much dropping, which must not depend on micro-batches."""

    def make(*settings: str, dtype: torch.dtype = torch.float32, parallel: Parallel | None = None) -> Trainer:
        config = make_config(*DROPPING, *settings)
        transformer, tokenizer = make_models(config)
        train = config.train
        plan = Plan(10, train, torch.device("cpu"), dtype, 3, {})
        curriculum = build_curriculum(train, config.pyramid, transformer.patterns)
        objective = TransformerObjective(
            transformer.train(), tokenizer.quantizer, make_tokens(config), None, curriculum, plan
        )
        no_decay = transformer.no_decay_names()
        return Trainer(transformer, objective, plan, tmp_path, parallel=parallel or Parallel(), no_decay=no_decay)

    return make


def gradients(trainer: Trainer, step: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.optimizer.zero_grad()
    values = trainer.accumulate_gradients(trainer.fetch(step), step)
    return values, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("curriculum", ["joint", "interleaved"])
@pytest.mark.parametrize(
    "setting", ["train.accumulate=2", "train.accumulate=6", "train.micro_batch=4", "train.micro_batch=1"]
)
def test_micro_batches_add_up_to_the_gradient_of_the_batch(make_trainer, setting, curriculum):
    curriculum = f"train.curriculum={curriculum}"
    values, expected = gradients(make_trainer(curriculum))
    parts_values, parts = gradients(make_trainer(curriculum, setting))
    assert torch.allclose(parts_values, values, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert parts.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(parts[name], gradient, rtol=1e-4, atol=1e-6), name


class Share(Parallel):
    """One of several processes that never meet: what each computes can be added up here."""

    def __init__(self, rank: int, count: int):
        super().__init__(World(rank, count))


def test_shares_of_processes_average_to_the_gradient_of_the_batch(make_trainer):
    values, expected = gradients(make_trainer())
    shares = [gradients(make_trainer(parallel=Share(rank, 3))) for rank in range(3)]
    assert torch.allclose(sum(share[0] for share in shares), values, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        mean = sum(share[1][name] for share in shares) / 3
        assert torch.allclose(mean, gradient, rtol=1e-4, atol=1e-6), name


def test_dropping_decides_by_row_and_step(make_trainer):
    _, first = gradients(make_trainer(), step=1)
    _, again = gradients(make_trainer(), step=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    trainer = make_trainer()
    rows = trainer.fetch(1)
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradients(rows, 2)  # the same rows at another step drop other branches
    assert any(
        not torch.equal(first[name], parameter.grad)
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    )


def test_parts_cover_the_batch():
    whole = Parallel().part(10)
    assert whole == BatchPart(0, 10, 10)
    assert [(part.start, part.stop) for part in whole.split(4)] == [(0, 4), (4, 8), (8, 10)]
    shares = [Share(rank, 3).part(10) for rank in range(3)]
    assert [part.rows for part in shares] == [3, 3, 4]
    assert np.concatenate([range(part.start, part.stop) for part in shares]).tolist() == list(range(10))
    batch = (torch.arange(10), torch.arange(20).view(10, 2))
    assert take_rows(batch, 0, 10)[0] is batch[0]
    assert take_rows(batch, 4, 6)[1].tolist() == [[8, 9], [10, 11]]


def test_dividing_a_batch_in_two_ways_is_refused(make_config):
    with pytest.raises(ConfigError, match="accumulate is 2 and micro_batch 3"):
        make_config("train.accumulate=2", "train.micro_batch=3")


def test_float16_gradients_are_scaled_and_overflows_left_out(make_trainer):
    trainer = make_trainer(dtype=torch.float16)
    assert trainer.scaler.is_enabled()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.take(trainer.fetch(0), 0)  # at the first scale of 65,536 this may overflow, and is left out then
    for step in range(1, 6):
        result = trainer.take(trainer.fetch(step), step)
    assert np.isfinite(result.loss)
    assert result.values is not None
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())

    scale = trainer.scaler.get_scale()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.objective.loss = _overflowing(trainer.objective.loss)
    result = trainer.take(trainer.fetch(6), 6)
    assert result.values is None
    assert trainer.skipped_in_a_row == 1
    assert trainer.scaler.get_scale() == scale / 2
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


def _overflowing(loss):
    """A finite loss whose gradient is not."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    def wrapped(*args):
        value, measures = loss(*args)
        return Overflow.apply(value), measures

    return wrapped


def test_the_learning_rate_follows_the_step(make_trainer):
    trainer = make_trainer()
    train = trainer.plan.train
    rates = [trainer.take(trainer.fetch(step), step).learning_rate for step in range(4)]
    assert rates == [learning_rate(step, 10, train.batch_size, train.optimizer) for step in range(4)]
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [rates[-1]] * 2
