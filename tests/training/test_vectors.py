"""Training on vectors: it follows them, resumes to the bit, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mvar_core.data.vectors import embed_words
from mvar_core.errors import CheckpointError, DataError
from mvar_core.models.directory import load_transformer, read_model_config
from mvar_core.training.transformer import train_transformer

VECTOR = ("conditioning.kind=vector", "conditioning.dim=12")
WORDS = torch.from_numpy(embed_words(["red", "green", "blue"], 12))


class VectorTokens:
    """Class tokens that come with the words of their classes."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens, labels = self.tokens.batch(rows)
        return tokens, WORDS[labels]


@pytest.fixture
def train(make_config, make_tokens, make_models, tmp_path):
    def run(name: str, *settings: str, **options: object):
        config = make_config(*VECTOR, *settings)
        transformer, tokenizer = make_models(config)
        result = train_transformer(
            transformer,
            tokenizer,
            VectorTokens(make_tokens(config)),
            config,
            tmp_path / name,
            **options,
        )
        return result, transformer, tokenizer, config

    return run


def test_training_follows_the_word(train, make_tokens):
    """The right word explains the tokens better than a wrong one, and than none; at the start none of them does."""
    _, model, tokenizer, config = train(
        "run", "train.steps=60", "train.optimizer.lr=0.2", "transformer.class_dropout=0.3"
    )
    tokens, labels = make_tokens(config).batch(np.arange(20))
    inputs = tokenizer.quantizer.teacher_forcing_inputs(tokens)

    def loss(conditions: Tensor) -> float:
        with torch.no_grad():
            logits = model.eval()(conditions, inputs)
        # The first scale's tokens alone: later ones are seen from what came before.
        return torch.nn.functional.cross_entropy(logits[:, 0], tokens[:, 0]).item()

    right, wrong = loss(WORDS[labels]), loss(WORDS[(labels + 1) % 3])
    none = loss(model.conditioner.null(20))
    assert right < none - 0.3
    assert none + 0.3 < wrong


def test_projection_and_null_are_trained(train, make_config, make_models):
    before, _ = make_models(make_config(*VECTOR))
    _, after, _, _ = train("run", "transformer.class_dropout=0.5")
    for name, parameter in after.conditioner.named_parameters():
        assert not torch.equal(parameter, before.conditioner.get_parameter(name)), name


def test_a_run_resumes_to_the_bit(train, tmp_path: Path):
    _, whole, _, _ = train("whole")

    def interrupt(report) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    assert train("cut", on_step=interrupt)[0].interrupted
    result, resumed, _, _ = train("cut")
    assert (result.steps, result.interrupted) == (10, False)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_run_directory_is_a_model_of_vectors(train, tmp_path: Path):
    _, trained, _, _ = train("run", "train.steps=2", "conditioning.encoder=mine")
    config = read_model_config(tmp_path / "run")
    assert (config.conditioning.kind, config.conditioning.dim, config.conditioning.encoder) == ("vector", 12, "mine")
    assert "vectors of 12 values (mine)" in (tmp_path / "run" / "README.md").read_text()
    loaded = load_transformer(tmp_path / "run", config)
    assert torch.equal(loaded.conditioner.projection.weight, trained.conditioner.projection.weight)


def test_another_encoder_is_another_run(train):
    train("run", "train.steps=2", "conditioning.encoder=mine")
    with pytest.raises(CheckpointError, match="other settings"):
        train("run", "train.steps=4", "conditioning.encoder=yours")


def test_what_does_not_fit_is_refused(make_config, make_tokens, make_models, tmp_path):
    config, other = make_config(*VECTOR), make_config()
    for asked, tokens, message in (
        (config, make_tokens(config), "vectors of 12 values"),
        (other, VectorTokens(make_tokens(other)), "the model expects class labels"),
    ):
        model, tokenizer = make_models(asked)
        with pytest.raises(DataError, match=message):
            train_transformer(model, tokenizer, tokens, asked, tmp_path / "no")
