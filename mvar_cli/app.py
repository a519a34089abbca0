"""The `mvar` application: a table of commands loaded when used, and the boundary where errors become one line."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from collections.abc import Collection, Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from mvar_core import __version__
from mvar_core.errors import ConfigError, MvarError, nearest


class CommandEntry(NamedTuple):
    """What the top-level help shows of a command, and where its code is."""

    name: str
    module: str
    summary: str
    panel: str
    shared: bool = False
    """Whether several processes can share the work, so that it has --nproc and runs under torchrun."""


COMMANDS = (
    CommandEntry(
        "quickstart", "quickstart", "From bundled images to samples, measures and a report, in minutes.", "Start"
    ),
    CommandEntry("doctor", "doctor", "What this machine has, what mvar will use, and what mends the rest.", "Start"),
    CommandEntry("plan", "plan", "Parameters, operations, KV cache and memory of a model; lists the presets.", "Start"),
    CommandEntry("train-tokenizer", "train_tokenizer", "Train a multi-scale residual VQVAE on images.", "Train", True),
    CommandEntry("tokenize", "tokenize", "Turn images into a cache of token indices.", "Train", True),
    CommandEntry("train", "train", "Train a VAR or MVAR on a token cache or on images.", "Train", True),
    CommandEntry(
        "finetune-from-var", "finetune_from_var", "Train an MVAR that starts from VAR weights.", "Train", True
    ),
    CommandEntry("sample", "sample", "Draw class-conditional images.", "Use", True),
    CommandEntry("edit", "edit", "Draw a part of given images anew: in-painting, out-painting, classes.", "Use", True),
    CommandEntry("evaluate", "evaluate", "FID, sFID, IS, precision, recall and KID against a reference.", "Use", True),
    CommandEntry("analyze-attention", "analyze_attention", "Where attention goes, per scale and neighbourhood.", "Use"),
    CommandEntry("ablate", "ablate", "What scale prefixes and windows cost in quality, over seeds.", "Use"),
    CommandEntry("bench", "bench", "Measure VAR against MVAR in one run: time, memory, stages.", "Use"),
    CommandEntry("convert", "convert", "Published .pth files to a model directory, and back.", "Use"),
)
"""Every command, in the order of the help. Listing them here lets the help answer without importing any."""

SUBCOMMANDS = (
    CommandEntry("evaluate make-reference", "make_reference", "Measure a reference once, for `evaluate`.", "Use", True),
)
"""Commands that are words behind another command."""


def load_module(entry: CommandEntry) -> Any:
    """A command's module."""
    return importlib.import_module(f"mvar_cli.commands.{entry.module}")


def load_command(entry: CommandEntry, arguments: Sequence[str] = ()) -> Any:
    """Import a command's module and build its command from the module's `run` and `EXAMPLE`.

    Args:
        entry: Which command.
        arguments: What was typed after its name, for the processes that --nproc starts.
    """
    from mvar_cli.option_groups import ungrouped

    module = load_module(entry)
    run = ungrouped(module.run)
    if entry.shared:
        from mvar_cli.launch import launchable

        run = launchable(entry.name, run, arguments)
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    # Typer keeps the line breaks of a docstring, which fit the source and not the terminal.
    paragraphs = inspect.cleandoc(module.run.__doc__).split("\n\n")
    single.command(
        entry.name,
        help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs),
        epilog=f"[bold]Example[/bold]\n\n{module.EXAMPLE}",
    )(run)
    return typer.main.get_command(single)


def without_bare_options(args: list[str], names: Collection[str]) -> list[str]:
    """The arguments without those of the named options that no value follows."""
    kept = []
    for position, argument in enumerate(args):
        following = args[position + 1 : position + 2]
        if argument in names and (not following or following[0].startswith("-")):
            continue
        kept.append(argument)
    return kept


class LazyGroup(TyperGroup):
    """A group that imports a command only when it is called, and turns errors into one line and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its stub; an unknown name fails with the nearest ones."""
        below = next((entry for entry in SUBCOMMANDS if entry.name.split() == args[:2]), None)
        if below is not None:
            _require_one_process(below)
            return below.name, load_command(below, args[2:]), args[2:]
        entry = next((entry for entry in COMMANDS if entry.name == args[0]), None)
        if entry is not None:
            bare = getattr(load_module(entry), "BARE_OPTIONS", ())
            _require_one_process(entry)
            arguments = without_bare_options(args[1:], bare)
            return entry.name, load_command(entry, arguments), arguments
        if not ctx.resilient_parsing and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. {nearest(args[0], [entry.name for entry in COMMANDS])}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command inside the error boundary."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            line = error_line(error)
            if line is None:
                raise
            from mvar_cli.launch import ElsewhereError, lost_connection, report

            if os.environ.get("MVAR_DEBUG") == "1":
                traceback.print_exc()
            elsewhere = isinstance(error, ElsewhereError)
            report(line, consequence=elsewhere or lost_connection(error), silent=elsewhere)
            code = 1
        # Out here the error is gone, and with it what its frames held open, such as files under temporary names.
        from mvar_cli.launch import Worker, leave

        if code == 130 and Worker.here().rank == 0:
            typer.echo("interrupted", err=True)
        raise leave(code)


def error_line(error: Exception) -> str | None:
    """What to print for an exception, or None for those that typer itself deals with."""
    if isinstance(error, MvarError):
        return f"error: {error}"
    if isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)) or hasattr(error, "format_message"):
        return None
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"error: out of memory: {text} Use a smaller --batch-size; `mvar plan` predicts what fits."
    if isinstance(error, OSError):
        return f"error: {text}"
    from mvar_cli.launch import lost_connection

    if lost_connection(error):
        return (
            f"error: the connection to another process of this job is lost: {text} "
            "Run the same command again: what can be resumed goes on from where it was last saved."
        )
    return (
        f"error: unexpected {type(error).__name__}: {text} "
        "This is a fault in mvar, not in your input. MVAR_DEBUG=1 shows where it happened; please report it."
    )


def _require_one_process(entry: CommandEntry) -> None:
    """Refuse to do the same work several times over.

    Raises:
        ConfigError: torchrun has started several processes of a command that cannot share its work.
    """
    if not entry.shared and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        raise ConfigError(f"`mvar {entry.name}` runs in one process.", "Start it without torchrun.")


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
    from mvar_cli.console import log_to_stderr
    from mvar_core.allocator import keep_freed_memory

    keep_freed_memory()
    log_to_stderr()


def _register_stubs() -> None:
    """Stand-ins that carry name and summary for the help; `resolve_command` puts the real command in their place."""

    def stub() -> None:  # pragma: no cover
        raise AssertionError("a stub was called instead of its command")

    for entry in COMMANDS:
        app.command(entry.name, help=entry.summary, rich_help_panel=entry.panel)(stub)


_register_stubs()


def main() -> None:
    """The `mvar` entry point."""
    app(prog_name="mvar")


if __name__ == "__main__":
    main()
