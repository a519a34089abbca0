"""Which network measures images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.evaluation.extractors import ExtractorChoice

REGISTERED = """
import torch
from mvar_core.errors import ConfigError, DataError
from mvar_core.evaluation.extractors import RegisteredExtractor, registered_names
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
assert RegisteredExtractor("tiny").weights_hash != extractor.weights_hash
print("tiny" in registered_names(), "inception-v3-compat" in registered_names())
for make in (
    lambda: RegisteredExtractor("dinov2-vit-b"),
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
    known, absent, offline, odd, small = result.stdout.splitlines()
    assert known == "True False"
    assert absent.startswith(
        "ConfigError torch-fidelity knows no features 'dinov2-vit-b'. Did you mean dinov2-vit-b-14"
    )
    assert offline.startswith("CheckpointError torch-fidelity cannot build offline: no network.")
    assert odd == "DataError odd returns (4, 5, 1) for 4 images; expected features (4, F)."
    assert small == "DataError small fails on images of (4, 8): only 8×8."


@pytest.mark.parametrize("name", ["nothing-like-it", "scans.pt2", "network.pth", "module.ts"])
def test_other_networks_and_files_that_run_code_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    for network in (name, tmp_path / name):
        with pytest.raises(ConfigError, match=name) as caught:
            ExtractorChoice(network, "digits")
        assert "evaluate(features=" in str(caught.value)


def test_nothing_is_fetched_unless_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="dinov2-vit-b-14") as caught:
        ExtractorChoice("dinov2-vit-b-14", "digits")
    assert "--download" in str(caught.value)
    assert ExtractorChoice("dinov2-vit-b-14", "digits", download=True).name == "dinov2-vit-b-14"


def test_a_demo_classifier_that_is_not_there_is_named() -> None:
    choice = ExtractorChoice("/nowhere/a.safetensors", "digits")
    assert choice.name == "demo"
    with pytest.raises((CheckpointError, DataError), match="/nowhere/a.safetensors"):
        choice.load((16, 16), torch.device("cpu"))
