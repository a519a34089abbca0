"""`mvar evaluate reconstruction`: how well a tokenizer reconstructs images."""

from typing import Annotated

import mvar_core as mvar
from mvar_cli import console, options
from mvar_cli.commands.evaluate import show_comparability


@options.command(example="mvar evaluate reconstruction --checkpoint runs/tok --reference digits:test")
def evaluate_reconstruction(
    checkpoint: options.Checkpoint,
    reference: Annotated[
        str, options.option("--reference", "PATH|digits", "The images: folder, npz, digits or digits:test.")
    ],
    machine: options.Device,
    num_samples: Annotated[
        int | None, options.option("--num-samples", "N", "Measure at most so many images.", min=2)
    ] = None,
    features: options.Features = "auto",
    inception_weights: options.InceptionWeights = None,
    download: options.Download = False,
    cache: options.FeatureCache = None,
    tokenizer: options.TokenizerFile = None,
    batch_size: options.BatchSize = None,
    dry_run: options.DryRun = False,
) -> None:
    """RFID, PSNR and SSIM of a tokenizer's reconstructions, and how much of its codebook it uses."""
    result = mvar.evaluate_reconstruction(**locals(), progress=console.progress)
    if result.dry_run is None:
        prefix = "" if result.features == "inception" else f"{result.features}-"
        console.table(
            f"{result.num_samples:,} reconstructions, {result.features} features",
            ["", f"{prefix}rFID", "PSNR (dB)", "SSIM", "codes used"],
            [[result.samples, result.rfid, result.psnr, result.ssim, f"{result.code_usage:.1%}"]],
        )
        usage = zip(result.scales, result.usage_per_scale, strict=True)
        console.table("", ["scale", "codes used"], [[scale, f"{fraction:.1%}"] for scale, fraction in usage])
        show_comparability(result)
    console.show(result)
