"""Options that several commands share, so that a name means the same everywhere, and the groups of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import mvar_core as mvar
from mvar_cli.groups import Group

MACHINE, LOOP, OUTPUT = "Machine", "Training loop", "Output"


def complete_preset(incomplete: str) -> list[str]:
    """Names of presets for shell completion."""
    return [name for name in mvar.preset_names() if name.startswith(incomplete)]


_PRESET = typer.Option(
    "--preset", metavar="NAME|FILE", help="A preset (`mvar plan` lists them) or a YAML file.",
    autocompletion=complete_preset,
)  # fmt: skip
Preset = Annotated[str | None, _PRESET]
RequiredPreset = Annotated[str, _PRESET]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the preset, as in a.b=c; repeatable."),
]
ImageSize = Annotated[
    str | None,
    typer.Option("--image-size", metavar="N|HxW",
                 help="Images of this size, as in 512 or 256x384; pyramid and windows follow. Default: the preset's."),
]  # fmt: skip
_CHECKPOINT = typer.Option("--checkpoint", metavar="DIR", help="A model directory, a run, or a published .pth file.")
Checkpoint = Annotated[Path, _CHECKPOINT]
OptionalCheckpoint = Annotated[Path | None, _CHECKPOINT]
_TOKENIZER = typer.Option("--tokenizer", "--checkpoint", metavar="DIR", help="Model directory with the tokenizer.")
Tokenizer = Annotated[Path, _TOKENIZER]
OptionalTokenizer = Annotated[Path | None, _TOKENIZER]
TokenizerFile = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="The published tokenizer, where --checkpoint is a .pth."),
]  # fmt: skip
DATA_HELP = "Bundled digits or photographs, a folder of images, tar shards, or parquet files; see docs/data.md."
Data = Annotated[str, typer.Option("--data", metavar="NAME|PATH", help=DATA_HELP)]
OptionalData = Annotated[str | None, typer.Option("--data", metavar="NAME|PATH", help=DATA_HELP)]
Tokens = Annotated[Path | None, typer.Option("--tokens", metavar="CACHE", help="Token cache, from `mvar tokenize`.")]
Validation = Annotated[
    Path | None, typer.Option("--validation", metavar="CACHE", help="Token cache of held-out images to measure on.")
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="IDS|NAME|all", help="Labels, a comma list, a name, or all; repeatable."),
]
Words = Annotated[
    list[str] | None,
    typer.Option("--words", metavar="TEXT", help="A text, for models that are conditioned on words; repeatable."),
]
VectorsFile = Annotated[
    Path | None,
    typer.Option("--vectors", metavar="FILE", help="Vectors as .npy, .npz or .safetensors; see docs/conditioning.md."),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Optimizer steps.")]
Epochs = Annotated[float | None, typer.Option("--epochs", metavar="N", help="Passes over the tokens.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Images at a time.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")]
OptionalSeed = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")]
Windows = Annotated[
    str | None,
    typer.Option("--windows", metavar="K|LIST|auto",
                 help="One odd number for all windowed scales, a comma list (0 = whole scale), or auto."),
]  # fmt: skip
ScalePrefixes = Annotated[
    str | None,
    typer.Option("--scale-prefixes", metavar="N|all", help="Scales that a token sees, its own included: 1 is MVAR."),
]
Features = Annotated[
    str,
    typer.Option("--features", metavar="NAME|FILE",
                 help="inception, demo, a demo classifier (.safetensors), a program from torch.export (.pt2), or a "
                 "name registered with torch-fidelity; auto is demo for digits."),
]  # fmt: skip
InceptionWeights = Annotated[
    Path | None,
    typer.Option("--inception-weights", metavar="FILE", help="The network that FID is defined by."),
]
Download = Annotated[bool, typer.Option("--download", help="Download the Inception weights if they are absent.")]
FeatureCache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Save features there, and reuse those that are known.")
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")]
SampleOut = Annotated[Path, typer.Option("--out", metavar="PATH", help="A directory, or a file for npz and grid.")]
SampleFormat = Annotated[
    str | None, typer.Option("--format", metavar="FORMAT", help="png, npz or grid. Default: as --out ends.")
]
Stages = Annotated[bool, typer.Option("--stages", help="Also a strip per image: after each scale.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.", rich_help_panel=OUTPUT)]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume from a checkpoint in --out.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print configuration, cost and plan, and do nothing.", rich_help_panel=OUTPUT),
]
Fsdp = Annotated[
    bool,
    typer.Option("--fsdp", help="Shard the model over the processes, for one too large for a GPU.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
NumProcesses = Annotated[
    int, typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine, one per GPU.",
                      rich_help_panel=MACHINE)
]  # fmt: skip


Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", rich_help_panel=MACHINE,
                 help="Memory that sampling may use, as in 2GB. Default: half of what is free. Changes no image."),
]  # fmt: skip


class DeviceOptions(Group):
    """Where to compute."""

    builds = "Machine"

    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)
    ] = "auto"
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.", rich_help_panel=MACHINE),
    ] = "auto"


class MemoryDeviceOptions(DeviceOptions):
    """Where to compute, and the memory that sampling may use."""

    memory: Memory = None


class AttentionDeviceOptions(DeviceOptions):
    """Where to compute, and the attention backend."""

    attention: Annotated[
        str,
        typer.Option("--attention", metavar="NAME", rich_help_panel=MACHINE,
                     help="auto, reference, dense, tiled, flex or natten; a named one never falls back."),
    ] = "auto"  # fmt: skip


class MachineOptions(AttentionDeviceOptions):
    """Where and how to compute with a transformer."""

    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks first: for long runs.", rich_help_panel=MACHINE)
    ] = False


class TokenizerLoopOptions(Group):
    """Keys of a training section that have options of their own; all others are changed by --set."""

    steps: Steps = None
    batch_size: BatchSize = None
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", min=1, metavar="N", rich_help_panel=MACHINE,
                     help="Images computed together; the gradient is that of the whole batch."),
    ] = None  # fmt: skip
    ema: Annotated[
        float | None,
        typer.Option("--ema", metavar="DECAY", help="Average the weights, e.g. 0.999.", rich_help_panel=LOOP),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, metavar="N", rich_help_panel=LOOP,
                     help="Steps between checkpoints, and between validations."),
    ] = None  # fmt: skip


class LoopOptions(TokenizerLoopOptions):
    """Those of the transformer's training section."""

    epochs: Epochs = None
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option("--activation-checkpointing/--no-activation-checkpointing", rich_help_panel=MACHINE,
                     help="Compute blocks again in the backward pass: less memory, more time."),
    ] = None  # fmt: skip


