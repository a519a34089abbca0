"""The `mvar` entry point, also `python -m mvar_cli`."""

import importlib
import io
import os
import sys


def main() -> None:
    """Run the command line; Ctrl-C during the imports ends it as any other does."""
    open_standard_streams()
    try:
        importlib.import_module("mvar_cli.app").app(prog_name="mvar")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def open_standard_streams() -> None:
    """Make /dev/null of each closed stream, whose number the next file would get; print what is no text escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
