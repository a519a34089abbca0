"""What depends on the classes of samples follows their names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvar_core.evaluation.statistics import FeatureSet
from mvar_core.workflows.evaluate import classifier_accuracy

DIGITS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (None, DIGITS, 1.0),
        (tuple("0123456789"), DIGITS, 1.0),
        (tuple("9876543210"), [6, 8, 5, 8, 4], 1.0),
        (("1", "3", "4", "5"), [1, 0, 2, 0, 0], 0.8),
        (("one", "three", "four", "five"), [1, 0, 2, 0, 3], None),
        (None, [3, 1, 4, 1, 15], None),
    ],
)
def test_a_classifier_of_digits_judges_digits_by_name(names, labels, expected):
    logits = torch.nn.functional.one_hot(torch.tensor(DIGITS), 10).float()
    samples = FeatureSet("demo", "hash", 5, None, logits=logits)
    images = SimpleNamespace(labels=np.array(labels), class_names=names, name="samples")
    assert classifier_accuracy(samples, images) == expected
    assert classifier_accuracy(samples, SimpleNamespace(labels=None, class_names=None, name="x")) is None
