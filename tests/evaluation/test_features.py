from __future__ import annotations

import hashlib
import http.client
import io
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mvar_core.errors import CheckpointError, DataError
from mvar_core.evaluation import features as module
from mvar_core.evaluation.features import INCEPTION, InceptionExtractor, load_inception
from mvar_core.evaluation.fidelity import fidelity_module
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.evaluation.statistics import collect


def filled_network() -> nn.Module:
    """The Inception network with weights that carry a signal through all its layers; torch's own start loses it."""
    base = fidelity_module().FeatureExtractorInceptionV3

    class Filled(base):  # type: ignore[misc,valid-type]
        def load_state_dict(self, *_arguments: object) -> None:
            """Keep what the layers start with."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network: nn.Module = Filled(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
    )
    source = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = 0.5 + torch.rand(layer.num_features, generator=source)
            layer.bias.data = 0.1 * torch.randn(layer.num_features, generator=source)
        elif isinstance(layer, nn.Linear):
            layer.weight.data = torch.randn(layer.weight.shape, generator=source) / 45
            layer.bias.data = 100 * torch.ones(layer.out_features)
    return network


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return filled_network()


@pytest.fixture(scope="module")
def extractor(network: nn.Module) -> InceptionExtractor:
    return InceptionExtractor(network.state_dict(), "filled")


def pictures(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (nn.functional.interpolate(coarse, size=(40, 48), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


@torch.inference_mode()
def test_features_are_those_of_the_papers_layers(network: nn.Module, extractor: InceptionExtractor) -> None:
    images = pictures(2)
    kept: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept["mixed"] = output

    handle = network.get_submodule("Mixed_6d").register_forward_hook(keep)
    pool, _ = network(images)
    handle.remove()
    found = extractor(images)

    assert found.pool.shape == (2, 2048)
    assert found.pool.dtype == torch.float32
    assert found.pool.std() > 1e-2
    assert (found.pool[0] - found.pool[1]).abs().max() > 1e-2
    assert torch.equal(found.pool, pool)

    assert found.logits is not None
    assert found.logits.shape == (2, 1008)
    without_bias = found.pool @ network.get_submodule("fc").weight.T  # type: ignore[operator]
    assert torch.allclose(found.logits, without_bias, rtol=1e-4, atol=1e-4)

    # The layer's output starts with its 1×1 branch, whose first 7 channels are laid out position by position.
    mixed = kept["mixed"]
    assert mixed.shape == (2, 768, 17, 17)
    assert found.spatial is not None
    assert found.spatial.shape == (2, 2023)
    assert found.spatial.std() > 1e-2
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (3, 11, 5), (16, 16, 6)]:
        assert torch.equal(found.spatial[:, (row * 17 + column) * 7 + channel], mixed[:, channel, row, column])
    assert torch.equal(found.spatial, mixed[:, :7].permute(0, 2, 3, 1).reshape(2, -1))


def test_features_do_not_depend_on_the_batch(extractor: InceptionExtractor) -> None:
    images = pictures(3)
    together = collect(extractor, [images], 3)
    apart = collect(extractor, images.flip(0).split(2), 3)
    assert together.features is not None
    assert apart.features is not None
    assert together.spatial is not None
    assert apart.spatial is not None
    scale = together.features.abs().max()
    assert torch.allclose(together.features, apart.features.flip(0), atol=1e-5 * float(scale))
    spatial = torch.from_numpy(together.spatial["sigma"])
    assert torch.allclose(spatial, torch.from_numpy(apart.spatial["sigma"]), atol=1e-4 * float(spatial.abs().max()))


def test_names_itself_and_knows_whether_papers_use_its_weights(extractor: InceptionExtractor) -> None:
    assert (extractor.name, extractor.dim, extractor.weights_hash) == ("inception", 2048, "filled")
    assert not extractor.comparable_to_papers


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])
def test_refuses_what_is_not_uint8_rgb(extractor: InceptionExtractor, images: Tensor) -> None:
    with pytest.raises(DataError, match=r"uint8 images \(B, 3, H, W\)"):
        extractor(images)


def test_building_one_leaves_the_global_generator_alone(network: nn.Module) -> None:
    before = torch.random.get_rng_state()
    InceptionExtractor(network.state_dict(), INCEPTION.sha256)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses_weights_of_another_network() -> None:
    with pytest.raises(CheckpointError, match=r"do not fit the Inception network: .*Conv2d_1a_3x3"):
        InceptionExtractor({"weight": torch.zeros(1)}, "other")


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights; returns the folder in which torch keeps downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(INCEPTION.variable, raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def publish(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let this be the published file."""
    published = replace(INCEPTION, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(module, "INCEPTION", published)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content that passes for the published file of weights."""
    content = io.BytesIO()
    torch.save({"weight": torch.arange(3)}, content)
    publish(monkeypatch, content.getvalue())
    return content.getvalue()


def test_absent_weights_say_where_to_get_and_to_put_them(no_weights: Path) -> None:
    with pytest.raises(DataError) as caught:
        module.INCEPTION.find()
    message = str(caught.value)
    for part in ("https://github.com/toshas", "95,628,359", INCEPTION.sha256, str(no_weights), "--inception-weights"):
        assert part in message
    assert "\n" not in message


def test_a_named_file_must_exist(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"/nowhere/a\.pth does not exist"):
        module.INCEPTION.find("/nowhere/a.pth")
    monkeypatch.setenv(INCEPTION.variable, "/nowhere/b.pth")
    with pytest.raises(DataError, match=r"/nowhere/b\.pth does not exist"):
        module.INCEPTION.find()


@pytest.mark.parametrize("name", INCEPTION.names)
def test_finds_the_verified_file(
    no_weights: Path, pretend: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, named, given = no_weights / name, tmp_path / "named.pth", tmp_path / "given.pth"
    for path in (cached, named, given):
        path.write_bytes(pretend)
    assert module.INCEPTION.find() == cached
    monkeypatch.setenv(INCEPTION.variable, str(named))
    assert module.INCEPTION.find() == named
    assert module.INCEPTION.find(given) == given


def test_refuses_files_of_another_size_or_content(no_weights: Path, pretend: bytes, tmp_path: Path) -> None:
    (no_weights / INCEPTION.names[0]).write_bytes(pretend[:-1])
    with pytest.raises(DataError, match=f"it has {len(pretend) - 1:,} bytes, expected {len(pretend):,}"):
        module.INCEPTION.find()
    other = tmp_path / "other.pth"
    other.write_bytes(pretend[:-1] + bytes([pretend[-1] ^ 1]))
    with pytest.raises(DataError, match=r"its SHA-256 is [0-9a-f]{64}, expected"):
        load_inception(other)


def test_a_verified_file_that_is_not_weights_of_the_network_is_one_clear_error(
    no_weights: Path, pretend: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pretend)
    with pytest.raises(CheckpointError, match="weight"):
        load_inception(path)
    path.write_bytes(b"x" * 20)
    publish(monkeypatch, b"x" * 20)
    with pytest.raises(CheckpointError, match=str(path)):
        load_inception(path)


def test_loads_the_verified_file(
    no_weights: Path, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    publish(monkeypatch, path.read_bytes())
    loaded = load_inception(path)
    assert loaded.comparable_to_papers
    assert loaded.weights_hash == module.INCEPTION.sha256
    state = loaded._network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> list[str]:
    """Answer every download with this; returns the list of addresses that were asked for."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert timeout > 0
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


def test_downloads_the_weights_once(no_weights: Path, pretend: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvar_core.io.weights.DOWNLOAD_BLOCK", 500)
    asked = serve(monkeypatch, pretend)
    seen: list[tuple[int, int]] = []
    path = module.INCEPTION.download(lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == pretend
    assert path == module.INCEPTION.find() == no_weights / INCEPTION.names[0]
    assert seen[0] == (500, len(pretend))
    assert seen[-1] == (len(pretend), len(pretend))
    assert asked == [INCEPTION.url]


def test_a_download_replaces_a_damaged_file(no_weights: Path, pretend: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (no_weights / INCEPTION.names[0]).write_bytes(b"cut")
    serve(monkeypatch, pretend)
    assert module.INCEPTION.download().read_bytes() == pretend


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (urllib.error.URLError("no route to host"), "cannot be downloaded: .*no route to host"),
        (TimeoutError("timed out"), "cannot be downloaded: timed out"),
        (http.client.IncompleteRead(b"x"), "cannot be downloaded: IncompleteRead"),
        (b"<html>", "does not hold the Inception weights: it has 6 bytes"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    no_weights: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception, message: str
) -> None:
    serve(monkeypatch, answer)
    with pytest.raises(DataError, match=message) as caught:
        module.INCEPTION.download()
    for part in (INCEPTION.url, INCEPTION.sha256, str(no_weights)):
        assert part in str(caught.value)
    assert list(no_weights.iterdir()) == []


def test_inception_features_carry_all_metrics(extractor: InceptionExtractor) -> None:
    sets = []
    for seed in (1, 2):
        coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) ** seed
        images = (nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
        sets.append(collect(extractor, images.split(3), 5))
    scores = evaluate_features(sets[0], sets[1], splits=2)
    assert scores["reasons"] == {}
    assert scores["fid"] > 1
    assert scores["sfid"] > 1
    assert scores["inception_score"] > 1
    assert scores["kid"] > 0
    assert 0 <= scores["precision"] <= 1
    assert 0 <= scores["recall"] <= 1
    same = evaluate_features(sets[0], sets[0], ["precision", "recall"])
    assert (same["precision"], same["recall"]) == (1, 1)
