"""Records are written in a thread of their own, so that the device draws meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

Write = Callable[[int, NDArray[np.float64]], None]


class Writer:
    """Call `write(row, signal)` for every row that is put, in order; a context manager.

    At most `depth` batches wait, so that memory is bounded and a kill loses little. What `write`
    raises comes out of the next `put` or of `finish`, and nothing is written after it. A block that
    an error ends still writes what was put.
    """

    def __init__(self, write: Write, *, depth: int = 2) -> None:
        self._write = write
        self._queue: queue.Queue[list[tuple[int, NDArray[np.float64]]] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self.written = 0
        """Records written so far."""

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def finish(self) -> None:
        """Wait until all is written; to be called at the block's end."""
        self._end()
        self._raise()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def put(self, rows: NDArray[np.int64], signals: NDArray[np.float64]) -> None:
        """Hand over signals (n, 12, L) of n rows; waits while `depth` batches are unwritten."""
        self._raise()
        self._queue.put([(int(row), signal) for row, signal in zip(rows, signals, strict=True)])

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                for row, signal in batch:
                    self._write(row, signal)
                    self.written += 1
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                self._error = error
