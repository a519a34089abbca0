"""`mvar evaluate`: how good images are, measured against a reference."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mvar_cli import old_options as options
from mvar_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mvar_cli.image_sets import DrawnImages, ReconstructedImages, StoredImages
    from mvar_cli.processes import Processes

EXAMPLE = "mvar evaluate --checkpoint runs/quickstart/mvar --reference digits"

DEFAULT_SAMPLES = {"inception": 50_000}
DEFAULT_OTHER_SAMPLES = 1_000
RECONSTRUCTION = ("rfid", "psnr", "ssim", "usage_per_scale")


def _require_reference(context: typer.Context, value: str | None) -> str | None:
    """Refuse to measure against nothing; options that were typed are read before those that were not."""
    if value is None and not context.resilient_parsing and not context.params.get("likelihood"):
        raise typer.BadParameter("missing; what are the images to be measured against?")
    return value


def run(
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="PATH|digits",
            callback=_require_reference,
            help="Folder, npz, ADM npz, digits or digits:test. Not with --likelihood.",
        ),
    ] = None,
    samples: Annotated[str | None, typer.Option("--samples", metavar="PATH", help="Folder or npz of images.")] = None,
    checkpoint: options.OptionalCheckpoint = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", min=2, metavar="N", help="To draw, balanced over classes; or to read."),
    ] = None,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="NAMES", help="Comma list of fid, sfid, inception_score, precision, …")
    ] = "all",
    kid_subset: Annotated[
        int | None,
        typer.Option("--kid-subset", min=2, metavar="N", help="Images per subset of KID. Default: 1000, or all."),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also a score per class, the worst first.")] = False,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Judge the checkpoint's tokenizer: rFID, PSNR, SSIM, code usage.")
    ] = False,
    likelihood: Annotated[
        bool,
        typer.Option("--likelihood", help="How likely images are to the checkpoint: bits per token, zero-shot."),
    ] = False,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", metavar="CACHE", help="With --likelihood: score a cache's images.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="NAME|PATH", help="With --likelihood: score images.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="IDS|NAME|all", help="With --likelihood: score these classes alone."),
    ] = None,
    zero_shot: Annotated[
        bool,
        typer.Option("--zero-shot/--no-zero-shot", help="With --likelihood: also under classes not their own."),
    ] = True,
    save_samples: Annotated[
        Path | None, typer.Option("--save-samples", metavar="FILE.npz", help="Keep what is drawn, with --checkpoint.")
    ] = None,
    overwrite: options.Overwrite = False,
    features: Annotated[
        str,
        typer.Option(
            "--features",
            metavar="NAME|FILE.pt2",
            help="inception, demo, a program from torch.export, or a name registered with torch-fidelity; "
            "auto is demo for digits.",
        ),
    ] = "auto",
    inception_weights: Annotated[
        Path | None, typer.Option("--inception-weights", metavar="FILE", help="The network that FID is defined by.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the Inception weights if absent.")] = False,
    demo_classifier: Annotated[
        Path | None, typer.Option("--demo-classifier", metavar="FILE", help="The classifier behind demo features.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Keep features there, and take those that are known.")
    ] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance, with --checkpoint.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="With --checkpoint.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="With --checkpoint.")] = None,
    tokenizer: options.TokenizerFile = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = "auto",
    as_json: options.AsJson = False,
    dry_run: options.DryRun = False,
) -> None:
    """FID, sFID, inception score, precision, recall and KID of images, or of a checkpoint, against a reference.

    Says whether the figures may stand beside published ones, and if not, why not. Under torchrun the processes share
    the images and give the figures of one process. `mvar evaluate make-reference` measures a reference once for all.

    With --likelihood no reference is needed: held-out images are scored by the model itself.
    """
    if likelihood:
        _check_likelihood(checkpoint, tokens, data, reference, samples, reconstruction)
        assert checkpoint is not None
        loading = {"tokenizer": tokenizer, "dtype": dtype, "attention": attention}
        scored: dict[str, Any] = {"classes": classes, "zero_shot": zero_shot, "num": num_samples, "seed": seed}
        scored |= {"tokens": tokens, "data": data, "batch_size": batch_size}
        _likelihood(checkpoint, loading, scored, device, as_json, dry_run)
        return
    assert reference is not None
    if tokens is not None or data is not None or classes:
        raise ConfigError("--tokens, --data and --class belong to --likelihood.", "Add it, or leave them out.")
    _check_flags(samples, checkpoint, reconstruction, per_class, save_samples, overwrite)
    from mvar_cli.processes import processes
    from mvar_core.evaluation.scores import METRICS, check_counts, check_metrics

    asked = METRICS if metrics == "all" else check_metrics([name.strip() for name in metrics.split(",")])
    if reconstruction:
        asked = RECONSTRUCTION
    with processes() as team:
        from mvar_cli import evaluation
        from mvar_cli.image_sets import ReconstructedImages
        from mvar_core.runtime import resolve_device

        console = team.console(as_json)
        kept = evaluation.open_cache(cache)
        kind = evaluation.feature_kind(features, reference)
        if kind == "inception":
            inception_weights = evaluation.inception_file(inception_weights, download and not dry_run, console, team)
        device = team.device(device)
        target = resolve_device(device)
        judged: StoredImages | DrawnImages | ReconstructedImages
        if checkpoint is None:
            judged = _stored(str(samples), num_samples)
        else:
            loading = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "attention": attention}
            if reconstruction:
                _one_process(team, "--reconstruction")
                judged = _reconstructed(checkpoint, loading, reference, num_samples)
            else:
                count = num_samples or DEFAULT_SAMPLES.get(kind, DEFAULT_OTHER_SAMPLES)
                chosen = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
                judged = _drawn(checkpoint, loading, count, chosen, seed, save_samples)
        if isinstance(judged, ReconstructedImages):
            known = evaluation.Reference(reference, judged.originals)
        else:
            known = evaluation.Reference.open(reference, judged.image_shape, kind)
        # What is asked for by name must be computed; of all metrics, those that cannot be say why.
        named = asked if metrics != "all" else ("kid",) if kid_subset is not None else ()
        check_counts(named, judged.count, known.count, kid_subset)
        if per_class:
            _check_labels(judged.labels, known.labels, reference)
        if dry_run:
            console.say(f"1. {judged.verb} {judged.count} images of {judged.name}")
            console.say(f"2. measure {', '.join(asked)} with {kind} features against {reference}")
            console.say("Nothing was done (--dry-run).")
            console.finish({"dry_run": True, "num_samples": judged.count, "features": kind, "metrics": asked})
            return
        nearby = [checkpoint, checkpoint.parent] if checkpoint is not None else []
        extractor = evaluation.make_extractor(
            kind, inception_weights, demo_classifier, nearby, judged.image_shape, target
        )
        known.check(extractor)
        measurer = evaluation.Measurer(
            extractor,
            console,
            team,
            kept,
            keep_features=per_class or any(name in asked for name in evaluation.NEED_FEATURES),
            batch_size=batch_size or evaluation.DEFAULT_BATCH,
        )
        start = time.monotonic()
        reference_set = known.measure(measurer)
        sample_set = measurer.measure(judged, "samples")
        if not team.first or sample_set is None or reference_set is None:
            return
        from mvar_cli.evaluation_report import Report

        report = Report(judged, known, sample_set, reference_set, extractor, str(target), seed, team.count, start)
        report.show(console, asked, per_class=per_class, kid_subset=kid_subset)


def _check_likelihood(
    checkpoint: Path | None,
    tokens: Path | None,
    data: str | None,
    reference: str | None,
    samples: str | None,
    reconstruction: bool,
) -> None:
    """Find flags that contradict --likelihood before anything is imported or read."""
    if checkpoint is None:
        raise ConfigError("--likelihood asks a model.", "Name it with --checkpoint.")
    if (tokens is None) == (data is None):
        raise ConfigError(
            "--likelihood scores tokens or images.", "Give --tokens CACHE or --data, one of them; as in digits:test."
        )
    if reference is not None or samples is not None or reconstruction:
        raise ConfigError(
            "--likelihood compares with nothing.", "Leave out --reference, --samples and --reconstruction."
        )


def _likelihood(
    checkpoint: Path, loading: dict[str, Any], scored: dict[str, Any], device: str, as_json: bool, dry_run: bool
) -> None:
    from mvar_cli.likelihood import LikelihoodRequest, score
    from mvar_cli.processes import processes

    with processes() as team:
        loading = {**loading, "device": team.device(device)}
        score(team, team.console(as_json), LikelihoodRequest(checkpoint, loading, **scored), dry_run)


def _check_flags(
    samples: str | None,
    checkpoint: Path | None,
    reconstruction: bool,
    per_class: bool,
    save_samples: Path | None,
    overwrite: bool,
) -> None:
    """Find flags that contradict each other before anything is imported or read."""
    if (samples is None) == (checkpoint is None):
        raise ConfigError(
            "There must be something to measure.", "Give --samples PATH or --checkpoint DIR, one of them."
        )
    if reconstruction and checkpoint is None:
        raise ConfigError("--reconstruction judges a tokenizer.", "Name its model directory with --checkpoint.")
    if reconstruction and per_class:
        raise ConfigError("--reconstruction has no scores per class.", "Leave out --per-class.")
    if save_samples is None:
        return
    if checkpoint is None or reconstruction:
        raise ConfigError("--save-samples keeps what is drawn from a checkpoint.", "Give --checkpoint DIR alone.")
    if save_samples.suffix.lower() != ".npz":
        raise DataError(f"--save-samples {save_samples} does not end in .npz.")
    if save_samples.is_dir() or (save_samples.exists() and not overwrite):
        raise DataError(
            f"{save_samples} is already there.", "Choose another --save-samples, or add --overwrite to replace it."
        )


def _one_process(team: Processes, option: str) -> None:
    if team.count > 1:
        raise ConfigError(f"{option} runs in one process, found {team.count}.", "Start it without torchrun.")


def _check_labels(samples: Any, reference: Any, name: str) -> None:
    for labels, what in ((samples, "the samples"), (reference, f"the reference {name}")):
        if labels is None:
            raise DataError(
                f"--per-class needs the class of every image, and {what} do not have them."
                if what == "the samples"
                else f"--per-class needs the class of every image, and {what} does not have them.",
                "Class folders have them, an npz with labels, a checkpoint, digits.",
            )


def _stored(samples: str, limit: int | None) -> StoredImages:
    from mvar_cli.image_sets import open_stored

    return open_stored(samples, limit)


def _drawn(
    checkpoint: Path, loading: dict[str, Any], count: int, chosen: dict[str, Any], seed: int, save_samples: Path | None
) -> DrawnImages:
    from mvar_cli.image_sets import DrawnImages
    from mvar_core.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(checkpoint, **loading)
    return DrawnImages(str(checkpoint), pipeline, count, pipeline.sampling_settings(**chosen), seed, save_samples)


def _reconstructed(checkpoint: Path, loading: dict[str, Any], reference: str, limit: int | None) -> ReconstructedImages:
    from mvar_cli.image_sets import ReconstructedImages, open_stored
    from mvar_core.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(checkpoint, **loading)
    originals = open_stored(reference, limit, pipeline.config.image_shape)
    return ReconstructedImages(str(checkpoint), pipeline, originals)
