from __future__ import annotations

import signal
import threading

import pytest

from mvar_core.distributed import interrupt_flag


def test_first_interrupt_sets_the_flag_and_second_one_raises():
    before = signal.getsignal(signal.SIGINT)
    with interrupt_flag() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter() -> None:
        with interrupt_flag() as flag:
            seen.append((flag.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_sigterm_sets_the_flag_however_often_it_comes():
    before = signal.getsignal(signal.SIGTERM)
    with interrupt_flag() as flag:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert flag.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
