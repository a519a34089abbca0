from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from mvar_core.errors import CheckpointError, DataError
from mvar_core.training.perceptual import LPIPS, VGG16, PerceptualLoss, load_perceptual_loss

WIDTHS = (64, 128, 256, 512, 512)
POSITIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of the published shapes that carry a signal through all layers, and nothing of the classifier."""
    source = torch.Generator().manual_seed(0)
    vgg, channels = {}, 3
    for positions, width in zip(POSITIONS, WIDTHS, strict=True):
        for position in positions:
            deviation = (2 / (9 * channels)) ** 0.5
            vgg[f"features.{position}.weight"] = torch.randn(width, channels, 3, 3, generator=source) * deviation
            vgg[f"features.{position}.bias"] = 0.1 * torch.randn(width, generator=source)
            channels = width
    vgg["classifier.0.bias"] = torch.zeros(3)
    lpips = {
        f"lin{index}.model.1.weight": torch.rand(1, width, 1, 1, generator=source) / width
        for index, width in enumerate(WIDTHS)
    }
    return vgg, lpips


@pytest.fixture(scope="module")
def files(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name, tensors in zip(("vgg.pth", "lpips.pth"), published, strict=True):
        torch.save(tensors, folder / name)
    return folder / "vgg.pth", folder / "lpips.pth"


@pytest.fixture(scope="module")
def loss(published) -> PerceptualLoss:
    loss = PerceptualLoss()
    loss.load_published(*published)
    return loss


def pictures(seed: int) -> torch.Tensor:
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(40, 33), mode="bicubic").clamp(-1, 1)


def librarys_lpips(published) -> nn.Module:
    """torch-fidelity's class with the same weights; its constructor would fetch others."""
    from mvar_core.evaluation.fidelity import fidelity_module

    library = fidelity_module("sample_similarity_lpips")
    vgg, lpips = published
    layers: list[nn.Module] = []
    channels = 3
    for positions, width in zip(POSITIONS, WIDTHS, strict=True):
        for _ in positions:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    features = nn.Sequential(*layers)
    features.load_state_dict({k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")})
    network = library.VGG16features.__new__(library.VGG16features)
    nn.Module.__init__(network)
    network.N_slices = 5
    for number, (start, stop) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1):
        setattr(network, f"slice{number}", features[start:stop])
    judge = library.SampleSimilarityLPIPS.__new__(library.SampleSimilarityLPIPS)
    nn.Module.__init__(judge)
    judge.sample_similarity_resize = judge.sample_similarity_dtype = None
    judge.chns, judge.L = list(WIDTHS), len(WIDTHS)
    judge.lins = []
    for index, width in enumerate(WIDTHS):
        layer = library.NetLinLayer(width, use_dropout=True)
        layer.load_state_dict({"model.1.weight": lpips[f"lin{index}.model.1.weight"]})
        judge.lins.append(layer.eval())
    judge.net = network
    return judge.eval()


def test_it_is_lpips_as_torch_fidelity_computes_it(loss, published):
    judge = librarys_lpips(published)
    images, targets = pictures(1).requires_grad_(), pictures(2)
    found = loss(images, targets)
    expected = judge((images + 1) * 127.5, (targets + 1) * 127.5).flatten()
    assert expected.min() > 0.005
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), images, retain_graph=True)[0] for value in (found, expected)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


def test_equal_images_have_no_distance_and_a_finite_gradient(loss):
    images = pictures(1)
    assert loss(images, images).abs().max() == 0
    # Weights under which features vanish everywhere, where the root of a sum of squares has no gradient.
    dead = PerceptualLoss()
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.fill_(-1.0)
    varied = images.clone().requires_grad_()
    dead(varied, pictures(2)).sum().backward()
    assert varied.grad.isfinite().all()


def test_files_are_read_and_other_weights_are_said(files, loss, caplog):
    with caplog.at_level(logging.WARNING, "mvar"):
        loaded, hashes = load_perceptual_loss(*files)
    images, targets = pictures(1), pictures(2)
    assert torch.equal(loaded(images, targets), loss(images, targets))
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert "not the published vgg16-397923af.pth" in caplog.text
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_missing_file_says_where_to_get_it_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv(VGG16.variable, raising=False)
    with pytest.raises(DataError, match="vgg16-397923af.pth") as caught:
        VGG16.find()
    for part in (VGG16.url, VGG16.sha256, "--vgg-weights", str(tmp_path / "checkpoints"), "perceptual.weight=0"):
        assert part in caught.value.hint
    with pytest.raises(DataError, match=r"--lpips-weights: .*nowhere does not exist"):
        LPIPS.find(tmp_path / "nowhere")
    monkeypatch.setenv(LPIPS.variable, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=rf"\${LPIPS.variable}: .*nowhere does not exist"):
        LPIPS.find()


def test_a_damaged_file_in_the_cache_is_refused_and_a_whole_one_found(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv(LPIPS.variable, raising=False)
    path = tmp_path / "checkpoints" / "vgg.pth"
    path.parent.mkdir()
    path.write_bytes(b"half")
    with pytest.raises(DataError, match="vgg.pth does not hold"):
        LPIPS.find()
    whole = replace(LPIPS, sha256=hashlib.sha256(b"half").hexdigest())
    assert whole.find() == path


def test_files_of_something_else_are_refused(files, tmp_path):
    vgg, lpips = files
    with pytest.raises(CheckpointError, match="not the VGG16 weights: features.0.weight is missing"):
        load_perceptual_loss(lpips, lpips)
    torch.save(
        {"lin0.model.1.weight": torch.zeros(1, 9, 1, 1)},
        tmp_path / "other.pth",
    )
    with pytest.raises(CheckpointError, match=r"not the LPIPS weights: lin\d.model.1.weight"):
        load_perceptual_loss(vgg, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a file of tensors")
    with pytest.raises(CheckpointError, match=r"text\.pth is"):
        load_perceptual_loss(vgg, tmp_path / "text.pth")
