"""Images beyond 256 px square: the whole path on the real pyramids of 512, 1024 px and of 256×384, narrow models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvar_core import Pipeline
from mvar_core.config import RunConfig
from mvar_core.config.presets import load_config
from mvar_core.models import blocks
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import AttentionPattern
from mvar_core.training.metrics import read_metrics
from mvar_core.training.transformer import train_transformer

SIZES = {"512": (2240, 10, 6), "256x384": (1030, 10, 7), "1024": (9451, 14, 8)}
"""Tokens of an image, scales, and scales before the first windowed one."""
NARROW = {
    "tokenizer": {
        "codebook_size": 32,
        "latent_channels": 4,
        "base_channels": 4,
        "channel_multipliers": [1, 1, 1, 2, 2],
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "middle_blocks": 1,
        "attention": False,
        "norm_groups": 4,
    },
    "transformer": {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 3,
        "drop_path": 0,
        "class_dropout": 0,
        "gate_init": 1.0,
    },
    "sampling": {"cfg": 1.0, "top_k": 8, "top_p": 0.9},
}


def narrow_config(size: str, *settings: str, **sections: dict) -> RunConfig:
    return load_config("mvar-d24-256", settings, {"image_size": size, **NARROW, **sections})


def narrow_models(config: RunConfig) -> tuple[Transformer, VQVAE]:
    """Random weights that say much, the same for the same sizes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VQVAE(config.tokenizer, config.pyramid)
        tokenizer.quantizer.codebook.data.normal_()
        transformer = Transformer(config.model)
        transformer.head.weight.data.mul_(50)
        return transformer, tokenizer


@pytest.fixture(scope="module", params=["512", "256x384", pytest.param("1024", marks=pytest.mark.slow)])
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(size: str) -> Pipeline:
    config = narrow_config(size)
    transformer, tokenizer = narrow_models(config)
    tokenizer.to(memory_format=torch.channels_last)  # as loading lays weights out: convolutions round by it
    return Pipeline(config.model, tokenizer, transformer)


def pictures(config: RunConfig, count: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=config.image_shape, mode="bilinear")


def test_the_pyramid_and_its_windows(size: str) -> None:
    config = narrow_config(size)
    tokens, scales, whole = SIZES[size]
    assert config.pyramid.num_tokens == tokens
    assert config.windows == (0,) * whole + (7,) * (scales - whole)
    if size != "256x384":
        preset = load_config(f"mvar-d24-{size}")
        assert (config.pyramid, config.windows) == (preset.pyramid, preset.windows)


