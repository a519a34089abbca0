"""Where the demo classifier comes from."""

import torch

from mvar_core.evaluation import demo
from mvar_core.evaluation.demo import DemoClassifier, default_demo_path


def keep(path, seed):
    network = DemoClassifier(3, (16, 16))
    network.initialise(torch.Generator().manual_seed(seed))
    network.save(path)
    return network.weights_hash


def test_near_before_cached_before_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("MVAR_CACHE", str(tmp_path / "cache"))
    trained = []

    def train(path, image_shape, seed=0):
        trained.append((path, image_shape))
        keep(path, 1)
        return DemoClassifier.load(path)

    monkeypatch.setattr(demo, "train_digits_classifier", train)
    near = tmp_path / "run"
    first = demo.find_classifier([near], (16, 16)).weights_hash
    assert trained == [(default_demo_path((16, 16)), (16, 16))]
    assert demo.find_classifier([near], (16, 16)).weights_hash == first
    assert len(trained) == 1
    nearby = keep(near / demo.CLASSIFIER_FILE, 2)
    assert demo.find_classifier([near], (16, 16)).weights_hash == nearby


def test_digits_are_read_at_the_size_of_the_model():
    images, labels = demo.read_digits("test", (16, 16))
    assert images.shape == (360, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.bincount().min() > 30
