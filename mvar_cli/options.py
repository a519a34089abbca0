"""Options that several commands share, so that a name means the same everywhere, and the groups of them.

A command is written with typed parameters, some of which are groups of options. `signature` is the flat one that typer
reads, and `grouped` turns what was typed back into the command's own parameters.
"""

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import typer

import mvar_core as mvar

MACHINE, LOOP, OUTPUT = "Machine", "Training loop", "Output"

CommandFunction = TypeVar("CommandFunction", bound=Callable[..., None])


class Group:
    """Some options that belong together: the fields that `names` lists, or all, annotated as typer reads options.

    What was typed becomes an object of the class of `mvar_core` that `builds` names, from the fields that are not None;
    without `builds`, a dictionary of them.
    """

    builds: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def only(cls, *names: str) -> type["Group"]:
        """The group with some of its fields, for commands where the others have no effect."""
        return type(cls.__name__, (cls,), {"names": names, "__module__": cls.__module__})

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One keyword parameter for each field."""
        hints = typing.get_type_hints(cls, include_extras=True)
        names = cls.names or [name for name in hints if name not in typing.get_type_hints(Group)]
        return [_parameter(name, hints[name], getattr(cls, name)) for name in names]

    @classmethod
    def build(cls, values: dict[str, Any]) -> Any:
        """The group's object, from what was typed."""
        given = {name: value for name, value in values.items() if value is not None}
        return given if cls.builds is None else getattr(mvar, cls.builds)(**given)


