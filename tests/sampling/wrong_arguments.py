"""A program that calls the methods of `Pipeline` with arguments that fit and that do not; prints what is unexpected.

A program of its own, since the annotations that the tests enforce would refuse the arguments before the library does.
"""

import sys
import tempfile
import warnings
from math import inf, nan
from typing import Any

import numpy as np
import torch

from mvar_core import Pipeline, SamplingConfig
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config.presets import load_config
from mvar_core.errors import MvarError
from mvar_core.sampling.editing import KeptTokens

warnings.simplefilter("ignore")
config = load_config("digits").model
pipe = Pipeline(config, random_tokenizer(config), random_transformer(config))
samples = pipe.sample([1, 2], seed=0)
tokens, images = samples.tokens, samples.images.permute(0, 3, 1, 2).float() / 127.5 - 1
mask = np.zeros((32, 32), bool)
mask[:16] = True
model = tempfile.mkdtemp()
pipe.save_pretrained(model)


def each(name: str, values: tuple[Any, ...], **fixed: Any) -> list[dict[str, Any]]:
    return [{**fixed, name: value} for value in values]


def strange(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What is no ordinary tensor of the same kind."""
    complex_ = tensor.to(torch.complex64)
    nested = torch.nested.nested_tensor([tensor[0].float(), tensor[0, :1].float()])
    quantized = torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    return None, 5, "x", object(), tensor.to("meta"), tensor.to_sparse(), complex_, nested, quantized, tensor[0]


LABELS = ("abc", 3, None, [1.5], [nan], [True], [1 + 2j], [[1, 2]], [-1], [11], [10**30], {1: 2}, {1}, object(),
          [None], torch.tensor([1], device="meta"), torch.tensor([1]).to_sparse(), [[1], [2, 3]], b"12", iter([1]),
          ["none"], 2**64, [2**63])  # fmt: skip
REFUSED = {
    "sample": [
        *each("labels", LABELS),
        *each("seed", (-1, 1.5, 2**64, nan, "x", None, [1]), labels=[1]),
        *each("batch_size", (0, -1, 1.5, nan, "x", [1], inf), labels=[1]),
        *each("memory", (0, -1, 1.5, nan, "x", inf, 1), labels=[1]),
        *each("indices", ([-1], [1.5], [1, 2], [], "a", [nan], 5, [10**30], range(-1, 0), range(5), [[1]]), labels=[1]),
        *each("kept", (1, KeptTokens(tokens, tokens > 3), KeptTokens(tokens[:1], (tokens > 3)[:, :5]),
                       KeptTokens(tokens[:1].float(), (tokens > 3)[:1]), KeptTokens(tokens[:1], tokens[:1])),
              labels=[1]),
        *each("cfg", (-1, nan, inf, "x", [1], 1e308, 1e39), labels=[1]),
        *each("top_k", (-1, nan, inf, "x", 65, 1.5, 10**30), labels=[1]),
        *each("top_p", (-1, nan, inf, "x", 1.5), labels=[1]),
        *each("min_p", (-1, nan, inf, "x", 1.5), labels=[1]),
        *each("cfg_schedule", ("nan", (nan,) * 4, (1,), "1,2", (-1,) * 4, 5, "quadratic", (inf,) * 4, (1e308,) * 4),
              labels=[1]),
        *each("cfg_scales", ("9", (3, 1), (0, 9), (-1, 2), "a-b", 5), labels=[1]),
        *each("settings", (5, "x", {"cfg": nan}), labels=[1]),
        *each("conditions", ([[1.0]], [1], [1, 99]), labels=[1, 2]),
        *each("stages", ("abc", 5), labels=[1]),
        {"labels": [1], "temperature": nan},
    ],
    "encode": each("images", (*strange(images), images.byte(), images.bool(), images[:, :1], images[:, :, :16],
                              images.repeat(1, 2, 1, 1)[:, :4], images * nan, images * inf, images * 255, [1, 2],
                              samples.images)),
    "decode": each("tokens", (*strange(tokens), tokens.float(), tokens > 3, tokens[:, :5], tokens - 100, tokens + 100,
                              [[1]], [[1], [1, 2]], [["a"] * 85], [[10**30] * 85])),
    "logits": each("labels", ([1], [1, 2, 3], [], "x", [1.5, 2], [1, 99], None, [-1, 0]), tokens=tokens),
    "log_likelihoods": each("labels", ([1], [], "x", [1.5, 2], [1, 99], None, [[1, 2]], [[[1]]]), tokens=tokens),
    "edit": [
        *each("mask", (*strange(torch.from_numpy(mask)), mask.astype(int), mask[:5], mask[None].repeat(3, 0), [[True]],
                       mask[..., None]), images=images),
        *each("images", (*strange(images), images[:, :1], images.byte(), images * nan), mask=mask),
        *each("keep", ("x", None, 5), images=images, mask=mask),
        *each("num", (0, -1, 1.5, "x", inf), images=images, mask=mask),
        *each("coverage", (nan, 0, -1, "x", inf), images=images, mask=mask),
        *each("labels", ([1], [1, 2, 3], [99, 0], "ab", [1.5, 2]), images=images, mask=mask),
        *each("batch_size", (0, -1, 1.5), images=images, mask=mask),
        {"images": images, "mask": mask, "nonsense": 3},
    ],
    "kept_tokens": each("pixels", (*strange(torch.from_numpy(mask)), mask[:5], mask * 1.0), images=images),
    "from_pretrained": [
        *each("path", (None, 5, "", "/nowhere", "/dev/null", b"x", "a\0b", ["x"])),
        *each("device", ("gpu", 5, "cuda:99", torch.device("meta")), path=model),
        *each("dtype", ("int8", torch.int64, 5), path=model),
        *each("attention", ("x", 5), path=model),
        *each("machine", (5, "x"), path=model),
    ],
    "save_pretrained": each("path", (None, 5, "a\0b")),
    "conditions_of": each("labels", ([99], "x", [1.5], None)),
}  # fmt: skip
ACCEPTED = {
    "sample": [
        *each("labels", (np.array([1, 2], np.uint64), [], np.array([1, 2])[::-1], (1, 2), range(2), [np.int64(1)],
                         [torch.tensor(1)])),
        *each("indices", (np.array([7]), torch.tensor([7]), [2**63 - 1]), labels=[1]),
        *each("seed", (np.int64(3), 2**63 - 1), labels=[1]),
        {"labels": [1], "settings": {"cfg": 1.0}, "batch_size": 10**12},
    ],
    "encode": each("images", (images.numpy(), images.numpy()[::-1], images.tolist(), images.double(),
                              images.bfloat16(), images[:0], images.clone().requires_grad_())),
    "decode": each("tokens", (tokens.numpy(), tokens.tolist(), tokens.int(), tokens[:0],
                              tokens.numpy().astype(np.uint16))),
    "logits": [{"tokens": tokens.numpy(), "labels": np.array([1, 2])}, {"tokens": tokens[:0], "labels": []}],
    "log_likelihoods": each("labels", ([1, 2], [[1, 2], [3, 4]]), tokens=tokens.tolist()),
    "edit": [{"images": images.numpy(), "mask": mask.tolist(), "labels": [1, 2]}, {"images": images[:0], "mask": mask},
             {"images": images.double(), "mask": torch.from_numpy(mask), "paste": True}],
    "from_pretrained": [*each("device", ("cpu", torch.device("cpu")), path=model),
                        *each("dtype", (torch.bfloat16, "float32"), path=model)],
    "micro_batches": [{"images": 3, "settings": SamplingConfig()}],
}  # fmt: skip


def outcome(name: str, arguments: dict[str, Any]) -> str:
    try:
        getattr(pipe, name)(**arguments)
    except MvarError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


tried = 0
for expected, table in (("refused", REFUSED), ("accepted", ACCEPTED)):
    for name, cases in table.items():
        for arguments in cases:
            tried += 1
            if (found := outcome(name, arguments)) != expected:
                print(f"{name}({arguments!r}"[:200], "->", found[:300])
print(f"tried {tried}")
sys.exit()
