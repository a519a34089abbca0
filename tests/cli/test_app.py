"""Help, versions, exit codes: what holds for every command."""

import json
import os
import subprocess
import sys

import pytest
import typer

import mvar_core
from mvar_cli.__main__ import main
from mvar_cli.app import COMMANDS, load_command
from mvar_core import __version__
from mvar_core.distributed import connect
from mvar_core.errors import DataError

NAMES = [entry.name for entry in COMMANDS if " " not in entry.name]
HEAVY = ("torch", "sklearn", "matplotlib", "PIL", "safetensors", "natten", "torch_fidelity")


def modules_after(*arguments: str) -> tuple[str, list[str]]:
    """stdout of a command run in a process of its own, and the heavy modules it loaded."""
    code = (
        "import sys, json\nfrom mvar_cli.app import app\n"
        f"try:\n    app({list(arguments)!r}, prog_name='mvar')\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('\\nloaded', json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, loaded = result.stdout.rpartition("\nloaded ")
    return text, json.loads(loaded)


def test_help_lists_every_command_and_loads_nothing_heavy():
    text, loaded = modules_after("--help")
    assert loaded == []
    for name in NAMES:
        assert name in text
    assert "mvar quickstart --out runs/quickstart" in text


def test_help_of_every_command_loads_nothing_heavy_and_ends_with_an_example():
    code = (
        "import sys, json\nfrom mvar_cli.app import app\n"
        f"for name in {NAMES!r}:\n    try:\n        app([name, '--help'], prog_name='mvar')\n"
        "    except SystemExit as end:\n        assert not end.code\n    print('end of', name)\n"
        f"print('loaded', json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *pages, rest = result.stdout.split("end of ")
    assert len(pages) == len(NAMES)
    assert json.loads(rest.partition("loaded ")[2]) == []
    for name, page in zip(NAMES, pages, strict=True):
        example = [line.strip() for line in page.splitlines() if line.strip()][-1]
        assert example.startswith(f"mvar {name}"), page


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_examples_fit_a_line_and_name_options_that_exist(entry):
    example = str(load_command(entry).epilog).split("\n\n", 1)[1]
    assert len(example) <= 78  # a terminal of 80 columns, less the margin
    options = {option for parameter in load_command(entry).params for option in parameter.opts}
    assert {word for word in example.split() if word.startswith("--")} <= options
    assert len(entry.summary) <= 80


def test_version(mvar):
    assert mvar("--version").out.strip() == f"mvar {__version__}"


def test_wrong_usage_exits_with_2_and_suggests(mvar):
    unknown = mvar("smaple")
    assert unknown.code == 2
    assert "sample" in unknown.err
    assert mvar("sample", "--checkpiont", "x").code == 2
    assert mvar("sample").code == 2
    assert mvar("train-tokenizer", "--preset", "digits", "--data", "digits", "--out", "x", "--steps", "0").code == 2


def test_no_arguments_print_the_help(mvar):
    outcome = mvar()
    assert "quickstart" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("it broke.", "Fix it."), "it broke. Fix it."),
        (FileNotFoundError(2, "No such file", "x.png"), "x.png: No such file"),
        (OSError(28, "No space left on device", "out/a.npz"), "out/a.npz: No space left on device. Make room"),
        (MemoryError("10 GiB"), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "--batch-size"),
        (ZeroDivisionError("division by zero"), "fault in mvar"),
    ],
)
def test_errors_become_one_line(mvar, monkeypatch, error, text):
    def fail():
        raise error

    monkeypatch.setattr(mvar_core, "doctor", fail, raising=False)
    assert text in mvar("doctor").error
    found = mvar("doctor", "--json")
    assert (found.code, set(json.loads(found.out))) == (1, {"error", "hint"})


def test_wrong_usage_is_a_json_object_too(mvar):
    found = mvar("sample", "--json", "--seed", "x")
    assert found.code == 2
    assert "--seed" in json.loads(found.out)["error"]


def test_interruption_exits_with_130(mvar, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(mvar_core, "doctor", interrupt, raising=False)
    outcome = mvar("doctor")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("debug", ["0", "1"])
def test_a_traceback_is_shown_only_where_asked_for(mvar, monkeypatch, debug):
    monkeypatch.setenv("MVAR_DEBUG", debug)
    outcome = mvar("plan", "--preset", "nothing-like-it")
    assert outcome.code == 1
    assert ("Traceback" in outcome.err) == (debug == "1")


def test_doctor_prints_its_findings(mvar):
    findings = mvar("doctor", "--json").json["findings"]
    text = mvar("doctor").out
    assert all(finding["name"] in text for finding in findings)


def test_completion_knows_the_presets():
    from mvar_cli.options import complete_preset

    assert "mvar-d16-256" in complete_preset("mvar-d16")
    assert complete_preset("zzz") == []


def run(*arguments, **options):
    """A command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "mvar_cli", *arguments], text=True, check=False, **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_standard_streams_that_are_closed_or_full():
    command, pipe = ("plan", "--preset", "digits", "--json"), subprocess.PIPE
    assert run(*command, stdout=pipe, preexec_fn=lambda: os.close(2)).stdout.startswith("{")
    closed = run(*command, stderr=pipe, preexec_fn=lambda: os.close(1))
    assert (closed.returncode, closed.stderr) == (0, "")
    for arguments in (command, command[:-1]):
        reader, writer = os.pipe()
        os.close(reader)
        gone = run(*arguments, stdout=writer, stderr=pipe)
        os.close(writer)
        assert (gone.returncode, gone.stderr) == (0, ""), arguments
    with open("/dev/full", "w") as full:
        failed = run(*command, stdout=full, stderr=pipe)
    assert failed.returncode == 1
    assert "stdout cannot be written: No space left on device" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_text_that_a_stream_cannot_encode():
    listed = run(
        "plan", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (listed.returncode, listed.stderr) == (0, "")
    unknown = run("plan", "--json", "--preset", os.fsdecode(b"\xff"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert unknown.returncode == 1
    assert "udcff" in json.loads(unknown.stdout)["error"]
    assert "Traceback" not in unknown.stderr


def test_an_interruption_while_modules_are_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
    ],
)
def test_variables_of_torchrun_that_make_no_sense(mvar, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mvar_cli.app.leave", typer.Exit)
    assert next(name for name in variables if name in mvar("doctor").err)
    with pytest.raises(mvar_core.ConfigError), connect():
        pass
