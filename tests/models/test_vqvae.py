import pytest
import torch
import torch.nn.functional as F

from mvar_core.config import TokenizerConfig
from mvar_core.models.quantizer import MultiScaleQuantizer, ResidualConv
from mvar_core.models.vqvae import VQVAE
from mvar_core.pyramid import ScalePyramid

CONFIG = TokenizerConfig(
    codebook_size=32,
    latent_channels=6,
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    encoder_blocks=1,
    decoder_blocks=1,
    middle_blocks=1,
    attention=False,
    norm_groups=4,
)
PYRAMIDS = [(1, 2, 4), (1, 3, 4), ((1, 1), (2, 3), (4, 6))]


@pytest.fixture(params=PYRAMIDS, ids=str)
def model(request: pytest.FixtureRequest) -> VQVAE:
    torch.manual_seed(0)
    vqvae = VQVAE(CONFIG, ScalePyramid.from_patch_sizes(request.param))
    torch.nn.init.normal_(vqvae.quantizer.codebook, std=0.5)
    return vqvae


def images_for(model: VQVAE, batch: int = 2) -> torch.Tensor:
    height, width = (side * CONFIG.downsample for side in model.quantizer.pyramid.latent_grid)
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes(model: VQVAE) -> None:
    images = images_for(model)
    pyramid = model.quantizer.pyramid
    tokens = model.encode(images)
    assert tokens.shape == (2, pyramid.num_tokens)
    assert model.decode(tokens).shape == images.shape
    assert model.decode(tokens).abs().max() <= 1
    inputs = model.quantizer.teacher_forcing_inputs(tokens)
    assert inputs.shape == (2, pyramid.num_tokens - pyramid.grids[0].tokens, 6)


def test_encoding_is_the_residual_recursion(model: VQVAE) -> None:
    """Scale by scale: the nearest entry to what is left, searched by brute force."""
    quantizer = model.quantizer
    features = model.encode_features(images_for(model)).detach()
    tokens = quantizer.encode(features)
    rest, fhat = features, torch.zeros_like(features)
    for scale, (span, grid) in enumerate(zip(quantizer.pyramid.spans, quantizer.pyramid, strict=True)):
        small = F.interpolate(rest, size=tuple(grid), mode="area")
        distances = (small.flatten(2).transpose(1, 2)[:, :, None] - quantizer.codebook).square().sum(-1)
        assert torch.equal(distances.argmin(-1), tokens[:, span])
        fhat = fhat + quantizer.increment(quantizer.embed(tokens[:, span]), scale)
        rest = features - fhat
    assert torch.allclose(quantizer.decode(tokens), fhat, atol=1e-6)


def test_a_residual_convolution_is_mixed_in_by_its_ratio() -> None:
    module = ResidualConv(4, ratio=0.25)
    maps = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(module(maps), 0.75 * maps + 0.25 * module.conv(maps))


def test_inputs_depend_on_earlier_scales_alone(model: VQVAE) -> None:
    quantizer = model.quantizer
    tokens = model.encode(images_for(model))
    spans = quantizer.pyramid.spans
    base = quantizer.teacher_forcing_inputs(tokens)
    first = quantizer.pyramid.grids[0].tokens
    for scale, span in enumerate(spans):
        changed = tokens.clone()
        changed[:, span] = (changed[:, span] + 1) % 32
        differs = (quantizer.teacher_forcing_inputs(changed) != base).any(-1).any(0)
        assert not differs[: max(0, span.stop - first)].any()
        if scale + 1 < len(spans):
            assert differs[span.stop - first :].any()


def test_training_loss_is_the_published_one(model: VQVAE) -> None:
    features = model.encode_features(images_for(model)).detach().requires_grad_()
    quantizer = model.quantizer
    out = quantizer(features, commitment=0.25)
    fhat, expected = torch.zeros_like(features), torch.zeros(())
    for scale, span in enumerate(quantizer.pyramid.spans):
        fhat = fhat + quantizer.increment(quantizer.embed(out.tokens_BL[:, span]), scale)
        expected = expected + 1.25 * (fhat - features).square().mean()
    assert torch.allclose(out.loss, expected / quantizer.pyramid.num_scales)
    assert torch.equal(out.tokens_BL, quantizer.encode(features))
    assert torch.allclose(out.features_BZhw, fhat, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.features_BZhw.sum(), features, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(features))
    out.loss.backward()
    assert quantizer.codebook.grad is not None
    assert features.grad is not None
    used = out.tokens_BL.unique()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == used.tolist()


def test_gradients_reach_every_parameter(model: VQVAE) -> None:
    images = images_for(model)
    out = model(images)
    (F.l1_loss(out.images_BCHW, images) + out.quantizer_loss).backward()
    convs = {model.quantizer.pyramid.residual_conv_index(s, 4) for s in range(model.quantizer.pyramid.num_scales)}
    for name, parameter in model.named_parameters():
        if "residual_convs" in name and int(name.split(".")[2]) not in convs:
            continue  # fewer scales than convolutions: no scale uses this one
        assert parameter.grad is not None, name


def test_residual_vectors_are_what_is_quantized(model: VQVAE) -> None:
    quantizer: MultiScaleQuantizer = model.quantizer
    features = model.encode_features(images_for(model)).detach()
    nearest = [quantizer.nearest(vectors).view(2, -1) for vectors in quantizer.residual_vectors(features)]
    assert torch.equal(torch.cat(nearest, 1), quantizer.encode(features))


def test_half_precision_keeps_the_quantizer(model: VQVAE) -> None:
    images = images_for(model)
    exact = model.decode(model.encode(images))
    model.to_compute_dtype(torch.bfloat16)
    assert model.encode_features(images).dtype == torch.float32
    assert model.quantizer.codebook.dtype == torch.float32
    half = model.decode(model.encode(images))
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.2


def test_published_size() -> None:
    with torch.device("meta"):
        tokenizer = VQVAE(TokenizerConfig(), ScalePyramid.from_patch_sizes((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
    assert sum(p.numel() for p in tokenizer.parameters()) == pytest.approx(108.95e6, rel=1e-4)
