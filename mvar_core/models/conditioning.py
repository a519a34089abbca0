"""What a transformer is conditioned on: a class label for each image, or a vector that the user computed.

Everything else handles *conditions*: one tensor with a row for each image, which a `Conditioner` turns into the
embedding that AdaLN and the start token are made of. One value is the null condition; training puts it in a fraction of
the rows, guidance asks for it.
"""

# Shape suffixes: B batch, U distinct conditions, C width of the transformer, X values of a condition's vector.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mvar_core.arguments import tensor_argument
from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError, DataError
from mvar_core.models.linear import RowStableLinear
from mvar_core.runtime import generator

Conditions = Sequence[int] | Sequence[Sequence[float]] | Tensor | np.ndarray
"""Class labels, one for each image, or vectors (images, X)."""


@dataclass(frozen=True)
class Conditioning:
    """What conditions contribute to every layer: computed once per condition, laid out for a batch where it is used.

    Embeddings of the conditions, AdaLN vectors of each block and, in float32, of the head (scale, shift); `rows_B` is
    which of the U entries each row of the batch has, None where row i has entry i.
    """

    embedding_UC: Tensor
    blocks_U6C: tuple[Tensor, ...]
    head_U2C: Tensor
    rows_B: Tensor | None = None

    def select(self, rows: Tensor) -> Conditioning:
        """The conditioning of a batch whose rows have the given entries, which may repeat."""
        return replace(self, rows_B=rows if self.rows_B is None else self.rows_B[rows])

    def laid_out(self, table: Float[Tensor, "U ..."]) -> Float[Tensor, "B ..."]:
        """The entry of each row of the batch, out of one of the tables."""
        return table if self.rows_B is None else table[self.rows_B]


