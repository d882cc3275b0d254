from __future__ import annotations

import os
import signal
import threading

import pytest

from sssd_hpc.train.signals import SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_repeated_sigterm_is_noted_once() -> None:
    with StopFlag() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    assert stop.name == "SIGTERM"


def test_outside_the_main_thread_there_is_nothing_to_note() -> None:
    seen: list[str | None] = []

    def body() -> None:
        with StopFlag() as stop:
            seen.append(stop.name)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]