def test_encode_sample_save_and_load(pipeline: Pipeline, size: str, tmp_path: Path) -> None:
    config = narrow_config(size)
    height, width = config.image_shape
    images = pictures(config, 2)
    tokens = pipeline.encode(images)
    assert tokens.shape == (2, SIZES[size][0])
    assert len(tokens.unique()) > 8
    decoded = pipeline.decode(tokens)
    assert decoded.shape == images.shape
    out = pipeline.sample([0, 2], seed=3, stages=True)
    assert out.images.shape == (2, height, width, 3)
    assert out.stages is not None
    assert out.stages.shape == (2, SIZES[size][1], height, width, 3)
    assert out.stages[:, -1].equal(out.images)
    bytes_of_tokens = ((pipeline.decode(out.tokens) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (bytes_of_tokens.int() - out.images.int()).abs().max() <= 1
    pipeline.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu", dtype="float32")
    assert again.config.image_shape == (height, width)
    assert again.encode(images).equal(tokens)
    # A sample depends on itself alone, also where its scales run in micro-batches of their own.
    both, alone = again.sample([0, 2], seed=3), again.sample([2], indices=[1], seed=3, memory=500_000_000)
    assert both.tokens.equal(out.tokens)
    assert alone.tokens[0].equal(both.tokens[1])
    assert alone.images[0].equal(both.images[1])


def test_scale_by_scale_and_packed_passes_agree(pipeline: Pipeline) -> None:
    out = pipeline.sample([1], cfg=0, top_k=1, seed=0)
    logits = pipeline.logits(out.tokens, [1])
    chosen = logits.gather(-1, out.tokens.unsqueeze(-1)).squeeze(-1)
    assert (logits.amax(dim=-1) - chosen).abs().max() < 1e-4
    assert len(out.tokens.unique()) > 2


def test_edit_keeps_what_it_promises(pipeline: Pipeline, size: str) -> None:
    config = narrow_config(size)
    height, width = config.image_shape
    images = pictures(config, 1)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 3 : 2 * width // 3] = True
    out = pipeline.edit(images, mask, labels=[2], paste=True, seed=4)
    kept, given = out.kept, pipeline.encode(images)
    assert kept is not None
    assert out.tokens[kept].equal(given[kept])
    assert not out.tokens.equal(given)
    expected = np.array([[mask[y : y + 16, x : x + 16].any() for x in range(0, width, 16)]
                         for y in range(0, height, 16)])  # fmt: skip
    last = kept[0, config.pyramid.spans[-1]].view(tuple(config.pyramid.latent_grid)).numpy()
    assert (last == ~expected).all()
    pixels = ((images[0] + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.abs(out.images[0].numpy()[~mask].astype(int) - pixels[~mask].astype(int)).max() <= 1


class SomeTokens:
    """Token maps in which the class decides much."""

    def __init__(self, config: RunConfig):
        random = np.random.default_rng(0)
        self.labels = np.arange(3)
        noise = random.integers(0, 32, (3, config.pyramid.num_tokens))
        self.tokens = np.where(random.random(noise.shape) < 0.8, self.labels[:, None] * 10, noise)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tokens[rows]).long(), torch.from_numpy(self.labels[rows]).long()


@pytest.mark.parametrize("curriculum", ["joint", "interleaved"])
def test_training_steps(size: str, curriculum: str, tmp_path: Path) -> None:
    """Steps that train all scales lower the loss, and what is left samples."""
    train = {
        "batch_size": 3,
        "steps": 6,
        "epochs": None,
        "curriculum": curriculum,
        "ratio_k": 1,
        "log_every": 1,
        "optimizer": {"lr": 3e-3, "lr_batch": None, "warmup": 0},
    }
    config, scales = narrow_config(size, train=train), SIZES[size][1]
    transformer, tokenizer = narrow_models(config)
    transformer.head.weight.data.div_(50)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    train_transformer(
        transformer,
        tokenizer,
        SomeTokens(config),
        config,
        tmp_path,
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    trained = [{scale for scale, loss in enumerate(line["scale_loss"]) if loss is not None} for line in lines]
    if curriculum == "joint":
        assert trained == [set(range(scales))] * 6
    else:
        assert trained == [set(range(scales - 2)), {scales - 2}, {scales - 1}] * 2
    first, last = lines[:3], lines[3:]
    for scale in range(1, scales):  # the first, of one token, hardly counts
        early, late = ([line["scale_loss"][scale] for line in part if line["scale_loss"][scale] is not None]
                       for part in (first, last))  # fmt: skip
        assert late[-1] < early[0], scale
    moved = (transformer.position_embedding - before["position_embedding"]).abs().amax(dim=(0, 2))
    assert (moved > 0).all()
    assert Pipeline.from_pretrained(tmp_path, device="cpu").sample([0]).images.shape[1:3] == config.image_shape


def masked_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, *, scale: float, backend: str):
    """Attention of a windowed scale by an explicit mask over all pairs; of a whole scale as the model has it."""
    if not pattern.is_windowed:
        return ATTEND(q, k, v, pattern, scale=scale, backend=backend)
    height, width = pattern.grid
    y, x = np.divmod(np.arange(height * width), width)
    seen = np.ones((len(y), len(y)), bool)
    for place, side in ((y, height), (x, width)):
        window = min(pattern.window, side)
        start = np.clip(place - window // 2, 0, side - window)[:, None]
        seen &= (place >= start) & (place < start + window)
    assert (seen.sum(axis=1) == pattern.keys_per_query).all()
    return scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(seen), scale=scale)


ATTEND = blocks.attend


@pytest.mark.parametrize("attention", ["auto", "tiled", "dense"])
def test_windows_change_their_own_scales_alone(size: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against whole scales and against explicit masks: logits and gradients, another window on every scale."""
    _, scales, first = SIZES[size]
    windows = (0,) * first + (3, 5, 7, 9, 11, 13)[: scales - first]
    windowed = narrow_config(size, attention={"windows": windows})
    whole = narrow_config(size, attention={"windows": ()})
    spans = windowed.pyramid.spans
    tokens, labels = SomeTokens(windowed).batch(np.array([1]))
    tokens = torch.randint(0, 32, tokens.shape, generator=torch.Generator().manual_seed(2))

    def run(config: RunConfig) -> tuple[Tensor, list[list[Tensor]]]:
        """Logits, and the gradients of the whole and of the windowed scales' part."""
        transformer, tokenizer = narrow_models(config)
        transformer.eval()
        inputs = tokenizer.quantizer.teacher_forcing_inputs(tokens).detach()
        logits = transformer(labels, inputs, attention=attention)
        parts = (logits[:, : spans[first].start], logits[:, spans[first].start :])
        parameters = list(transformer.blocks.parameters())
        return logits.detach(), [
            list(torch.autograd.grad(part.square().mean(), parameters, retain_graph=True)) for part in parts
        ]

    found, found_gradients = run(windowed)
    unseen, unseen_gradients = run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "attend", masked_attention)
        expected, expected_gradients = run(windowed)
    for scale, span in enumerate(spans):
        difference = (found[:, span] - unseen[:, span]).abs().max()
        if scale < first:
            assert difference == 0
        else:
            assert difference > 0.01 * unseen[:, span].abs().max(), scale
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for gradient, other in zip(found_gradients[0], unseen_gradients[0], strict=True):
        assert gradient.equal(other)
    for gradient, wanted in zip(found_gradients[1], expected_gradients[1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7)
    moved = [float((a - b).abs().max() / b.abs().max()) for a, b in
             zip(found_gradients[1], unseen_gradients[1], strict=True)]  # fmt: skip
    assert max(moved) > 0.1
