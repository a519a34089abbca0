"""`mvar evaluate likelihood`: how likely held-out images are under a model."""

from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options

CLASSES_SHOWN = 20


@options.command(example="mvar evaluate likelihood --checkpoint runs/quickstart/mvar --data digits:test")
def evaluate_likelihood(
    checkpoint: options.Checkpoint,
    machine: options.Machine,
    tokens: options.Tokens = None,
    data: options.OptionalData = None,
    classes: options.Classes = None,
    class_names: options.ClassNames = None,
    zero_shot: Annotated[
        bool, options.option("--zero-shot/--no-zero-shot", None, "Also score images under classes not their own.")
    ] = True,
    num_samples: Annotated[
        int | None, options.option("--num-samples", "N", "Score at most so many images.", min=1)
    ] = None,
    tokenizer: options.TokenizerFile = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    dry_run: options.DryRun = False,
) -> None:
    """Bits per token of held-out images under a model, scale by scale, and zero-shot classification by it.

    Needs no reference and no feature network: images, or the tokens of a cache, are scored by the model itself.
    """
    result = mvar.evaluate_likelihood(**locals(), progress=console.progress)
    if result.dry_run is None:
        accuracies = result.zero_shot_accuracy_by_scale
        columns = ["side", "tokens", "bits per token", *(["zero-shot up to this scale"] if accuracies else [])]
        rows = []
        for scale, (size, bits) in enumerate(zip(result.patch_sizes, result.bits_per_token_by_scale, strict=True)):
            height, width = (size, size) if isinstance(size, int) else size
            side = str(size) if isinstance(size, int) else f"{height}×{width}"
            rows.append([side, height * width, bits, *([accuracies[scale]] if accuracies else [])])
        console.table("bits per token, scale by scale", columns, rows)
        condition = "no class" if result.nll_by_class is None else "their own class"
        error = f" ± {result.bits_per_image_error:.3g}" if result.bits_per_image_error is not None else ""
        console.say(
            f"{result.num_samples} images under {condition}: {result.bits_per_token:.4g} bits per token"
            f" (of {result.uniform_bits_per_token:.4g}), {result.bits_per_image:.5g}{error} bits per image,"
            f" {result.bits_per_pixel:.4g} per pixel."
        )
        if result.class_information is not None:
            console.say(
                f"Under no class: {result.bits_per_token_no_class:.4g} bits per token; the class explains"
                f" {result.class_information:.4g} bits of an image."
            )
        if result.nll_by_class is not None and result.samples_by_class is not None:
            worst = sorted(result.nll_by_class.items(), key=lambda item: -item[1])[:CLASSES_SHOWN]
            more = f", the {CLASSES_SHOWN} least likely" if len(result.nll_by_class) > len(worst) else ""
            rows = [[name, result.samples_by_class[name], nats] for name, nats in worst]
            console.table(f"nats per image, by class{more}", ["class", "images", "-ln p"], rows)
        if result.zero_shot_accuracy is not None:
            top = f", {result.zero_shot_top5:.1%} among five" if result.zero_shot_top5 is not None else ""
            console.say(
                f"Zero-shot classification among {result.classes_scored} classes: {result.zero_shot_accuracy:.1%}"
                f" correct{top} (chance: {1 / result.classes_scored:.1%})."
            )
    console.show(result)
