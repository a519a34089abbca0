import json
import re

import pytest
import torch
import torch.nn.functional as F

from mvar_core.analysis.cost import cost_of
from mvar_core.analysis.random_models import random_transformer
from mvar_core.config import ModelConfig
from mvar_core.config.presets import load_config
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models.conditioning import ClassConditioner, VectorConditioner
from mvar_core.models.directory import read_model_config
from mvar_core.models.official import transformer_to_official
from mvar_core.models.transformer import Transformer
from mvar_core.runtime import generator

DIM = 6
VECTOR = ("conditioning.kind=vector", f"conditioning.dim={DIM}")


def build(*settings: str) -> tuple[Transformer, ModelConfig]:
    small = ["transformer.depth=2", "transformer.embed_dim=32", "transformer.num_classes=5", "transformer.gate_init=1"]
    config = load_config("digits", [*small, *VECTOR, *settings]).model
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        model.head.weight.mul_(50)
    return model, config


def vectors(count: int = 3, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def inputs_of(config: ModelConfig, batch: int = 3) -> torch.Tensor:
    tokens = config.pyramid.num_tokens - config.pyramid.grids[0].tokens
    return torch.randn(batch, tokens, config.tokenizer.latent_channels, generator=torch.Generator().manual_seed(1))


def test_class_models_keep_their_names_and_first_weights() -> None:
    config = load_config("digits").model
    torch.manual_seed(0)
    model = Transformer(config)
    assert isinstance(model.conditioner, ClassConditioner)
    assert next(name for name in model.state_dict() if "." in name) == "class_embedding.weight"
    assert model.conditioner is model.class_embedding
    assert "class_embedding.weight" in model.no_decay_names()
    assert config.conditioning.kind == "class"


def test_the_embedding_is_the_projected_vector() -> None:
    model, _ = build()
    conditioner = model.conditioner
    assert isinstance(conditioner, VectorConditioner)
    given = vectors()
    given[1] = torch.nan
    expected = given.nan_to_num() @ conditioner.projection.weight.T + conditioner.projection.bias
    expected[1] = conditioner.no_vector
    assert torch.allclose(conditioner(given), expected, atol=1e-6)
    embedded = model.condition(given)
    assert torch.equal(embedded.laid_out(embedded.embedding_UC), conditioner(given))
    assert torch.equal(conditioner(conditioner.null(2)), conditioner.no_vector.expand(2, -1))


def test_vectors_start_with_embeddings_as_large_as_class_tables_have() -> None:
    model, _ = build("transformer.embed_dim=512", "transformer.num_heads=8")
    table = Transformer(load_config("digits", ["transformer.embed_dim=512", "transformer.num_heads=8"]).model)
    expected = table.class_embedding.weight.std().item()
    assert model.conditioner(vectors(64)).std().item() == pytest.approx(expected, rel=0.1)
    assert model.conditioner(model.conditioner.null(1)).std().item() == pytest.approx(expected, rel=0.1)
    assert not model.conditioner.projection.bias.any()


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_every_parameter(shared: bool) -> None:
    model, config = build(f"transformer.shared_adaln={str(shared).lower()}")
    given = vectors()
    given[0] = torch.nan
    model(given, inputs_of(config)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_every_parameter_has_a_gradient_in_every_step() -> None:
    """Ranks that share gradients rely on it, whether vectors were dropped or not."""
    for given in (vectors(), torch.full((3, DIM), torch.nan)):
        model, config = build()
        model(given, inputs_of(config)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.conditioner.parameters())


def test_dropped_vectors_become_the_learned_null() -> None:
    model, config = build("transformer.class_dropout=0.999999")
    given, inputs = vectors(), inputs_of(config)
    with torch.no_grad():
        model.conditioner.no_vector.normal_()
        dropped = model.train()(given, inputs, generator=generator(0))
        assert torch.equal(dropped, model(model.conditioner.null(3), inputs))
        assert not torch.allclose(dropped, model(given, inputs))
        assert torch.equal(model(given, inputs), model.eval()(given, inputs, generator=generator(0)))


def test_distinct_conditions_lay_out_to_what_was_given() -> None:
    model, _ = build()
    given = torch.cat([vectors(3)[[0, 2, 2, 1, 0]], model.conditioner.null(2)])
    found, rows = model.conditioner.distinct(given)
    assert len(found) == 4
    assert torch.equal(found[rows].nan_to_num(7.0), given.nan_to_num(7.0))
    laid_out = model.condition(found).select(rows)
    for layer in range(2):
        assert torch.equal(laid_out.laid_out(laid_out.blocks_U6C[layer]), model.condition(given).blocks_U6C[layer])
    labels, rows = ClassConditioner(9, 4).distinct(torch.tensor([7, 3, 9, 3]))
    assert torch.equal(labels[rows], torch.tensor([7, 3, 9, 3]))


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    model, _ = build()
    given = vectors(40)
    with torch.no_grad():
        together = model.conditioner(given)
        for count in (1, 3, 7, 17):
            assert torch.equal(model.conditioner(given[:count]), together[:count])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([1, 2]), r"vectors \(images, 6\)"),
        (torch.ones(2, 5), r"\(2, 5\)"),
        (torch.ones(2, 3, DIM), "pool_sequence"),
        (torch.tensor([[1.0] * 5 + [torch.inf]]), "Vector 0 holds"),
        (torch.tensor([[1.0] * 6, [1.0] * 5 + [torch.nan]]), "Vector 1 holds"),
    ],
)
def test_what_is_no_condition_is_refused(given: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        VectorConditioner(DIM, 8).read(given)
    assert re.search(message, str(refused.value))


def test_class_conditioners_refuse_vectors_and_unknown_labels() -> None:
    conditioner = ClassConditioner(5, 8)
    assert torch.equal(conditioner.read([1, 5]), torch.tensor([1, 5]))
    with pytest.raises(ConfigError, match="class 6 does not exist"):
        conditioner.read([1, 6])
    with pytest.raises(ConfigError, match="one label per image"):
        conditioner.read(torch.ones(2, DIM))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["conditioning.kind=vector"], "conditioning.dim"),
        (["conditioning.dim=8"], "kind=vector"),
        (["conditioning.kind=words"], "kind"),
        (["conditioning.kind=vector", "conditioning.dim=0"], "dim"),
        (["conditioning.size=3"], "unknown key"),
    ],
)
def test_the_configuration_is_checked(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", settings)


def test_counts_weight_decay_and_random_models() -> None:
    model, config = build()
    assert cost_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.most_conditions is None
    exempt = model.no_decay_names()
    assert {"vector_embedding.no_vector", "vector_embedding.projection.bias"} <= exempt
    assert "vector_embedding.projection.weight" not in exempt
    random = random_transformer(config)
    assert random.conditioner(vectors()).isfinite().all()


def test_half_precision_embeds_in_its_own_dtype() -> None:
    model, _ = build()
    model.to_compute_dtype(torch.bfloat16)
    assert model.condition(vectors()).embedding_UC.dtype == torch.bfloat16


def test_published_files_know_no_vectors() -> None:
    model, config = build()
    with pytest.raises(CheckpointError, match="conditioned on vectors"):
        transformer_to_official(model.state_dict(), config)


def test_configurations_written_before_are_of_classes(tmp_path) -> None:
    values = load_config("digits").model.model_dump(mode="json")
    del values["conditioning"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model_config(tmp_path).conditioning.kind == "class"
