"""What holds for every pyramid, window, prefix, number of heads and dtype; hypothesis looks for a counterexample.

`make properties` tries 2,000 of each, `make test` a dozen that are always the same.
"""

import tempfile
from pathlib import Path

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mvar_core.config import ModelConfig, SamplingConfig
from mvar_core.config.section import validate
from mvar_core.kernels import attend, available_backends
from mvar_core.models import official
from mvar_core.models.blocks import KeyValueCache
from mvar_core.models.directory import load_tokenizer, load_transformer, read_model_config, save_model
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import AttentionPattern, Grid
from mvar_core.sampling.sampler import sample_tokens

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
BACKENDS = [name for name, reason in available_backends() if reason is None and name != "reference"]

seeds = st.integers(0, 2**32)
windows = st.sampled_from((0, 1, 3, 5, 7, 9, 13))


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern:
    """A scale of any shape, up to 20 tokens a side."""
    grid = Grid(draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    return AttentionPattern(grid, draw(windows), draw(st.integers(0, 40)))


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A model of any pyramid: odd sides, not square, of up to five scales."""
    scales = draw(st.integers(1, 5))
    heights, widths = (sorted(draw(st.lists(st.integers(1, 7), min_size=scales, max_size=scales))) for _ in range(2))
    sizes = list(dict.fromkeys(zip(heights, widths, strict=True)))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from((2, 4, 8)))
    values = {
        "image_size": [2 * sizes[-1][0], 2 * sizes[-1][1]],
        "patch_sizes": [list(size) for size in sizes],
        "tokenizer": {
            "codebook_size": draw(st.integers(2, 40)),
            "latent_channels": draw(st.integers(1, 6)),
            "base_channels": 4,
            "channel_multipliers": [1, 2],
            "encoder_blocks": 1,
            "decoder_blocks": draw(st.integers(1, 2)),
            "attention": draw(st.booleans()),
            "residual_convs": draw(st.integers(1, 4)),
            "norm_groups": 2,
        },
        "transformer": {
            "depth": draw(st.integers(1, 3)),
            "embed_dim": heads * head_dim,
            "num_heads": heads,
            "num_classes": draw(st.integers(1, 5)),
            "mlp_ratio": draw(st.sampled_from((1.0, 2.5, 4.0))),
            "shared_adaln": draw(st.booleans()),
            "l2_attention": draw(st.booleans()),
        },
        "attention": {
            "scale_prefixes": draw(st.sampled_from(("all", *range(1, len(sizes) + 1)))),
            "windows": [draw(windows) for _ in sizes],
        },
    }
    config: ModelConfig = validate(ModelConfig, values, "a property")
    return config


def build(config: ModelConfig, seed: int) -> tuple[Transformer, VQVAE]:
    """Models whose every weight counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, vqvae = Transformer(config).eval(), VQVAE(config.tokenizer, config.pyramid).eval()
        for parameter in transformer.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return transformer.requires_grad_(False), vqvae.requires_grad_(False)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    found, expected = found.float(), expected.float()
    error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error <= tolerance, f"{error:.1e}"


@given(
    backend=st.sampled_from(BACKENDS),
    pattern=patterns(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    width=st.integers(1, 40),
    dtype=st.sampled_from(list(TOLERANCES)),
    scale=st.floats(0.05, 2),
    seed=seeds,
)
def test_backends_equal_the_reference_with_gradients(
    backend: str,
    pattern: AttentionPattern,
    batch: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    sizes = (pattern.queries, pattern.keys, pattern.keys, pattern.queries)
    q, k, v, gradient = (torch.randn(batch, heads, size, width, generator=random).to(dtype) for size in sizes)
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float32)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        output = attend(*leaves, pattern, scale=scale / width**0.5, backend=name)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, gradient.to(kind))))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        near(found, expected, TOLERANCES[dtype])


