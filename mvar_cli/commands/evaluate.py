"""`mvar evaluate`: how good images are, measured against a reference."""

from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options

HEADINGS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS"}
HEADINGS |= {"precision": "precision", "recall": "recall", "kid": "KID"}
CLASSES_SHOWN = 20


@options.command(example="mvar evaluate --checkpoint runs/quickstart/mvar --reference digits")
def evaluate(
    reference: Annotated[
        str, options.option("--reference", "PATH|digits", "Folder, npz, ADM npz, digits or digits:test.")
    ],
    settings: options.BasicSampling,
    machine: options.Machine,
    samples: Annotated[str | None, options.option("--samples", "PATH", "Folder or npz of images.")] = None,
    checkpoint: options.OptionalCheckpoint = None,
    num_samples: Annotated[
        int | None, options.option("--num-samples", "N", "To generate, balanced over classes; or to read.", min=2)
    ] = None,
    metrics: Annotated[
        str, options.option("--metrics", "NAMES", "Comma list of fid, sfid, inception_score, precision, …")
    ] = "all",
    kid_subset: Annotated[
        int | None, options.option("--kid-subset", "N", "Images per subset of KID. Default: 1000, or all.", min=2)
    ] = None,
    per_class: Annotated[bool, options.option("--per-class", None, "Also a score per class, the worst first.")] = False,
    class_names: options.ClassNames = None,
    features: options.Features = "auto",
    inception_weights: options.InceptionWeights = None,
    download: options.Download = False,
    cache: options.FeatureCache = None,
    tokenizer: options.TokenizerFile = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    dry_run: options.DryRun = False,
) -> None:
    """FID, sFID, inception score, precision, recall and KID of images, or of a checkpoint, against a reference.

    Says whether the figures are comparable with published ones, and if not, why not. Under torchrun the processes share
    the images and print the figures of one process. `mvar evaluate make-reference` measures a reference once.
    """
    result = mvar.evaluate(**locals(), progress=console.progress)
    if result.dry_run is None:
        prefix = "" if result.features == "inception" else f"{result.features}-"
        rows = [[result.samples, *(getattr(result, name) for name in HEADINGS)]]
        rows += [[f"{row['model']}, published", *(row.get(name) for name in HEADINGS)] for row in result.published]
        headings = [heading if heading[0].islower() else f"{prefix}{heading}" for heading in HEADINGS.values()]
        console.table(f"{result.num_samples:,} samples, {result.features} features", ["", *headings], rows)
        if result.inception_score is not None and result.inception_score_std is not None:
            console.say(
                f"{prefix}IS {console.format_number(result.inception_score)} ±"
                f" {console.format_number(result.inception_score_std)} over {result.settings['splits']} splits,"
                f" shuffled with seed {result.shuffle_seed}."
            )
        if result.classifier_accuracy is not None:
            console.say(f"Classified as their labels: {result.classifier_accuracy:.1%}")
        for name, reason in result.reasons.items():
            if reason != "not asked for":
                console.say(f"{HEADINGS[name]}: not computed, {reason}")
        if result.per_class:
            title = f"Per class, the worst {CLASSES_SHOWN}" if len(result.per_class) > CLASSES_SHOWN else "Per class"
            columns = [column.replace("_", " ") for column in result.per_class[0]]
            console.table(title, columns, [list(row.values()) for row in result.per_class[:CLASSES_SHOWN]])
        show_comparability(result)
    console.show(result)


def show_comparability(result: "mvar.Measured") -> None:
    """Whether figures are comparable with published ones, why not, and what makes them noisy."""
    if result.comparable_to_papers:
        console.say("Comparable with published figures.")
    else:
        console.say(f"Not comparable with published figures: {'; '.join(result.why_not)}.")
    for warning in result.warnings:
        console.note(f"warning: {warning}")
