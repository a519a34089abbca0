from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

Write = Callable[..., Path]
Piece = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """Two photographs, uint8 (427, 640, 3)."""
    return [np.ascontiguousarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="session")
def piece(photographs: list[np.ndarray]) -> Piece:
    """A piece of a photograph with much to see; different for every number."""

    def cut(number: int = 0, shape: tuple[int, int] = (40, 56)) -> np.ndarray:
        top, left = 200 + 7 * number % 100, 100 + 11 * number % 300
        return photographs[number % 2][top : top + shape[0], left : left + shape[1]]

    return cut


@pytest.fixture
def write(tmp_path: Path, piece: Piece) -> Write:
    """Write a piece of a photograph to a file under tmp_path."""

    def write_image(name: str, number: int = 0, shape: tuple[int, int] = (40, 56), **options: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(piece(number, shape)).save(path, **options)
        return path

    return write_image


@pytest.fixture
def class_folders(tmp_path: Path, write: Write) -> Path:
    """Three classes with 3, 2 and 2 images."""
    for number, name in enumerate(["cat/a.png", "cat/b.jpg", "cat/more/c.png", "ant/a.png", "ant/b.bmp", "bee/a.webp"]):
        write(f"pictures/{name}", number)
    write("pictures/bee/b.tiff", 6)
    (tmp_path / "pictures/cat/notes.txt").write_text("not an image")
    (tmp_path / "pictures/.hidden.png").write_bytes(b"not an image")
    return tmp_path / "pictures"