@given(config=configs(), seed=seeds, images=st.integers(1, 3))
def test_packed_equals_per_scale_with_and_without_a_cache(config: ModelConfig, seed: int, images: int) -> None:
    """Logits of all scales in one pass, of each scale with a cache of keys and values, and of each scale by itself."""
    transformer, vqvae = build(config, seed)
    random = torch.Generator().manual_seed(seed)
    pyramid, null = config.pyramid, transformer.null_label
    tokens = torch.randint(config.tokenizer.codebook_size, (images, pyramid.num_tokens), generator=random)
    labels = torch.randint(null + 1, (images,), generator=random)
    inputs = vqvae.quantizer.teacher_forcing_inputs(tokens)
    packed = transformer(labels, inputs)
    cache, conditioning = KeyValueCache(images), transformer.condition(labels)
    first = pyramid.grids[0].tokens
    for scale, span in enumerate(pyramid.spans):
        own = inputs[:, max(0, span.start - first) : span.stop - first]
        stream = transformer.hidden_states(range(scale, scale + 1), own, conditioning, cache=cache.rows())
        near(transformer.head_logits(stream, conditioning), packed[:, span], 2e-4)
        near(transformer(labels, inputs, scales=range(scale, scale + 1)), packed[:, span], 2e-4)
        transformer.drop_unseen(cache, scale)


@given(
    config=configs(),
    seed=seeds,
    images=st.integers(1, 6),
    data=st.data(),
    cfg=st.sampled_from((0.0, 1.5)),
    top_k=st.integers(0, 3),
    top_p=st.sampled_from((0.0, 0.9)),
)
def test_micro_batches_equal_the_whole_batch(
    config: ModelConfig, seed: int, images: int, data: st.DataObject, cfg: float, top_k: int, top_p: float
) -> None:
    """To the bit; and each image equals itself sampled alone."""
    assert config.transformer is not None
    assume(top_k <= config.tokenizer.codebook_size)
    transformer, vqvae = build(config, seed)
    labels = [index % config.transformer.num_classes for index in range(images)]
    settings = SamplingConfig(cfg=cfg, top_k=top_k, top_p=top_p)
    scales = config.pyramid.num_scales
    sizes = data.draw(st.lists(st.integers(1, images), min_size=scales, max_size=scales))
    whole = sample_tokens(transformer, vqvae.quantizer, labels, range(images), seed, settings)
    cut = sample_tokens(transformer, vqvae.quantizer, labels, range(images), seed, settings, micro_batches=sizes)
    last = sample_tokens(transformer, vqvae.quantizer, labels[-1:], [images - 1], seed, settings)
    assert torch.equal(cut.tokens_NL, whole.tokens_NL)
    assert torch.equal(cut.fhat_NZhw, whole.fhat_NZhw)
    assert torch.equal(last.tokens_NL[0], whole.tokens_NL[-1])


@given(config=configs(), seed=seeds, wrapper=st.sampled_from((None, "mvar_wo_ddp")))
def test_export_then_import_gives_every_weight_back(config: ModelConfig, seed: int, wrapper: str | None) -> None:
    transformer, vqvae = build(config, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        official.save_official(official.transformer_to_official(transformer.state_dict(), config), folder / "m.pth",
                               wrapper=wrapper)  # fmt: skip
        official.save_official(official.tokenizer_to_official(vqvae.state_dict(), config), folder / "vae.pth")
        published = official.open_official(
            folder / "m.pth", folder / "vae.pth", kind="mvar" if config.attention.scale_prefixes == 1 else "var",
            patch_sizes=config.patch_sizes, windows=config.attention.windows,
            scale_prefixes=config.attention.scale_prefixes,
        )  # fmt: skip
        states = tuple(published.states())
        for state, model in zip(states, (vqvae, transformer), strict=True):
            expected = model.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in expected)


@given(config=configs(), seed=seeds)
def test_a_model_directory_gives_every_weight_back(config: ModelConfig, seed: int) -> None:
    transformer, vqvae = build(config, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(folder, config, tokenizer=vqvae.state_dict(), transformer=transformer.state_dict())
        again = read_model_config(folder)
        assert again.patterns == config.patterns
        for model, loaded in (
            (transformer, load_transformer(folder, again)),
            (vqvae, load_tokenizer(folder, again)),
        ):
            assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
