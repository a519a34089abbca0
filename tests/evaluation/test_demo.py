from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvar_core.errors import CheckpointError, DataError
from mvar_core.evaluation.demo import (
    DemoClassifier,
    DemoExtractor,
    class_mean_images,
    default_demo_path,
    train_classifier,
)
from mvar_core.evaluation.scores import evaluate_features
from mvar_core.evaluation.statistics import FeatureSet, collect

Digits = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def classifier(digits: Digits) -> DemoClassifier:
    return train_classifier(*digits["train"], 10, seed=0, test=digits["test"])


def test_reads_digits_it_has_not_seen(classifier: DemoClassifier, digits: Digits) -> None:
    images, labels = digits["test"]
    assert classifier.accuracy(images, labels) >= 0.985
    assert classifier.measured_accuracy == classifier.accuracy(images, labels)
    assert classifier.accuracy(images, labels.roll(1)) < 0.3


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone(digits: Digits) -> None:
    images, labels = digits["train"]
    before = torch.random.get_rng_state()
    steps: list[tuple[int, int]] = []
    first = train_classifier(images, labels, 10, seed=1, steps=6, progress=lambda *step: steps.append(step))
    again = train_classifier(images, labels, 10, seed=1, steps=6)
    other = train_classifier(images, labels, 10, seed=2, steps=6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert steps == [(step, 6) for step in range(1, 7)]
    assert first.weights_hash == again.weights_hash != other.weights_hash


def features_of(classifier: DemoClassifier, images: Tensor, batch: int = 200) -> FeatureSet:
    return collect(DemoExtractor(classifier), images.split(batch), len(images))


def test_demo_fid_tells_real_digits_from_class_means_and_from_noise(classifier: DemoClassifier, digits: Digits) -> None:
    reference = features_of(classifier, digits["train"][0])
    noise = torch.randint(0, 256, (300, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def fid(images: Tensor) -> float:
        return float(evaluate_features(features_of(classifier, images), reference, ["fid"])["fid"])

    real, means = fid(digits["test"][0]), fid(class_mean_images(*digits["train"]))
    assert real < 0.1 * means
    assert fid(noise) > means


def test_extractor_gives_features_and_classes(classifier: DemoClassifier, digits: Digits) -> None:
    images, labels = digits["test"]
    extractor = DemoExtractor(classifier)
    found = extractor(images)
    assert found.pool.shape == (360, extractor.dim)
    assert found.logits is not None
    assert found.spatial is None
    assert (found.logits.argmax(dim=1) == labels).double().mean() == classifier.measured_accuracy
    assert (extractor.name, extractor.comparable_to_papers) == ("demo", False)
    assert extractor.weights_hash == classifier.weights_hash
    assert torch.allclose(found.pool[5:9], extractor(images[5:9]).pool, atol=1e-5)


def test_saves_and_loads(classifier: DemoClassifier, digits: Digits, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "classifier.safetensors"
    classifier.save(path)
    loaded = DemoClassifier.load(path)
    assert loaded.image_shape == (32, 32)
    assert loaded.measured_accuracy == classifier.measured_accuracy
    assert loaded.weights_hash == classifier.weights_hash
    assert torch.equal(loaded(digits["test"][0][:4]), classifier(digits["test"][0][:4]))
    assert list(path.parent.iterdir()) == [path]


def test_says_what_is_wrong_with_a_file(classifier: DemoClassifier, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors does not exist"):
        DemoClassifier.load(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match=r"classifier\.safetensors"):
        DemoClassifier.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="its format is None"):
        DemoClassifier.load(path)

    from safetensors import safe_open

    classifier.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["head.bias"] += 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="weights are not those that were saved"):
        DemoClassifier.load(path)
    del tensors["head.bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is damaged: .*head\.bias"):
        DemoClassifier.load(path)
    classifier.save(path)
    tensors, description = load_file(path), json.loads(metadata["description"])
    for changed in (
        "{}", "[]", "nothing", "[" * 10**5,
        *(json.dumps({**description, **values}) for values in (
            {"num_classes": 10**12}, {"num_classes": -1}, {"num_classes": "3"}, {"image_shape": "ab"},
            {"image_shape": [0, 0]}, {"image_shape": [32, 10**9]}, {"image_shape": None}, {"accuracy": "x"},
        )),
    ):  # fmt: skip
        save_file(tensors, path, metadata={**metadata, "description": changed})
        with pytest.raises(CheckpointError, match=r"classifier\.safetensors"):
            DemoClassifier.load(path)
    for change in (lambda each: each * float("nan"), lambda each: each.long(), lambda each: each.to(torch.complex64)):
        save_file({name: change(each) for name, each in tensors.items()}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"classifier\.safetensors"):
            DemoClassifier.load(path)


def test_is_made_for_images_of_any_one_size() -> None:
    images = torch.randint(0, 256, (10, 3, 24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(10) % 2
    classifier = train_classifier(images, labels, 2, steps=2)
    assert classifier.image_shape == (24, 40)
    with pytest.raises(DataError, match="for 24×40 images, found 32×32"):
        classifier.accuracy(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))


def test_refuses_labels_and_images_that_do_not_fit() -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match="from 0 to 3; expected 0 to 2"):
        train_classifier(images, torch.arange(4), 3)
    with pytest.raises(DataError, match="4 images and 3 labels"):
        train_classifier(images, torch.arange(3), 3)
    with pytest.raises(DataError, match="uint8 images"):
        train_classifier(images.float(), torch.zeros(4, dtype=torch.int64), 3)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVAR_CACHE", "/elsewhere")
    assert default_demo_path() == Path("/elsewhere/demo-digits-32.safetensors")
    assert default_demo_path((32, 48)) == Path("/elsewhere/demo-digits-32x48.safetensors")
    monkeypatch.delenv("MVAR_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_demo_path() == Path("/home/somebody/.cache/mvar/demo-digits-32.safetensors")
