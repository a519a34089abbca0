"""The golden cases: published systems with weights filled in from their parameters' names."""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvar_core import Pipeline
from mvar_core.models.official import convert
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

FOLDER = Path(__file__).parent / "golden"
CASES = ("var_small", "var_shared_adaln", "mvar_small")
UNFILLED = ("zero_k_bias", "attn_bias_for_masking", "lvl_1L", "ema_vocab_hit_SV")


@dataclass(frozen=True)
class GoldenCase:
    """One case.

    Attributes:
        name: Of the files in tests/golden.
        spec: Sizes.
        tensors: What the published system computed.
        model: Published transformer file.
        tokenizer: Published tokenizer file.
        options: What `convert` must be told beside the files.
    """

    name: str
    spec: dict[str, Any]
    tensors: dict[str, np.ndarray]
    model: Path
    tokenizer: Path
    options: dict[str, Any]

    @property
    def is_mvar(self) -> bool:
        return "k" in self.spec


def filled(shapes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by published name, each from a stream of its own; buffers are left out."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith(UNFILLED):
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
        state[name] = torch.from_numpy(np.asarray(_value(name, shape, random))).float()
    return state


def _value(name: str, shape: list[int], random: np.ndarray) -> np.ndarray:
    is_bias = name.endswith("bias")
    if "scale_mul" in name:
        return 1 + 0.1 * random
    if ".norm" in name or "norm_out" in name:
        return 0.1 * random if is_bias else 1 + 0.1 * random
    if is_bias:
        return 0.05 * random
    if "quantize.embedding" in name:
        return 0.5 * random
    if len(shape) == 4:
        return 1.2 * random / math.sqrt(math.prod(shape[1:]))
    if "ada_lin" in name or "ada_gss" in name:
        return 0.3 * random / math.sqrt(shape[-1])
    if len(shape) == 2 and "emb" not in name:
        return random / math.sqrt(shape[1])
    return 0.5 * random


def shapes_of(case: str, part: str) -> dict[str, Any]:
    """Published names and shapes of a case's "model" or "vqvae"."""
    return json.loads((FOLDER / f"{case}.json").read_text())[part]


def write_case(name: str, folder: Path) -> GoldenCase:
    """Write a case's published files into `folder`."""
    spec = json.loads((FOLDER / f"{name}.json").read_text())["spec"]
    model, tokenizer = folder / "model.pth", folder / "vae.pth"
    state = filled(shapes_of(name, "model"))
    torch.save({"mvar_wo_ddp": state} if "k" in spec else state, model)
    torch.save(filled(shapes_of(name, "vqvae")), tokenizer)
    with np.load(FOLDER / f"{name}.npz") as file:
        tensors = {key: file[key] for key in file.files}
    options = {"patch_sizes": tuple(spec["patch_nums"])}
    if "k" in spec:
        options["windows"] = spec["k"]
    return GoldenCase(name, spec, tensors, model, tokenizer, options)


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    target = torch.from_numpy(expected).to(found.dtype)
    return ((found - target).abs().max() / target.abs().max()).item()


def pipeline(case: GoldenCase, scale_prefixes: Any) -> Pipeline:
    """The golden weights under another setting of prefixes, so that caches are used, partly used, or not used."""
    converted = convert(case.model, case.tokenizer, scale_prefixes=scale_prefixes, **case.options)
    tokenizer = VQVAE(converted.config.tokenizer, converted.config.pyramid)
    tokenizer.load_state_dict(converted.tokenizer)
    transformer = Transformer(converted.config)
    transformer.load_state_dict(converted.transformer or {})
    return Pipeline(converted.config, tokenizer, transformer)
