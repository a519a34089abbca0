from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.custom import ExportedExtractor
from mvar_core.evaluation.statistics import collect
from mvar_core.io.files import sha256_of_file


class Network(nn.Module):
    def __init__(self, side: int = 8):
        super().__init__()
        self.layer = nn.Linear(3 * side * side, 5)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=torch.Generator().manual_seed(0)))
            self.layer.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1).float() / 255)


class Changed(nn.Module):
    """The network's features, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Any]):
        super().__init__()
        self.network, self.change = Network(), change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.network(images))


class AnySize(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


BATCH: dict[int, Any] = {0: torch.export.Dim("batch")}


def pictures(count: int, side: int = 8) -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=source, dtype=torch.uint8)


def export(
    path: Path, network: nn.Module, images: Tensor | None = None, dynamic: dict[int, Any] | None = BATCH
) -> Path:
    program = torch.export.export(
        network.eval(), (pictures(2) if images is None else images,), dynamic_shapes=(dynamic,)
    )
    torch.export.save(program, path)
    return path


def test_measures_with_an_exported_program(tmp_path: Path) -> None:
    path = export(tmp_path / "own-net.pt2", Network())
    extractor = ExportedExtractor(path)
    assert (extractor.name, extractor.dim, extractor.comparable_to_papers) == ("own-net", 5, False)
    assert extractor.weights_hash == sha256_of_file(path)
    images = pictures(7)
    with torch.inference_mode():
        expected = Network()(images)
    for batch in (1, 3, 7):
        found = collect(extractor, images.split(batch), 7).features
        assert found is not None
        assert torch.allclose(found, expected, atol=1e-5)
    assert extractor(images).logits is None


def test_a_program_cannot_pass_itself_off_as_inception(tmp_path: Path) -> None:
    assert ExportedExtractor(export(tmp_path / "inception.pt2", Network())).name == "inception.pt2"


def test_image_sizes_are_those_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exported for images of 8×8 pixels, found 9×9"):
        ExportedExtractor(export(tmp_path / "fixed.pt2", Network()))(pictures(2, side=9))
    dynamic = {**BATCH, 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    extractor = ExportedExtractor(export(tmp_path / "any.pt2", AnySize(), dynamic=dynamic))
    assert extractor(pictures(2, side=31)).pool.shape == (2, 3)


@pytest.mark.parametrize(
    ("network", "images", "dynamic", "message"),
    [
        (Network(), None, None, "exported for batches of 2 images only"),
        (Network(), torch.rand(2, 3, 8, 8), BATCH, r"takes float32 \(\?, 3, 8, 8\); expected uint8"),
        (nn.Flatten(), None, BATCH, r"returns \(\?, 192\); expected floats"),
        (Changed(lambda features: features[:, :, None]), None, BATCH, r"returns \(\?, 5, 1\); expected floats"),
        (Changed(lambda features: (features, features)), None, BATCH, r"returns \(\?, 5\), \(\?, 5\); expected floats"),
    ],
)
def test_programs_with_other_inputs_or_outputs_are_refused(
    tmp_path: Path, network: nn.Module, images: Tensor | None, dynamic: dict[int, Any] | None, message: str
) -> None:
    path = export(tmp_path / "odd.pt2", network, images, dynamic)
    with pytest.raises(DataError, match=message) as caught:
        ExportedExtractor(path)
    assert "torch.export.Dim('batch')" in str(caught.value)


def test_features_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    dark = ExportedExtractor(export(tmp_path / "log.pt2", Changed(lambda features: features / features.abs())))
    images = pictures(6)
    images[4] = 0
    with pytest.raises(DataError, match=r"features of image 4 \(counted from 0\) are not finite"):
        collect(dark, images.split(3), 6)


def test_files_that_are_no_programs_are_one_clear_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "odd.pt2"
    with pytest.raises(DataError, match=r"odd\.pt2 does not exist"):
        ExportedExtractor(path)
    path.write_text("text")
    with pytest.raises(DataError, match="but is not one"):
        ExportedExtractor(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="but is not one"):
        ExportedExtractor(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/__torch__.py", "")
    with pytest.raises(DataError, match="TorchScript"):
        ExportedExtractor(path)
    # What torch logs of its own accord before it raises is not shown.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("odd/archive_format", "pt2")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="cannot be loaded as an exported program"):
        ExportedExtractor(path)
    assert caplog.text == ""


REGISTERED = """
import torch
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.custom import RegisteredExtractor, registered_names
from mvar_core.evaluation.fidelity import fidelity_module

fidelity = fidelity_module()


class Tiny(fidelity.FeatureExtractorBase):
    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)
        self.layer = torch.nn.Linear(3 * 8 * 8, 5)
        print("loading ...")

    def forward(self, images):
        features = self.layer(images[:, :, :8, :8].flatten(1).float() / 255)
        return (features[:, :, None],) if self.name == "odd" else (features,)

    @staticmethod
    def get_provided_features_list():
        return ("pool",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"fid": "pool"}[metric]


class Offline(Tiny):
    def __init__(self, *arguments, **options):
        raise OSError("no network")


class Small(Tiny):
    def forward(self, images):
        assert images.shape[2:] == (8, 8), "only 8×8"
        return super().forward(images)

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.rand(1, 3, 8, 8)


fidelity.register_feature_extractor("tiny", Tiny)
fidelity.register_feature_extractor("odd", Tiny)
fidelity.register_feature_extractor("offline", Offline)
fidelity.register_feature_extractor("small", Small)
assert RegisteredExtractor("small").dim == 5
before = torch.random.get_rng_state()
extractor = RegisteredExtractor("tiny")
assert torch.equal(torch.random.get_rng_state(), before)
images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
with torch.inference_mode():
    expected = extractor._network.layer(images.flatten(1).float() / 255)
assert extractor.dim == 5 and extractor.name == "tiny" and not extractor.comparable_to_papers
assert torch.allclose(extractor(images).pool, expected)
assert len(extractor.weights_hash) == 64
other = RegisteredExtractor("tiny")
other._network.load_state_dict(extractor._network.state_dict())
from mvar_core.evaluation.custom import _hash_of
assert _hash_of(other._network) == extractor.weights_hash != other.weights_hash
print("tiny" in registered_names(), "inception-v3-compat" in registered_names())
for make in (
    lambda: RegisteredExtractor("dinov2-vit-b"),
    lambda: RegisteredExtractor("inception-v3-compat"),
    lambda: RegisteredExtractor("offline"),
    lambda: RegisteredExtractor("odd")(images),
    lambda: RegisteredExtractor("small")(images[:, :, :4]),
):
    try:
        make()
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_measures_with_what_torch_fidelity_has_registered() -> None:
    # In a process of its own: torch-fidelity keeps registered extractors for good.
    result = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    known, absent, inception, offline, odd, small = result.stdout.splitlines()
    assert known == "True False"
    assert absent.startswith(
        "ConfigError torch-fidelity knows no features 'dinov2-vit-b'. Did you mean dinov2-vit-b-14"
    )
    assert inception.endswith("Use --features inception.")
    assert offline.startswith("CheckpointError torch-fidelity cannot build offline: no network.")
    assert odd == "DataError odd returns (4, 5, 1) for 4 images; expected features (4, F)."
    assert small == "DataError small fails on images of (4, 8): only 8×8."


def test_unknown_names_raise_configuration_errors() -> None:
    from mvar_core.evaluation.custom import RegisteredExtractor

    with pytest.raises(ConfigError, match="knows no features"):
        RegisteredExtractor("nothing-like-it")
