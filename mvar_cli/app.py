"""The `mvar` application: a table of commands loaded when used, and the boundary where errors become one line."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from mvar_cli import console, options
from mvar_cli.options import grouped, signature
from mvar_core import __version__
from mvar_core.environment import inside_torchrun, report_failure, torchrun_number
from mvar_core.errors import ConfigError, MvarError, is_out_of_memory, nearest, one_line, write_hint


class CommandEntry(NamedTuple):
    """What the top-level help shows of a command, and where its code is."""

    name: str
    module: str
    summary: str
    panel: str
    shared: bool = False
    """Whether several processes can share the work, so that it has --nproc and runs under torchrun."""


COMMANDS = (
    CommandEntry("quickstart", "quickstart", "From images to a model, samples, metrics and a report.", "Start"),
    CommandEntry("doctor", "doctor", "What this machine has, what mvar will use, and how to fix the rest.", "Start"),
    CommandEntry("plan", "plan", "Parameters, operations, KV cache and memory of a model; lists the presets.", "Start"),
    CommandEntry("train-tokenizer", "train_tokenizer", "Train a multi-scale residual VQVAE on images.", "Train", True),
    CommandEntry("tokenize", "tokenize", "Turn images into a cache of token indices.", "Train", True),
    CommandEntry("train", "train", "Train a VAR or MVAR on a token cache or on images.", "Train", True),
    CommandEntry("finetune-from-var", "finetune_from_var", "Train an MVAR that starts from a VAR.", "Train", True),
    CommandEntry("sample", "sample", "Generate class-conditional images.", "Use", True),
    CommandEntry("edit", "edit", "In-painting, out-painting and class editing of given images.", "Use", True),
    CommandEntry("evaluate", "evaluate", "FID, sFID, IS, precision, recall and KID against a reference.", "Use", True),
    CommandEntry("analyze-attention", "analyze_attention", "Where attention goes, per scale and neighbourhood.", "Use"),
    CommandEntry("ablate", "ablate", "What scale prefixes and windows cost in quality, over seeds.", "Use"),
    CommandEntry("bench", "bench", "Measure VAR against MVAR in one run: time, memory, stages.", "Use"),
    CommandEntry("convert", "convert", "Published .pth files to a model directory, and back.", "Use"),
    CommandEntry("evaluate make-reference", "make_reference", "Measure a reference once, for `evaluate`.", "Use", True),
    CommandEntry("evaluate reconstruction", "evaluate_reconstruction", "rFID, PSNR, SSIM of a tokenizer.", "Use"),
    CommandEntry("evaluate likelihood", "evaluate_likelihood", "Bits per token, zero-shot classes.", "Use", True),
)
"""Every command, in the order of the help, which lists those of one word; so the help imports none of them."""

_LOOP = {
    "--accumulate": "Use --micro-batch N, the images computed together, or --set {}.accumulate=N.",
    "--keep": "Use --set {}.keep=N.",
    "--sample-every": "Use --set {}.sample_every=N.",
    "--tensorboard": "Use --set {}.tensorboard=true.",
    "--wandb": "Use --set {}.wandb=true.",
}


def _loop(section: str) -> dict[str, str]:
    return {option: instead.format(section) for option, instead in _LOOP.items()}


MOVED: dict[str, dict[str, str]] = {
    "ablate": {
        "--epochs": "Use --steps, or --set train.epochs=N with --set train.steps=null.",
        "--bench-batch": "Leave it out: eight images together are timed.",
        "--demo-classifier": "Use --features FILE.safetensors.",
    },
    "edit": {
        "--stages": "`mvar sample --stages` shows the stages of a sample.",
        "--more-smooth": "From Python: mvar.edit(settings=SamplingConfig(more_smooth=True)).",
        "--cfg-schedule": "From Python: mvar.edit(settings=SamplingConfig(cfg_schedule=...)).",
        "--cfg-scales": "From Python: mvar.edit(settings=SamplingConfig(cfg_scales=...)).",
    },
    "bench": {"--more-smooth": "From Python: mvar.bench(settings=SamplingConfig(more_smooth=True))."},
    "plan": {"--list": "`mvar plan` alone lists the presets."},
    "evaluate": {
        "--likelihood": "Use `mvar evaluate likelihood` instead.",
        "--reconstruction": "Use `mvar evaluate reconstruction` instead.",
        "--demo-classifier": "Use --features FILE.safetensors instead.",
        "--save-samples": "Use `mvar sample --class all --num N --out FILE.npz`, then --samples FILE.npz.",
        "--overwrite": "Leave it out: nothing is written.",
    },
    "evaluate make-reference": {
        "--samples": "Use --data instead.",
        "--demo-classifier": "Use --features FILE.safetensors instead.",
    },
    "tokenize": {"--shard-images": "Leave it out: the size of a shard follows from the number of images."},
    "train-tokenizer": _loop("train_tokenizer"),
    "train": _loop("train"),
    "finetune-from-var": {
        **_loop("train"),
        "--image-size": "Use --set image_size=512.",
        "--pyramid": "Use --set patch_sizes=1,2,3, or make a model directory with `mvar convert --pyramid`.",
    },
}
"""Options of earlier versions, by command, and what to type now."""


def load_command(entry: CommandEntry, arguments: Sequence[str] = ()) -> Any:
    """Import a command's module and build its command from the function of the module's name.

    `arguments` are what was typed after its name, for the processes that --nproc starts.
    """
    function = getattr(importlib.import_module(f"mvar_cli.commands.{entry.module}"), entry.module)
    typed = [*entry.name.split(), *arguments]  # now: the parser takes its list apart

    def run(*, nproc: int = 1, as_json: bool, **values: Any) -> None:
        if nproc > 1 and starts_processes(nproc):
            code, text = distributed().launch(typed, nproc, str(values.get("device", "auto")))
            if text:
                console.write(text, sys.stderr)
                console.show_json({"error": text.removeprefix("error: "), "hint": None})
            raise typer.Exit(code)
        for name, value in values.items():
            if value == "" or (isinstance(value, (list, tuple)) and "" in value):
                raise typer.BadParameter("expected a value, found an empty text", param_hint=name.replace("_", "-"))
        function(**grouped(function, values))

    shared = {"nproc": (options.NumProcesses, 1)} if entry.shared else {}
    flat = signature(function, as_json=(options.AsJson, False), **shared)
    vars(run).update(__signature__=flat, __annotations__={name: o.annotation for name, o in flat.parameters.items()})
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    # Typer keeps the line breaks of a docstring, which fit the source and not the terminal.
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    single.command(
        entry.name,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs),
        epilog=f"[bold]Example[/bold]\n\n{function.example}",
    )(run)
    return typer.main.get_command(single)


def starts_processes(nproc: int) -> bool:
    """Whether --nproc starts processes here: not inside torchrun, which must have started as many (ConfigError)."""
    if not inside_torchrun():
        return True
    if (started := torchrun_number("LOCAL_WORLD_SIZE", nproc)) != nproc:
        raise ConfigError(
            f"--nproc {nproc} inside torchrun, which has started {started} processes here.",
            "Leave out --nproc: torchrun's --nproc-per-node says how many.",
        )
    return False


def distributed() -> Any:
    """`mvar_core.distributed`, and torch with it, loaded when it is needed."""
    return importlib.import_module("mvar_core.distributed")


def lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process of this job has gone."""
    return "RANK" in os.environ and bool(distributed().lost_connection(error))