def signature(run: CommandFunction, **further: tuple[Any, Any]) -> inspect.Signature:
    """The signature of a command's function, with the fields of its groups in the groups' places.

    `further` are annotation and default of options that all commands share.
    """
    hints = typing.get_type_hints(run, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        group = _group(hints[name])
        parameters += group.parameters() if group else [_parameter(name, hints[name], parameter.default)]
    return inspect.Signature([*parameters, *(_parameter(name, *option) for name, option in further.items())])


def grouped(run: CommandFunction, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command's function, from the values of its flat signature."""
    for name, hint in typing.get_type_hints(run, include_extras=True).items():
        if group := _group(hint):
            values[name] = group.build({option.name: values.pop(option.name) for option in group.parameters()})
    return values


def _group(hint: Any) -> type[Group] | None:
    return next((one for one in typing.get_args(hint) if inspect.isclass(one) and issubclass(one, Group)), None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option(names: str, metavar: str | None, text: str, panel: str | None = None, **further: Any) -> Any:
    """An option as typer reads it: its spellings, separated by spaces, and `further` arguments such as min.

    The help shows `metavar` for its value, None for a switch, and lists it in the section `panel`.
    """
    return typer.Option(*names.split(), metavar=metavar, help=text, rich_help_panel=panel, **further)


def complete_preset(incomplete: str) -> list[str]:
    """Names of presets for shell completion."""
    return [name for name in mvar.preset_names() if name.startswith(incomplete)]


_PRESET = option("--preset", "NAME|FILE", "A preset (`mvar plan` lists them) or a YAML file.",
                 autocompletion=complete_preset)  # fmt: skip
Preset = Annotated[str | None, _PRESET]
RequiredPreset = Annotated[str, _PRESET]
Settings = Annotated[
    list[str] | None, option("--set", "KEY=VALUE", "Change one key of the preset, as in a.b=c; repeatable.")
]
_SIZE = "Images of this size, as in 512 or 256x384; pyramid and windows follow. Default: the preset's."
ImageSize = Annotated[str | None, option("--image-size", "N|HxW", _SIZE)]
_CHECKPOINT = option("--checkpoint", "DIR", "A model directory, a run, or a published .pth file.")
Checkpoint = Annotated[Path, _CHECKPOINT]
OptionalCheckpoint = Annotated[Path | None, _CHECKPOINT]
_TOKENIZER = option("--tokenizer --checkpoint", "DIR", "Model directory with the tokenizer.")
Tokenizer = Annotated[Path, _TOKENIZER]
OptionalTokenizer = Annotated[Path | None, _TOKENIZER]
TokenizerFile = Annotated[
    Path | None, option("--tokenizer", "FILE", "The published tokenizer, where --checkpoint is a .pth.")
]
DATA_HELP = "Bundled digits or photographs, a folder of images, tar shards, or parquet files; see docs/data.md."
Data = Annotated[str, option("--data", "NAME|PATH", DATA_HELP)]
OptionalData = Annotated[str | None, option("--data", "NAME|PATH", DATA_HELP)]
Tokens = Annotated[Path | None, option("--tokens", "CACHE", "Token cache, from `mvar tokenize`.")]
Validation = Annotated[Path | None, option("--validation", "CACHE", "Token cache of held-out images to measure on.")]
Classes = Annotated[
    list[str] | None, option("--class", "NAME|#N|all", "A name, #N for class N, a comma list, or all; repeatable.")
]
ClassNames = Annotated[
    str | None,
    option("--class-names", "FILE|LIST", "Names of classes that have only numbers: a file with one per line, a comma"
           " list, imagenet; or by-number."),
]  # fmt: skip
Words = Annotated[
    list[str] | None, option("--words", "TEXT", "A text, for models that are conditioned on words; repeatable.")
]
VectorsFile = Annotated[
    Path | None, option("--vectors", "FILE", "Vectors as .npy, .npz or .safetensors; see docs/conditioning.md.")
]
Steps = Annotated[int | None, option("--steps", "N", "Optimizer steps.", min=1)]
BatchSize = Annotated[int | None, option("--batch-size", "N", "Images at a time.", min=1)]
_SEED = option("--seed", "N", "Seed of everything random.", min=0)
Seed = Annotated[int, _SEED]
OptionalSeed = Annotated[int | None, _SEED]
_WINDOWS = "One odd number for all windowed scales, a comma list (0 = whole scale), or auto."
Windows = Annotated[str | None, option("--windows", "K|LIST|auto", _WINDOWS)]
ScalePrefixes = Annotated[
    str | None, option("--scale-prefixes", "N|all", "Scales that a token sees, its own included: 1 is MVAR.")
]
_FEATURES = "inception, demo, or a demo classifier (.safetensors); auto is demo for digits, else inception."
Features = Annotated[str, option("--features", "NAME|FILE", _FEATURES)]
InceptionWeights = Annotated[
    Path | None, option("--inception-weights", "FILE", "The network that FID is defined by.")
]  # fmt: skip
Download = Annotated[bool, option("--download", None, "Download the Inception weights if they are absent.")]
FeatureCache = Annotated[Path | None, option("--cache", "DIR", "Save features there, and reuse those that are known.")]
Out = Annotated[Path, option("--out", "DIR", "Where to write.")]
SampleOut = Annotated[Path, option("--out", "PATH", "A directory, or a file for npz and grid.")]
SampleFormat = Annotated[str | None, option("--format", "FORMAT", "png, npz or grid. Default: as --out ends.")]
Stages = Annotated[bool, option("--stages", None, "Also a strip per image: after each scale.")]
Overwrite = Annotated[bool, option("--overwrite", None, "Replace an output that exists.", OUTPUT)]
Resume = Annotated[bool, option("--resume/--no-resume", None, "Resume from a checkpoint in --out.")]
AsJson = Annotated[bool, option("--json", None, "Print one JSON object on stdout instead of tables.", OUTPUT)]
DryRun = Annotated[bool, option("--dry-run", None, "Print configuration, cost and plan, and do nothing.", OUTPUT)]
Fsdp = Annotated[
    bool, option("--fsdp", None, "Shard the model over the processes, for one too large for a GPU.", MACHINE)
]
Verify = Annotated[
    bool,
    option("--verify/--no-verify", None, "Compare weights and token shards with the hashes saved with them.", MACHINE),
]
NumProcesses = Annotated[int, option("--nproc", "N", "Processes on this machine, one per GPU.", MACHINE, min=1)]


class MachineOptions(Group):
    """Where and how to compute."""

    builds = "Machine"

    device: Annotated[str, option("--device", "NAME", "auto, cpu, cuda, cuda:N or mps.", MACHINE)] = "auto"
    dtype: Annotated[str, option("--dtype", "NAME", "auto, float32, bfloat16 or float16.", MACHINE)] = "auto"
    attention: Annotated[
        str,
        option("--attention", "NAME", "auto, reference, dense, tiled, flex or natten; a named one never falls back.",
               MACHINE),
    ] = "auto"  # fmt: skip
    compile: Annotated[bool, option("--compile", None, "Compile the blocks first: for long runs.", MACHINE)] = False
    verify: Verify = True
    memory: Annotated[
        str | None,
        option("--memory", "SIZE", "Memory that sampling may use, as in 2GB. Default: half of what is free. Changes no"
               " image.", MACHINE),
    ] = None  # fmt: skip
    max_pixels: Annotated[
        int | None,
        option("--max-pixels", "N", "Pixels of the largest image that is read. Default: 178956970.", MACHINE, min=1),
    ] = None


class TrainOptions(Group):
    """What trainings start from, where they resume, and keys of the training section that have options of their own."""

    tokens: Tokens = None
    data: OptionalData = None
    tokenizer: Annotated[
        Path | None,
        option("--tokenizer --checkpoint", "PATH", "Model directory with the tokenizer; finetune-from-var also accepts"
               " its published file. Default: the one that made the tokens, or the VAR's own."),
    ] = None  # fmt: skip
    preset: Preset = None
    settings: Settings = None
    seed: OptionalSeed = None
    validation: Annotated[
        str | None, option("--validation", "CACHE|IMAGES", "Held-out images to measure on: tokens, or as DIR:val.")
    ] = None
    resume: Resume = True
    overwrite: Overwrite = False
    fsdp: Fsdp = False
    dry_run: DryRun = False
    steps: Steps = None
    epochs: Annotated[float | None, option("--epochs", "N", "Passes over the tokens.")] = None
    batch_size: BatchSize = None
    micro_batch: Annotated[
        int | None,
        option("--micro-batch", "N", "Images computed together; the gradient is that of the whole batch.", MACHINE,
               min=1),
    ] = None  # fmt: skip
    ema: Annotated[float | None, option("--ema", "DECAY", "Average the weights, e.g. 0.999.", LOOP)] = None
    checkpoint_every: Annotated[
        int | None,
        option("--checkpoint-every", "N", "Steps between checkpoints, and between validations.", LOOP, min=1),
    ] = None
    activation_checkpointing: Annotated[
        bool | None,
        option("--activation-checkpointing/--no-activation-checkpointing", None,
               "Compute blocks again in the backward pass: less memory, more time.", MACHINE),
    ] = None  # fmt: skip


class GenerateOptions(Group):
    """What is generated and where it goes, for `sample` and `edit`."""

    classes: Classes = None
    words: Words = None
    seed: Seed = 0
    batch_size: BatchSize = None
    format: SampleFormat = None
    save_tokens: Annotated[bool, option("--save-tokens", None, "Also write the token indices.")] = False
    tokenizer: TokenizerFile = None
    overwrite: Overwrite = False
    dry_run: DryRun = False


class SamplingOptions(Group):
    """Every setting of sampling; what is not given is as the model recommends."""

    builds = "SamplingConfig"

    cfg: Annotated[float | None, option("--cfg", None, "Guidance; 0 is none. Default: the model's.", min=0)] = None
    top_k: Annotated[int | None, option("--top-k", None, "Keep the k likeliest codes; 0 keeps all.", min=0)] = None
    top_p: Annotated[
        float | None, option("--top-p", None, "Keep this much probability; 0 or 1 keep all.", min=0, max=1)
    ] = None
    min_p: Annotated[
        float | None,
        option("--min-p", None, "Keep codes at least this fraction as likely as the likeliest; 0 keeps all.", min=0,
               max=1),
    ] = None  # fmt: skip
    cfg_schedule: Annotated[
        str | None,
        option("--cfg-schedule", "NAME|LIST",
               "Guidance over the scales: linear (as published), constant, cosine, or a comma list."),
    ] = None  # fmt: skip
    cfg_scales: Annotated[
        str | None, option("--cfg-scales", "FIRST-LAST", "Guide these scales only, from 0: 4-9.")
    ] = None  # fmt: skip
    more_smooth: Annotated[
        bool | None, option("--more-smooth/--no-more-smooth", None, "Smoother looks; never for metrics.")
    ] = None


# What a command's function receives: the group's object, with those options that change something there.
Device = Annotated[Any, MachineOptions.only("device", "dtype", "verify", "max_pixels")]
MemoryDevice = Annotated[Any, MachineOptions.only("device", "dtype", "memory", "verify")]
AttentionDevice = Annotated[Any, MachineOptions.only("device", "dtype", "attention", "verify")]
AnalysisDevice = Annotated[Any, MachineOptions.only("device", "dtype", "attention", "verify", "max_pixels")]
Machine = Annotated[Any, MachineOptions.only("device", "dtype", "attention", "compile", "verify", "max_pixels")]
SamplingMachine = Annotated[Any, MachineOptions.only("device", "dtype", "attention", "compile", "verify", "memory")]
EditingMachine = Annotated[Any, MachineOptions]
BasicSampling = Annotated[Any, SamplingOptions.only("cfg", "top_k", "top_p")]
GuidedSampling = Annotated[Any, SamplingOptions.only("cfg", "top_k", "top_p", "cfg_schedule", "cfg_scales")]
Sampling = Annotated[Any, SamplingOptions]
Generate = Annotated[Any, GenerateOptions]
Train = Annotated[Any, TrainOptions]
TrainTokenizer = Annotated[
    Any,
    TrainOptions.only("preset", "settings", "seed", "resume", "overwrite", "dry_run", "steps", "batch_size",
                      "micro_batch", "ema", "checkpoint_every"),
]  # fmt: skip


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from a comma list (ConfigError)."""
    try:
        return tuple(int(number.replace("_", "?")) for number in text.split(","))
    except ValueError:
        raise mvar.ConfigError(f"{option} {text!r} is not a comma list of whole numbers.") from None


def command(*, example: str) -> Callable[[CommandFunction], CommandFunction]:
    """Mark a command's function with the command line that its help ends with."""

    def mark(function: CommandFunction) -> CommandFunction:
        vars(function).update(example=example)
        return function

    return mark
