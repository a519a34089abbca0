from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's digits at 32×32: train (1437) and test (360), uint8 (N, 3, 32, 32) and labels."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    small = np.round(bundle.images / 16 * 255).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small]
    images = torch.from_numpy(np.stack(large))[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bundle.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=bundle.target, random_state=0)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