def without_bare_preset(args: list[str]) -> list[str]:
    """The arguments without a --preset that no value follows, which asks for the list of presets."""
    following = [*args[1:], "-"]
    return [one for one, after in zip(args, following, strict=False) if one != "--preset" or not after.startswith("-")]


class LazyGroup(TyperGroup):
    """A group that imports a command only when it is called, and turns errors into one line and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its stub; an unknown name fails with the nearest ones."""
        known = {entry.name: entry for entry in COMMANDS}
        entry = known.get(" ".join(args[:2])) or known.get(args[0])
        if entry is None:
            if not ctx.resilient_parsing and not args[0].startswith("-"):
                ctx.fail(f"No such command {args[0]!r}. {nearest(args[0], known)}")
            return super().resolve_command(ctx, args)
        if inside_torchrun() and not entry.shared:
            raise ConfigError(f"`mvar {entry.name}` runs in one process.", "Start it without torchrun.")
        rest = args[len(entry.name.split()) :]
        console.output.as_json = "--json" in rest
        for option, instead in MOVED.get(entry.name, {}).items():
            if any(argument.split("=")[0] == option for argument in rest):
                ctx.fail(f"{option} is no longer an option of `mvar {entry.name}`. {instead}")
        if entry.name == "plan":
            rest = without_bare_preset(rest)
        return entry.name, load_command(entry, rest), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command inside the error boundary."""
        console.output.as_json = False
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            code = 130
        except typer.Exit as end:
            if end.exit_code != 130:
                raise
            code = 131  # 130, reported already
        except Exception as error:
            if os.environ.get("MVAR_DEBUG") == "1":
                traceback.print_exc()
            problem = explained(error)
            if problem is None:
                if hasattr(error, "format_message"):
                    console.show_json({"error": error.format_message(), "hint": "--help lists the options."})
                raise
            remote = "RANK" in os.environ and isinstance(error, distributed().RemoteError)
            report_failure(f"error: {problem}", consequence=remote or lost_connection(error), silent=remote)
            console.show_json({"error": problem.message, "hint": problem.hint})
            code = 1
        finally:
            console.end_progress()
        # Out here the error is gone, and with it what its frames held open, such as files under temporary names.
        if code == 130:
            console.note("interrupted")
        raise leave(min(code, 130))


def leave(code: int) -> typer.Exit:
    """What to raise to end with this code; a process of several ends here, for its exit could wait for the others."""
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return typer.Exit(code)


def explained(error: Exception) -> MvarError | None:
    """An exception as a message and what to do about it; None for those that typer itself handles."""
    if isinstance(error, MvarError):
        return error
    if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message"):
        return None
    text = one_line(error)
    if is_out_of_memory(error):
        hint = "Use a smaller --batch-size, or give the process more memory; `mvar plan` predicts what fits."
        return MvarError(f"out of memory: {text.rstrip('.')}.", hint)
    if isinstance(error, OSError):
        path = f"{error.filename}: " if error.filename and error.strerror else ""
        return MvarError(f"{path}{error.strerror or text}.", write_hint(error.errno))
    if lost_connection(error):
        return MvarError(
            f"the connection to another process of this job is lost: {text}",
            "Run the same command again: what can be resumed continues from where it was last saved.",
        )
    return MvarError(
        f"unexpected {type(error).__name__}: {text}",
        "This is a fault in mvar, not in your input. MVAR_DEBUG=1 shows where it happened; please report it.",
    )


app = typer.Typer(
    name="mvar",
    cls=LazyGroup,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, fine-tune, run, measure and understand next-scale visual autoregressive models: VAR and MVAR.",
    epilog="[bold]Example[/bold]\n\nmvar quickstart --out runs/quickstart",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mvar {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    importlib.import_module("mvar_core.allocator").keep_freed_memory()
    console.log_to_stderr()


def _stub() -> None:  # pragma: no cover
    raise AssertionError("a stub was called instead of its command")


for _entry in COMMANDS:  # stubs carry name and summary for the help; `resolve_command` replaces them
    if " " not in _entry.name:
        app.command(_entry.name, help=_entry.summary, rich_help_panel=_entry.panel)(_stub)
