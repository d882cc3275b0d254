"""The thread that writes: in order, bounded, and no error lost."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sssd_hpc.generate.writer import Writer

SIGNALS = np.zeros((2, 12, 5))


def rows(first: int) -> np.ndarray:
    return np.array([first, first + 1])


def test_all_is_written_in_order() -> None:
    seen: list[int] = []
    with Writer(lambda row, signal: seen.append(row)) as writer:
        for first in range(0, 20, 2):
            writer.put(rows(first), SIGNALS)
        writer.finish()
        assert writer.written == 20
    assert seen == [*range(20)]


def test_no_more_than_its_depth_waits() -> None:
    gate, begun, waiting = threading.Event(), threading.Event(), threading.Event()

    def write(row: int, signal: object) -> None:
        begun.set()
        gate.wait(60)

    with Writer(write, depth=2) as writer:
        writer.put(rows(0), SIGNALS)
        assert begun.wait(60)
        writer.put(rows(2), SIGNALS)
        writer.put(rows(4), SIGNALS)

        def fourth() -> None:
            writer.put(rows(6), SIGNALS)
            waiting.set()

        thread = threading.Thread(target=fourth)
        thread.start()
        assert not waiting.wait(0.2)
        gate.set()
        assert waiting.wait(60)
        thread.join()
        writer.finish()
        assert writer.written == 8


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("bad"), KeyboardInterrupt()])
def test_an_error_comes_out_and_nothing_is_written_after_it(error: BaseException) -> None:
    seen: list[int] = []

    def write(row: int, signal: object) -> None:
        if row == 3:
            raise error
        seen.append(row)

    def put_all() -> None:
        with Writer(write, depth=2) as writer:
            for first in range(0, 100, 2):
                writer.put(rows(first), SIGNALS)
            writer.finish()

    with pytest.raises(type(error)) as caught:
        put_all()
    assert caught.value is error
    assert seen == [0, 1, 2]


def test_an_interrupted_block_still_writes_what_was_put() -> None:
    seen: list[int] = []

    def stop() -> None:
        with Writer(lambda row, signal: seen.append(row)) as writer:
            writer.put(rows(0), SIGNALS)
            writer.put(rows(2), SIGNALS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert seen == [0, 1, 2, 3]
    assert not any(thread.name == "writer" for thread in threading.enumerate())
