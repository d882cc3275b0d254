"""Progress of long work: a bar on a terminal, plain timed lines elsewhere.

Everything goes to stderr, so that stdout carries results alone.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 10.0


def duration(seconds: float) -> str:
    """Return seconds as people say them: 12 s, 3 min 05 s, 2 h 10 min, 4 d 06 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"


class Progress:
    """Count work done towards a total; use as a context manager.

    >>> with Progress("prepare", total=500, unit="records") as progress:
    ...     progress.advance(1, rejected=0)

    A rate counts this process's work alone, so that a resumed job's ETA is right.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        unit: str,
        done: int = 0,
        every_s: float = PLAIN_INTERVAL_S,
    ) -> None:
        self._label, self._total, self._unit, self._every_s = label, total, unit, every_s
        self._done = self._start = done
        self._note = ""
        self._bar: RichProgress | None = None
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> Progress:
        self._began = self._spoke = time.monotonic()
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self._unit + " {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(self._label, total=self._total, completed=self._done, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._speak()

    def advance(self, count: int, **fields: float | int | str) -> None:
        """Count `count` more units done; `fields` are shown beside the counter."""
        self._done += count
        self._note = " ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in fields.items()
        )
        now = time.monotonic()
        if self._bar is not None:
            rate = f"{self._rate(now):.1f}/s {self._note}"
            self._bar.update(self._bar.task_ids[0], completed=self._done, note=rate)
        elif now - self._spoke >= self._every_s:
            self._speak()

    def _rate(self, now: float) -> float:
        return (self._done - self._start) / max(now - self._began, 1e-9)

    def _speak(self) -> None:
        now = self._spoke = time.monotonic()
        rate = self._rate(now)
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        parts = [
            f"{self._label}: {self._done}/{self._total} {self._unit}",
            f"{rate:.1f}/s",
            duration(now - self._began),
            f"ETA {duration(left)}" if self._done < self._total else "",
            self._note,
        ]
        # A log on a full disk stops no work: what the work itself writes will tell.
        with contextlib.suppress(OSError):
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)
