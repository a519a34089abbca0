"""Ctrl-C and SIGTERM between steps, never inside one: half an optimizer step is no state to resume from."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptFlag:
    """While entered, the first Ctrl-C or SIGTERM sets `raised` and lets the step finish.

    A second Ctrl-C interrupts at once. A second SIGTERM does not: launchers and batch systems send several.
    Outside the main thread, where handlers cannot be set, it changes nothing.
    """

    def __init__(self) -> None:
        self.raised = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True
