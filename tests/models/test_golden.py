"""Everything that the published systems compute on the golden cases, ours computes too."""

import json

import numpy as np
import pytest
import torch
from golden_models import FOLDER, GoldenCase, relative_error, shapes_of

from mvar_core import Pipeline
from mvar_core.config.presets import load_config
from mvar_core.models import official
from mvar_core.models.directory import save_model
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE


@pytest.fixture(scope="module")
def pipeline(golden: GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    converted = official.convert(golden.model, golden.tokenizer, **golden.options)
    path = tmp_path_factory.mktemp("converted")
    save_model(path, converted.config, tokenizer=converted.tokenizer, transformer=converted.transformer)
    return Pipeline.from_pretrained(path, device="cpu", dtype="float32")


def test_tokenizer(golden: GoldenCase, pipeline: Pipeline) -> None:
    images = torch.from_numpy(golden.tensors["images"])
    features = pipeline.tokenizer.encode_features(images)
    assert relative_error(features, golden.tensors["encoder_features"]) < 1e-4
    tokens = pipeline.encode(images)
    assert np.array_equal(tokens.numpy(), golden.tensors["token_indices"])
    assert relative_error(pipeline.decode(tokens), golden.tensors["reconstruction"]) < 1e-4


def test_teacher_forcing(golden: GoldenCase, pipeline: Pipeline) -> None:
    tokens = torch.from_numpy(golden.tensors["token_indices"])
    inputs = pipeline.tokenizer.quantizer.teacher_forcing_inputs(tokens)
    assert relative_error(inputs, golden.tensors["teacher_forcing_input"]) < 1e-4
    logits = pipeline.logits(tokens, golden.tensors["labels"])
    assert relative_error(logits, golden.tensors["logits"]) < 1e-4


@pytest.mark.parametrize("attention", ["reference", "dense", "tiled"])
def test_greedy_images(golden: GoldenCase, pipeline: Pipeline, attention: str) -> None:
    """Guided and, for MVAR, unguided: its published code takes exactly cfg 1.0 for no guidance."""
    settings = {"1.5": 1.5, "1.0": 0.0} if golden.is_mvar else {"1.5": 1.5}
    pipeline.attention = attention
    for published, cfg in settings.items():
        expected = torch.from_numpy(golden.tensors[f"greedy_image_cfg{published}"])
        samples = pipeline.sample(golden.tensors["labels"].tolist(), cfg=cfg, top_k=1)
        expected_uint8 = (expected * 255).to(torch.uint8).permute(0, 2, 3, 1)
        assert (samples.images.int() - expected_uint8.int()).abs().max() <= 1
        fhat = golden.tensors.get(f"greedy_fhat_cfg{published}")
        assert (fhat is not None) == golden.is_mvar
        if fhat is not None:
            assert relative_error(pipeline.tokenizer.quantizer.decode(samples.tokens), fhat) < 1e-4


def test_sampling_without_a_cache_agrees(golden: GoldenCase, pipeline: Pipeline) -> None:
    """Greedy tokens, scale by scale with the cache, equal those of one packed pass over the tokens so far."""
    labels = torch.from_numpy(golden.tensors["labels"])
    pipeline.attention = "auto"
    sampled = pipeline.sample(labels.tolist(), cfg=1.5, top_k=1).tokens
    null_label = torch.full_like(labels, pipeline.transformer.null_label)
    conditional, unconditional = pipeline.logits(sampled, labels), pipeline.logits(sampled, null_label)
    for scale, span in enumerate(pipeline.config.pyramid.spans):
        strength = 1.5 * pipeline.config.pyramid.ratio(scale)
        guided = (1 + strength) * conditional[:, span] - strength * unconditional[:, span]
        chosen = guided.gather(-1, sampled[:, span, None]).squeeze(-1)
        assert torch.allclose(chosen, guided.amax(-1), atol=1e-4)


def test_published_file_alone(golden_mvar: GoldenCase) -> None:
    """A .pth is loaded without conversion where its pyramid is known; here it is not, and the message says so."""
    from mvar_core.errors import CheckpointError

    with pytest.raises(CheckpointError, match="--pyramid"):
        Pipeline.from_pretrained(golden_mvar.model)


def test_export_is_bit_equal(golden: GoldenCase) -> None:
    converted = official.convert(golden.model, golden.tokenizer, **golden.options)
    assert converted.transformer is not None
    model = official.transformer_to_official(converted.transformer, converted.config)
    tokenizer = official.tokenizer_to_official(converted.tokenizer, converted.config)
    assert {name: list(t.shape) for name, t in model.items()} == shapes_of(golden.name, "model")
    assert {name: list(t.shape) for name, t in tokenizer.items()} == shapes_of(golden.name, "vqvae")
    for name, tensor in official.read_official(golden.model).items():
        assert torch.equal(model[name], tensor), name
    for name, tensor in official.read_official(golden.tokenizer).items():
        assert torch.equal(tokenizer[name], tensor), name


def test_exported_mask_follows_the_configuration(golden: GoldenCase) -> None:
    converted = official.convert(golden.model, golden.tokenizer, **golden.options)
    assert converted.transformer is not None
    mask = official.transformer_to_official(converted.transformer, converted.config)["attn_bias_for_masking"][0, 0]
    scales = torch.tensor(converted.config.pyramid.scale_of_token)
    expected = scales[:, None] == scales[None] if golden.is_mvar else scales[:, None] >= scales[None]
    assert torch.equal(mask == 0, expected)
    assert torch.equal(mask == -torch.inf, ~expected)


def test_published_d16_keys_and_shapes() -> None:
    config = load_config("mvar-d16-256").model
    with torch.device("meta"):
        model, tokenizer = Transformer(config), VQVAE(config.tokenizer, config.pyramid)
    named = {
        "official-transformer-d16-keys.json": {
            official.transformer_name(name): tensor for name, tensor in model.state_dict().items()
        },
        "official-vqvae-keys.json": {
            official.tokenizer_name(name, config.tokenizer): tensor for name, tensor in tokenizer.state_dict().items()
        },
    }
    for file, state in named.items():
        published = json.loads((FOLDER / file).read_text())
        found = {name: [list(official.published_shape(name, tensor)), "float32"] for name, tensor in state.items()}
        expected = {name: value for name, value in published.items() if not official.is_buffer(name)}
        assert found == expected


def test_hostile_buffers_change_nothing(golden_mvar: GoldenCase, tmp_path: object) -> None:
    """A VAR mask, or nonsense, inside an MVAR file: the converted model is to the bit the same."""
    from pathlib import Path

    state = dict(official.read_official(golden_mvar.model))
    length = state["pos_1LC"].shape[1]
    for name, mask in {"nan": torch.nan, "open": 0.0}.items():
        hostile = dict(state)
        hostile["attn_bias_for_masking"] = torch.full((1, 1, length, length), mask)
        hostile["lvl_1L"] = torch.zeros(1, length, dtype=torch.long)
        hostile["blocks.0.attn.zero_k_bias"] = torch.full((128,), 7.0)
        path = Path(str(tmp_path)) / f"{name}.pth"
        torch.save({"trainer": {"mvar_wo_ddp": hostile}}, path)
        clean = official.convert(golden_mvar.model, golden_mvar.tokenizer, **golden_mvar.options)
        changed = official.convert(path, golden_mvar.tokenizer, kind="mvar", **golden_mvar.options)
        assert changed.transformer is not None
        assert clean.transformer is not None
        assert changed.transformer.keys() == clean.transformer.keys()
        for key, tensor in clean.transformer.items():
            assert torch.equal(tensor, changed.transformer[key])
        assert changed.config.patterns == clean.config.patterns