class SamplingMachineOptions(MachineOptions):
    """The same for sampling, whose memory can be bounded."""

    memory: Memory = None


class BasicSamplingOptions(Group):
    """How to sample for measures; what is not given is as the model recommends."""

    builds = "SamplingConfig"

    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance; 0 is none. Default: the model's.")] = None
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k likeliest codes; 0 keeps all.")] = None
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Keep this much probability; 0 or 1 keep all.")] = (
        None
    )


class GuidedSamplingOptions(BasicSamplingOptions):
    """The same, and which scales are guided how strongly: what decides how long sampling takes."""

    cfg_schedule: Annotated[
        str | None,
        typer.Option("--cfg-schedule", metavar="NAME|LIST",
                     help="Guidance over the scales: linear (as published), constant, cosine, or a comma list."),
    ] = None  # fmt: skip
    cfg_scales: Annotated[
        str | None, typer.Option("--cfg-scales", metavar="FIRST-LAST", help="Guide these scales only, from 0: 4-9.")
    ] = None


class SamplingOptions(GuidedSamplingOptions):
    """Every setting of sampling."""

    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep codes at least this fraction as likely as the likeliest; 0 keeps all."),
    ] = None
    more_smooth: Annotated[
        bool | None, typer.Option("--more-smooth/--no-more-smooth", help="Smoother looks; never for metrics.")
    ] = None


if TYPE_CHECKING:  # what a command's function receives
    Device = mvar.Machine
    AttentionDevice = mvar.Machine
    MemoryDevice = mvar.Machine
    Machine = mvar.Machine
    SamplingMachine = mvar.Machine
    BasicSampling = mvar.SamplingConfig
    GuidedSampling = mvar.SamplingConfig
    Sampling = mvar.SamplingConfig
    Loop = mvar.LoopSettings
    TokenizerLoop = mvar.TokenizerLoopSettings
else:
    Device, Machine, SamplingMachine = DeviceOptions, MachineOptions, SamplingMachineOptions
    Loop, TokenizerLoop = LoopOptions, TokenizerLoopOptions
    AttentionDevice, MemoryDevice = AttentionDeviceOptions, MemoryDeviceOptions
    BasicSampling, GuidedSampling, Sampling = BasicSamplingOptions, GuidedSamplingOptions, SamplingOptions


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from a comma list.

    Raises:
        ConfigError: Something between the commas is not a whole number.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise mvar.ConfigError(f"{option} {text!r} is not a comma list of whole numbers.") from None


CommandFunction = TypeVar("CommandFunction", bound=Callable[..., None])


def command(*, example: str) -> Callable[[CommandFunction], CommandFunction]:
    """Mark a command's function with what its help ends with.

    Args:
        example: A command line to copy.
    """

    def mark(function: CommandFunction) -> CommandFunction:
        vars(function).update(example=example)
        return function

    return mark
