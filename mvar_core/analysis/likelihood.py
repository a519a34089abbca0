"""How likely images are under a model, by their tokens: bits per token and scale, per class, and the class that fits.

A next-scale model gives the tokens of all scales a probability, p(tokens | class) = Π p(token | earlier scales, class).
So it measures how well the model knows held-out images, without any feature network, and it classifies: the class under
which an image is most likely. Probabilities are those of the model itself: no guidance, no top-k, no top-p. Sums are
float64.
"""

# Shape suffixes: B images, K conditions under which each is scored, S scales, L tokens of all scales, l those of one
# scale, C width, V codebook entries, Z latent channels, P pairs of an image and a condition.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from mvar_core.arguments import tensor_argument
from mvar_core.classes import Classes
from mvar_core.config import ModelConfig
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.models.conditioning import Conditioner, Conditions, VectorConditioner
from mvar_core.models.micro_batches import TOKENS_AT_ONCE
from mvar_core.models.quantizer import MultiScaleQuantizer
from mvar_core.models.transformer import Transformer
from mvar_core.progress import running_total
from mvar_core.results import Result
from mvar_core.untrusted import check_whole

TOP = 5
"""How many classes `zero_shot_top5` considers."""


@torch.no_grad()
def log_likelihoods(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    tokens_BL: Int[Tensor, "B L"],
    conditions: Tensor,
    *,
    attention: str = "auto",
    pairs_at_once: int | None = None,
    on_pairs: Callable[[int], None] | None = None,
) -> Float64[Tensor, "B K S"]:
    """Ln p(tokens of each scale | earlier scales, condition), for every image under each of its conditions.

    Pairs of an image and a condition go through the transformer a few at a time, `pairs_at_once`, which decides speed
    and memory, never the result; logits exist for one scale of those alone; inputs, which do not depend on the
    condition, are computed once for an image. `on_pairs` is called with the pairs scored since the last call.

    Everything is on one device, the transformer in evaluation mode; conditions are class labels (B, K) or vectors
    (B, K, X).

    Returns:
        In nats, on the CPU.

    Raises:
        CheckpointError: They are not finite.
    """
    pyramid, device = transformer.pyramid, tokens_BL.device
    images, candidates = conditions.shape[:2]
    at_once = pairs_at_once or max(1, TOKENS_AT_ONCE.get(device.type, 2048) // pyramid.num_tokens)
    # One by one on a CPU, whose convolutions round by the batch they see.
    pieces = tokens_BL.split(1 if device.type == "cpu" else max(1, images))
    inputs_BlZ = torch.cat([quantizer.teacher_forcing_inputs(piece) for piece in pieces])
    exact = torch.float32 if device.type == "mps" else torch.float64
    scored_PS = torch.empty(images * candidates, pyramid.num_scales, dtype=torch.float64)
    flat = conditions.flatten(0, 1)
    for start in range(0, len(flat), at_once):
        pairs = slice(start, min(start + at_once, len(flat)))
        rows = torch.arange(pairs.start, pairs.stop, device=device) // candidates
        conditioning = transformer.condition(flat[pairs])
        x_PLC = transformer.hidden_states(
            range(pyramid.num_scales), inputs_BlZ[rows], conditioning, attention=attention
        )
        for scale, span in enumerate(pyramid.spans):
            logits_PlV = transformer.head_logits(x_PLC[:, span], conditioning)
            true_Pl = logits_PlV.gather(-1, tokens_BL[rows, span].unsqueeze(-1)).squeeze(-1)
            log_p_Pl = true_Pl.to(exact) - logits_PlV.to(exact).logsumexp(-1)
            scored_PS[pairs, scale] = log_p_Pl.sum(-1).double().cpu()
        if on_pairs is not None:
            on_pairs(pairs.stop - pairs.start)
    if not bool(scored_PS.isfinite().all()):
        raise CheckpointError(
            "The model's probabilities are not finite.", "Its weights are damaged: load or train it again."
        )
    return scored_PS.unflatten(0, (images, candidates))


def read_candidates(conditioner: Conditioner, given: Conditions, images: int) -> tuple[Tensor, bool]:
    """Labels (images, K) or vectors (images, K, X) to score under, on the CPU, and whether each image has several.

    ConfigError where they are not the model's, or not the images'.
    """
    vectors = isinstance(conditioner, VectorConditioner)
    expected = f"Conditions of {images} images, or several for each, are {'vectors' if vectors else 'class labels'}"
    rows = tensor_argument(given, expected, "real" if vectors else "whole", error=ConfigError)
    several = rows.ndim == (3 if vectors else 2)
    read = conditioner.read(rows.flatten(0, 1) if several else rows)
    if len(rows) != images or (images and len(read) % images):
        raise ConfigError(f"there are tokens of {images} images but conditions of {len(rows)}.")
    candidates = rows.shape[1] if several else 1
    return read.unflatten(0, (images, candidates)), several


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport(Result):
    """Means over images; without labels, what needs them is None and likelihoods are those under no class.

    Attributes:
        num_samples: Images, N.
        num_tokens: Tokens of an image, L.
        patch_sizes: The model's scales.
        bits_per_token: -log2 p(token | earlier scales, own class), averaged over tokens.
        bits_per_token_by_scale: The same, scale by scale.
        uniform_bits_per_token: log2 V: what a model that knows nothing would need.
        bits_per_image: All tokens of an image.
        bits_per_image_error: Standard error of that mean.
        bits_per_pixel: Over the image's pixels (height × width). These are bits of tokens: what a tokenizer loses of
            the pixels is not counted, so figures are comparable only under one tokenizer.
        bits_per_token_no_class: Under no class.
        class_information: Bits of an image that the class explains: bits under no class less those under its own.
        nll_by_class: For each class that occurs, -ln p(tokens | class) of its images, in nats per image.
        samples_by_class: How many images that mean is of.
        classes_scored: Classes that compete in zero-shot classification.
        zero_shot_accuracy: Fraction of the images whose own class makes their tokens most likely.
        zero_shot_top5: Fraction whose own class is among the five that do; None with five classes or fewer.
        zero_shot_accuracy_by_scale: The same, by only the tokens of the scales up to each.
    """

    num_samples: int = 0
    num_tokens: int = 0
    patch_sizes: tuple[int | tuple[int, int], ...] = ()
    bits_per_token: float = math.nan
    bits_per_token_by_scale: tuple[float, ...] = ()
    uniform_bits_per_token: float = math.nan
    bits_per_image: float = math.nan
    bits_per_image_error: float | None = None
    bits_per_pixel: float = math.nan
    bits_per_token_no_class: float = math.nan
    class_information: float | None = None
    nll_by_class: dict[str, float] | None = None
    samples_by_class: dict[str, int] | None = None
    classes_scored: int = 0
    zero_shot_accuracy: float | None = None
    zero_shot_top5: float | None = None
    zero_shot_accuracy_by_scale: tuple[float, ...] | None = None


def measure_likelihood(
    transformer: Transformer,
    quantizer: MultiScaleQuantizer,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    config: ModelConfig,
    *,
    classes: Sequence[int] | None = None,
    attention: str = "auto",
    pairs_at_once: int | None = None,
    gather: Callable[[list[Columns]], Sequence[list[Columns]]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LikelihoodReport:
    """Likelihoods of images under their own class, under no class, and under every class that competes for them.

    What is kept of an image is a few values per scale, however many classes there are.

    Args:
        transformer: Conditioned on classes, in evaluation mode.
        quantizer: The tokenizer's, on the same device.
        batches: Tokens (B, L) and labels (B,), or None where no image has one.
        config: The model.
        classes: Classes that compete in zero-shot classification; every label must be among them. None for none.
        attention: Attention backend.
        pairs_at_once: As of `log_likelihoods`.
        gather: Returns what all processes have measured, in the order of the images; by default this one's alone.
        progress: Called with the number of pairs of image and class that are done.

    Raises:
        ConfigError: The model is conditioned on vectors.
        DataError: No images, a label that does not exist or does not compete, or labels for only some images.
    """
    if config.conditioning.kind != "class":
        raise ConfigError("Likelihoods per class need a model that is conditioned on classes; this one is on vectors.")
    device, null_label = quantizer.codebook.device, transformer.null_label
    for label in classes or ():
        check_whole("a class", label, 0, null_label - 1)
    competing = torch.tensor(classes if classes is not None else [], dtype=torch.long)
    count = running_total(progress)
    measured: list[Columns] = []
    for tokens_BL, labels_B in batches:
        candidates = [torch.full((len(tokens_BL), 1), null_label)]
        if labels_B is not None:
            _check_labels(labels_B, len(tokens_BL), classes, null_label)
            own = labels_B.view(-1, 1) if classes is None else competing.expand(len(tokens_BL), -1)
            candidates.append(own.long().cpu())
        scored_BKS = log_likelihoods(
            transformer, quantizer, tokens_BL.to(device, torch.long), torch.cat(candidates, dim=1).to(device),
            attention=attention, pairs_at_once=pairs_at_once, on_pairs=count,
        ).numpy()  # fmt: skip
        columns = {"none_nats": -scored_BKS[:, 0]}
        if labels_B is not None:
            columns["labels"] = labels_B.cpu().numpy()
            competing_BKS = scored_BKS[:, 1:]
            # Where each image's own class is among those it was scored under.
            positions_B = (labels_B.view(-1, 1).cpu() == competing).int().argmax(1).numpy() if len(competing) else 0
            own_BS = competing_BKS[np.arange(len(scored_BKS)), positions_B]
            columns["own_nats"] = -own_BS
            if classes is not None:
                # Of classes that are equally likely, the first counts as the model's choice.
                sums_BKS, own_B1S = competing_BKS.cumsum(-1), own_BS.cumsum(-1)[:, None]
                earlier_BK1 = (np.arange(len(competing)) < np.asarray(positions_B)[..., None])[..., None]
                columns["ranks"] = ((sums_BKS > own_B1S) | ((sums_BKS == own_B1S) & earlier_BK1)).sum(1)
        measured.append(columns)
    gathered = [measured] if gather is None else gather(measured)
    return _report([columns for each in gathered for columns in each], config, len(competing))


Columns = dict[str, np.ndarray]
"""What is kept of a batch of images: nats per scale under no class, and where they have labels also these, nats under
their own class, and, for each scale, how many competing classes are more likely by the tokens up to it."""


def _report(batches: Sequence[Columns], config: ModelConfig, competing: int) -> LikelihoodReport:
    if not batches:
        raise DataError("There are no images to score.")
    if len({frozenset(columns) for columns in batches}) > 1:
        raise DataError("Some images have labels and some do not.")
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    none_NS, labels_N, ranks_NS = columns["none_nats"], columns.get("labels"), columns.get("ranks")
    own_NS = columns.get("own_nats", none_NS)
    pyramid, (height, width) = config.pyramid, config.image_shape
    bits_NS = own_NS / math.log(2)
    image_bits_N = bits_NS.sum(1)
    count, tokens = len(bits_NS), np.array([grid.tokens for grid in pyramid.grids])
    bits, none_bits = float(image_bits_N.mean()), float(none_NS.sum(1).mean() / math.log(2))
    classes, by_class = Classes.of_model(config), dict[str, np.ndarray]()
    for label in [] if labels_N is None else np.unique(labels_N).tolist():
        name = classes.name(label)  # which another class may have as well
        by_class[classes.label(label) if name in by_class else name] = own_NS.sum(1)[labels_N == label]
    return LikelihoodReport(
        num_samples=count,
        num_tokens=pyramid.num_tokens,
        patch_sizes=pyramid.patch_sizes,
        bits_per_token=bits / pyramid.num_tokens,
        bits_per_token_by_scale=tuple((bits_NS.mean(0) / tokens).tolist()),
        uniform_bits_per_token=math.log2(config.tokenizer.codebook_size),
        bits_per_image=bits,
        bits_per_image_error=float(image_bits_N.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
        bits_per_pixel=bits / (height * width),
        bits_per_token_no_class=none_bits / pyramid.num_tokens,
        class_information=none_bits - bits if by_class else None,
        nll_by_class={name: float(nats.mean()) for name, nats in by_class.items()} or None,
        samples_by_class={name: len(nats) for name, nats in by_class.items()} or None,
        classes_scored=competing if ranks_NS is not None else 0,
        zero_shot_accuracy=float((ranks_NS[:, -1] == 0).mean()) if ranks_NS is not None else None,
        zero_shot_top5=float((ranks_NS[:, -1] < TOP).mean()) if ranks_NS is not None and competing > TOP else None,
        zero_shot_accuracy_by_scale=tuple((ranks_NS == 0).mean(0).tolist()) if ranks_NS is not None else None,
    )


def _check_labels(labels_B: Tensor, images: int, classes: Sequence[int] | None, null_label: int) -> None:
    if labels_B.shape != (images,) or labels_B.is_floating_point() or labels_B.is_complex():
        raise DataError(f"There are {labels_B.dtype} labels {tuple(labels_B.shape)} for the tokens of {images} images.")
    for label in labels_B.unique().tolist():
        if not 0 <= label < null_label:
            raise DataError(f"An image is of class {label}; the model has classes 0 … {null_label - 1}.")
        if classes is not None and label not in classes:
            raise DataError(f"An image is of class {label}, which is not among the classes that are scored.")
