"""Signals that ask a run to stop: noted by a flag, acted on at the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Inside the `with` block, note SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 instead of dying of them.

    `name` is the first signal's name, or None. A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = self.name or signal.Signals(number).name
        _log.warning("%s: stopping after this step", signal.Signals(number).name)
