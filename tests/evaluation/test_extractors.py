"""Which network measures images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.evaluation.extractors import ExtractorChoice


@pytest.mark.parametrize("name", ["nothing-like-it", "scans.pt2", "network.pth", "module.ts"])
def test_other_networks_and_files_that_run_code_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK")
    for network in (name, tmp_path / name):
        with pytest.raises(ConfigError, match=name) as caught:
            ExtractorChoice(network, "digits")
        assert "evaluate(features=" in str(caught.value)


def test_a_demo_classifier_that_is_not_there_is_named() -> None:
    choice = ExtractorChoice("/nowhere/a.safetensors", "digits")
    assert choice.name == "demo"
    with pytest.raises(CheckpointError, match="/nowhere/a.safetensors"):
        choice.load((16, 16), torch.device("cpu"))


@pytest.mark.parametrize(
    "changed", [{"name": None}, {"name": 3}, {"weights_hash": b"x"}, {"dim": 0}, {"dim": "4"}, {"dim": None}]
)
def test_an_extractor_that_does_not_describe_itself_is_refused(changed: dict[str, object]) -> None:
    about: Any = SimpleNamespace(**{"name": "mine", "weights_hash": "abc", "dim": 4, **changed})
    with pytest.raises(ConfigError, match="name, weights_hash and dim"):
        ExtractorChoice(about, "digits")


def test_a_classifier_of_another_size_is_refused_before_images_are_read(classifier: Path) -> None:
    choice = ExtractorChoice(classifier, "digits")
    assert choice.load((16, 16), torch.device("cpu")).name == "demo"
    with pytest.raises(DataError, match="16×16 images, found 16×32"):
        choice.load((16, 32), torch.device("cpu"))