class ClassConditioner(nn.Embedding):
    """Embeddings of class labels from a table, whose last row, behind the last class, is the null label's."""

    name = "class_embedding"
    """Under which the transformer holds it, and so how the names of its parameters begin."""
    tables = True
    """Whether its matrices are tables, which weight decay leaves alone."""

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes + 1, width)
        self.num_classes = num_classes

    def read(self, conditions: Conditions) -> Int[Tensor, " B"]:
        """Labels as a tensor on the CPU; ConfigError where they are not what the model is conditioned on."""
        expected = "The model is conditioned on classes and expects one label per image, a whole number"
        labels_B = tensor_argument(conditions, expected, "whole", (None,), error=ConfigError).cpu()
        if labels_B.numel() and not 0 <= int(labels_B.min()) <= int(labels_B.max()) <= self.num_classes:
            wrong = next(label for label in labels_B.tolist() if not 0 <= label <= self.num_classes)
            raise ConfigError(f"class {wrong} does not exist; the model has classes 0 … {self.num_classes - 1}.")
        return labels_B

    def null(self, count: int, device: torch.device | str = "cpu") -> Int[Tensor, " B"]:
        """`count` null conditions."""
        return torch.full((count,), self.num_classes, device=device)

    def drop(self, conditions: Int[Tensor, " B"], dropped_B: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The conditions, of which those that are dropped become the null condition."""
        return torch.where(dropped_B, self.num_classes, conditions)

    def distinct(self, conditions: Int[Tensor, " B"]) -> tuple[Int[Tensor, " U"], Int[Tensor, " B"]]:
        """The different conditions, U of them, and which of those each row is."""
        labels_U, rows_B = conditions.unique(return_inverse=True)
        return labels_U, rows_B

    @staticmethod
    def null_of(state: Mapping[str, Tensor]) -> Float[Tensor, " C"]:
        """The null condition's embedding in the state of such a conditioner."""
        return state["weight"][-1]

    def with_null(self, null_C: Float[Tensor, " C"]) -> dict[str, Tensor]:
        """This conditioner's state with another embedding of the null condition."""
        table = self.weight.detach().clone()
        table[-1] = null_C
        return {"weight": table}

    def examples(self, count: int) -> Int[Tensor, " B"]:
        """`count` conditions to measure with, as different from each other as can be."""
        return torch.arange(count) * 37 % self.num_classes

    def check_data(self, conditions: Tensor) -> None:
        """Refuse what comes with tokens to train on where it is no condition of this model (DataError)."""
        if conditions.ndim != 1 or conditions.is_floating_point():
            raise DataError(f"The tokens come with {_described(conditions)}; the model expects class labels.")
        if int(conditions.max()) >= self.num_classes:
            raise DataError(
                f"The tokens hold label {int(conditions.max())}; the model has {self.num_classes} classes.",
                "Set transformer.num_classes to the number of classes of the data.",
            )

    def labels(self, conditions: Int[Tensor, " B"]) -> list[int]:
        """The class label of each condition; -1 where it is none."""
        return conditions.tolist()


class VectorConditioner(nn.Module):
    """Vectors that the user computed, projected to the width; its methods are those of `ClassConditioner`.

    Among the conditions a row of nan is the null condition, whose embedding is learned: so conditions stay one tensor,
    whatever splits or gathers them. Vectors of length 1 start with embeddings of the size that class tables have.
    """

    name = "vector_embedding"
    tables = False

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.dim = dim
        self.projection = RowStableLinear(dim, width)
        self.no_vector = nn.Parameter(torch.zeros(width))

    def forward(self, conditions: Float[Tensor, "B X"]) -> Float[Tensor, "B C"]:
        """The embedding of each vector, in the dtype of the parameters."""
        absent_B1 = conditions[:, :1].isnan()
        # Zeros rather than nan go through the product: a gradient of 0 times nan would be nan.
        vectors_BX = torch.where(absent_B1, 0, conditions).to(self.no_vector.dtype)
        embedding_BC = self.projection(vectors_BX).to(self.no_vector.dtype)
        return torch.where(absent_B1, self.no_vector, embedding_BC)

    def read(self, conditions: Conditions) -> Float[Tensor, "B X"]:
        """Vectors on the CPU in float32; a row of nan stands for none."""
        expected = f"The model is conditioned on vectors (images, {self.dim})"
        if getattr(conditions, "ndim", 2) == 3:
            expected += " (mvar_core.models.vectors.pool_sequence makes them of sequences)"
        vectors_BX = tensor_argument(conditions, expected, "real", (None, self.dim), (0,), error=ConfigError)
        vectors_BX = vectors_BX.cpu().float().view(-1, self.dim)
        usable_B = vectors_BX.isfinite().all(1) | vectors_BX.isnan().all(1)
        if not usable_B.all():
            raise ConfigError(f"Vector {int(usable_B.int().argmin())} holds values that are not finite.")
        return vectors_BX

    def null(self, count: int, device: torch.device | str = "cpu") -> Float[Tensor, "B X"]:
        """Rows of nan."""
        return torch.full((count, self.dim), torch.nan, device=device)

    def drop(self, conditions: Float[Tensor, "B X"], dropped_B: Bool[Tensor, " B"]) -> Float[Tensor, "B X"]:
        """The vectors, of which those that are dropped become nan."""
        return torch.where(dropped_B.unsqueeze(1), torch.nan, conditions)

    def distinct(self, conditions: Float[Tensor, "B X"]) -> tuple[Float[Tensor, "U X"], Int[Tensor, " B"]]:
        """The different vectors, by their bits, since nan does not equal itself; and which of them each row is."""
        bits = conditions.cpu().contiguous().view(torch.int32)
        bits_UX, rows_B = bits.unique(dim=0, return_inverse=True)
        return bits_UX.view(torch.float32).to(conditions.device), rows_B.to(conditions.device)

    @staticmethod
    def null_of(state: Mapping[str, Tensor]) -> Float[Tensor, " C"]:
        """The learned embedding."""
        return state["no_vector"]

    def with_null(self, null_C: Float[Tensor, " C"]) -> dict[str, Tensor]:
        """The projection as it is, with another learned embedding."""
        return {**self.state_dict(), "no_vector": null_C.to(self.no_vector)}

    def examples(self, count: int) -> Float[Tensor, "B X"]:
        """Random vectors of length 1."""
        vectors_BX = torch.randn(count, self.dim, generator=generator("examples"))
        return F.normalize(vectors_BX, dim=1)

    def check_data(self, conditions: Tensor) -> None:
        """Refuse labels, and vectors of another length (DataError)."""
        if conditions.ndim != 2 or conditions.shape[1] != self.dim or not conditions.is_floating_point():
            raise DataError(
                f"The tokens come with {_described(conditions)}; the model expects vectors of {self.dim} values.",
                "Make a cache that holds such vectors: mvar tokenize --words, or --vectors FILE.",
            )

    def labels(self, conditions: Float[Tensor, "B X"]) -> list[int]:
        """-1 for each vector."""
        return [-1] * len(conditions)


Conditioner = ClassConditioner | VectorConditioner
CONDITIONERS: tuple[type[Conditioner], ...] = (ClassConditioner, VectorConditioner)


def build_conditioner(config: ModelConfig) -> Conditioner:
    """The conditioner that the configuration asks for."""
    assert config.transformer is not None
    if config.conditioning.dim is not None:
        return VectorConditioner(config.conditioning.dim, config.transformer.embed_dim)
    return ClassConditioner(config.transformer.num_classes, config.transformer.embed_dim)


def _described(found: Tensor) -> str:
    return f"conditions that are {found.dtype} of shape {tuple(found.shape)}".replace("torch.", "")
