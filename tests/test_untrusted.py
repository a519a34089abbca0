"""Hostile JSON, YAML and files that are none: a clear error, quickly; never execution, a traceback or a hang."""

from __future__ import annotations

import os
import re
import time

import pytest
import yaml

from mvar_core.errors import ConfigError, DataError
from mvar_core.untrusted import (
    LARGEST_YAML,
    open_regular,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
    write_yaml,
)

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nonsense", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "NaN",
        "[Infinity]", "[-Infinity]", "1e999", "1" + "0" * 30, "1" * 10_000, '"\\ud800', "[1] [2]", "[" * 70 + "]" * 70,
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_json(text):
    with pytest.raises(DataError, match="record") as failure:
        parse_json(text, "record")
    assert len(str(failure.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        BOMB, MERGES, "&a [*a]", "a: &a {b: *a}", "&a {<<: *a}", "[" * 100_000, "a: " * 50_000, "- " * 20_000,
        "a: .inf", "a: .nan", "a: 1.0e+999", "a: 1" + "0" * 30, "a: " + "1" * 10_000,
        "a: 1\na: 2",
        "a: !!python/object/apply:os.system ['true']", "a: !thing 1", "a: !!binary aGk=", "a: !!set {b}",
        "? [a, b]\n: 1", "? {a: 1}\n: 1", "{", "a: b: c", "a\0b", "--- 1\n--- 2", "a: *b", "%YAML 9.9\n---\n1", "<<: 1",
        "a: " + "9:59" + ":59" * 20, "[a, " * 9_000, "[" + "a, " * 20_000,
    ],
    ids=range(30),
)  # fmt: skip
def test_hostile_yaml(text):
    start = time.monotonic()
    with pytest.raises(ConfigError, match="preset") as failure:
        parse_yaml(text, "preset", ConfigError)
    assert time.monotonic() - start < 10
    assert len(str(failure.value)) < 600


def test_what_people_write_is_read():
    assert parse_yaml("a: &a {x: 1, y: 4.0e-3}\nb: {<<: *a, y: 2}\nc: [1, true, null, text]\n", "preset") == {
        "a": {"x": 1, "y": 0.004}, "b": {"x": 1, "y": 2}, "c": [1, True, None, "text"],
    }  # fmt: skip
    assert parse_yaml("", "preset") is None
    assert parse_json('\n{"a": [1, 2.5, "x", null, {"b": {}}]}', "x") == {"a": [1, 2.5, "x", None, {"b": {}}]}
    assert str(parse_json("[NaN]", "x", finite=False)) == "[nan]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("3.", 3.0), ("-0", 0), ("+7", 7), ("1.50", 1.5), ("True", True),
        ("FALSE", False), ("~", None), ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"),
        ("2024-01-01", "2024-01-01"),
        ("1,2,3x4", "1,2,3x4"), ("256x384", "256x384"), ("1.2.3", "1.2.3"), ("auto:5", "auto:5"), ("12:ab", "12:ab"),
        ("0x1F", "0x1F"), ("nan", "nan"), ("'1_2'", "1_2"), ("'0123'", "0123"), ("a_1", "a_1"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_values_without_quotes_mean_what_they_look_like(text, value):
    found = parse_yaml(f"key: {text}", "preset")["key"]
    assert found == value
    assert type(found) is type(value)
    assert parse_yaml(write_yaml({"key": value}), "preset") == {"key": value}


@pytest.mark.parametrize("text", ["1_2_4_8", "1_000.5", "-1_0", "1:30", "190:20:30.15", "010", "-007", "1_"])
def test_what_could_be_a_number_or_a_text_is_refused(text):
    for document in (f"key: {text}", f"key: [1, {text}]", f"{{{text}: 1}}"):
        with pytest.raises(ConfigError, match=re.escape(text)):
            parse_yaml(document, "preset", ConfigError)


@pytest.mark.parametrize(
    "value", ["1e5", "1_2", "yes", "0o17", "1:30", "010", "true", "", " a", "ä: b", "1.5", "null", "<<"]
)
def test_text_that_looks_like_something_else_is_written_in_quotes(value):
    written = write_yaml({value: [value]})
    assert parse_yaml(written, "preset") == {value: [value]}
    assert yaml.safe_load(written) == {value: [value]}


def test_files_that_are_no_documents(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "wide").write_bytes("a: 1".encode("utf-16"))
    (tmp_path / "large").write_bytes(b" " * (LARGEST_YAML + 1))
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "loop", "latin", "wide", "large", "zero", "absent", "x" * 300, "a\0b", "."):
        for read in (read_yaml, read_json):
            with pytest.raises(DataError, match=r"(?s)" + ("" if len(name) > 9 or name in (".", "a\0b") else name)):
                read(tmp_path / name)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "bom") == read_yaml(tmp_path / "bom") == {}
    with open_regular(tmp_path / "bom") as file:
        assert file.read(3) == b"\xef\xbb\xbf"
    assert read_text(tmp_path / "bom") == "{}"
