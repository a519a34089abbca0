"""Hostile variants of valid files, and the loop that tries them: every parser of outside bytes ends in an MvarError."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mvar_core.errors import MvarError

SECONDS = float(os.environ.get("MVAR_FUZZ_SECONDS", "0"))
"""How long each fuzzer runs; 0 is one short round that is always the same."""

EXAMPLES = 25
SLOWEST = 10.0

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**63, 2**64, 10**12, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "\x00", "\ud800", "../../etc/passwd", "/", "a" * 5000, "1e9",
    "class", "all", "é́", [], [[]], [1], [0, 0], [-1, 2], [10**9], ["a"], {}, {"a": 1}, {"": []},
)  # fmt: skip


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


hostile_values = st.one_of(
    st.sampled_from(HOSTILE).map(copy.deepcopy),
    st.sampled_from((10, 200)).map(nested),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-5, 50), max_size=6),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with a few bytes flipped, cut out, repeated, replaced or put in, or an end that is missing."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        # Headers stand at the beginning and at the end: that is where most of the damage goes.
        at = draw(st.one_of(st.integers(0, min(200, len(data) - 1)), st.integers(0, len(data) - 1)))
        at = len(data) - 1 - at if draw(st.booleans()) else at
        size = draw(st.sampled_from((1, 2, 4, 8, 64, 1000)))
        match draw(st.sampled_from(("flip", "set", "cut", "repeat", "insert", "truncate", "large"))):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
            case "cut":
                del data[at : at + size]
            case "repeat":
                data[at:at] = data[at : at + size]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "truncate":
                del data[at:]
            case "large":
                data[at : at + 8] = draw(st.sampled_from((b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"99999999")))
    return bytes(data)


@st.composite
def damaged_tree(draw: st.DrawFn, valid: Any) -> Any:
    """JSON values of which some are replaced by hostile ones, some are missing, and some were never heard of."""
    tree = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent, node = None, tree
        key: Any = None
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 3))):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            return draw(hostile_values)
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "add"))):
            case "replace":
                parent[key] = draw(hostile_values)
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(hostile_values)
            case "add":
                parent.insert(key, draw(hostile_values))
    return tree


def fuzz(
    check: Callable[[Any], None], files: st.SearchStrategy[Any], examples: int = EXAMPLES, share: float = 1.0
) -> None:
    """Try variants of a file: each is read, or refused by an MvarError of one clear line, within ten seconds.

    Args:
        check: Reads one.
        files: The variants.
        examples: How many in a round.
        share: Of the time that the fuzzer has.
    """

    def attempt(file: Any) -> None:
        # The time of the process itself: the machine may be busy.
        start, message = time.process_time(), "read"
        try:
            check(file)
        except MvarError as error:
            message = error.message.strip()
        assert message
        assert "\n" not in message
        assert len(message) < 2000
        assert time.process_time() - start < SLOWEST, "slow"

    end, number = time.monotonic() + share * SECONDS, 0
    while number == 0 or time.monotonic() < end:
        profile = settings(max_examples=examples, derandomize=False, report_multiple_bugs=False)
        seed(number)(profile(given(files)(attempt)))()
        number += 1
