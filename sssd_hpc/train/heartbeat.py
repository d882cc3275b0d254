"""Signs of life: RUN/heartbeats/rank-%05d.json by each rank, and who is slower than the others.

A heartbeat costs a small file every few seconds, renamed and not flushed, and never stops training.
`sssd-hpc status` reads them. Loads no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sssd_hpc import files
from sssd_hpc.errors import Interrupted

_log = logging.getLogger(__name__)

EVERY_S = 5.0
FILE = re.compile(r"rank-(\d{5})\.json")
SLOW = 1.5
"""A rank is slow that takes so many times what the median rank does."""
COSTS = 0.1
"""And that so costs the others this share of their time."""
WATCH_S, WATCH_STEPS = 60.0, 10
"""A rank is called slow after so long and so many steps."""

GRACE_S = 2.0
"""How long a rank that lost others waits for the rest to say so."""
LOST = "lost the others"
"""The words of a rank that failed only because another had."""

Phase = Literal["start", "step", "save", "validate", "done", "failed"]


def folder(run: Path) -> Path:
    """Return where a run's heartbeats lie."""
    return run / "heartbeats"


def read(run: Path, now: float) -> list[tuple[dict[str, Any], float]]:
    """Return the newest attempt's heartbeats and their ages in seconds, in the order of ranks.

    Only that `rank` is a number is checked: a crash may have left anything.
    """
    found = []
    for path in sorted(folder(run).glob("rank-*.json")):
        age = files.age_s(path, now)
        with contextlib.suppress(OSError, ValueError, RecursionError):
            told = json.loads(path.read_bytes())
            if age is not None and isinstance(told, dict) and type(told.get("rank")) is int:
                found.append((told, age))
    if not found:
        return []
    newest, _ = min(found, key=lambda beat: beat[1])
    attempt = newest.get("job_id"), newest.get("restart")
    return [beat for beat in found if (beat[0].get("job_id"), beat[0].get("restart")) == attempt]


def clear(run: Path, world_size: int) -> None:
    """Remove what ranks beyond the present number, and killed writers, left; errors are ignored."""
    place = folder(run)
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        files.remove_temporaries(place)
        for entry in place.iterdir():
            match = FILE.fullmatch(entry.name)
            if match and int(match[1]) >= world_size:
                entry.unlink()


class Heartbeat:
    """Write one rank's file: at every change of phase, and every few seconds of stepping.

    As a context manager it says `start` and at last `done`, or `failed` with the error's words.
    Whatever keeps the rank from a beat for nearly `timeout_s` has all its threads' stacks printed
    on stderr: shortly before the others take it for dead. A RuntimeError that holds one of the
    words `lost` is another rank's fault.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        *,
        samples: int = 0,
        timeout_s: float = 600,
        lost: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._lost = run, lost
        self._path = folder(run) / f"rank-{rank:05d}.json"
        self._stacks_s, self._clock = 0.9 * timeout_s, clock
        self._fixed = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
            "restart": _number(os.environ.get("SLURM_RESTART_COUNT", "")),
        }
        self._samples, self._step_s = samples, 0.0
        self._phase: Phase | None = None
        self._wrote = self._beat = clock()
        self._failed_before = False

    def __enter__(self) -> Heartbeat:
        self.beat("start", self._samples)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if value is None or isinstance(value, Interrupted):
            self._write("done")
        else:
            words = " ".join(str(value).split())
            lost = isinstance(value, RuntimeError) and any(sign in words for sign in self._lost)
            self._write("failed", error=LOST if lost else words[:300] or type(value).__name__)
            if lost:
                self._name_the_silent()

    def _name_the_silent(self) -> None:
        """Say which ranks do not tell how they ended; the lowest of those that do says it."""
        time.sleep(GRACE_S)
        beats = read(self._run, time.time())
        ended = {told["rank"] for told, _ in beats if told.get("phase") in ("done", "failed")}
        if min(ended, default=-1) != self._fixed["rank"]:
            return
        for told, age in beats:
            if told["rank"] not in ended:
                _log.warning(
                    "no word from rank %d on %s for %.0f s: it was at %s samples",
                    *(told["rank"], told.get("host", "?"), age, told.get("samples", "?")),
                )

    def beat(self, phase: Phase, samples: int) -> None:
        """Tell the phase, and by `step` that a step has ended; written only where it is due."""
        now = self._clock()
        if phase == self._phase == "step":
            self._step_s = now - self._beat
        self._beat, self._samples = now, samples
        if phase != self._phase or now - self._wrote >= EVERY_S:
            self._phase, self._wrote = phase, now
            self._write(phase)
            if sys.__stderr__ is not None:
                faulthandler.dump_traceback_later(self._stacks_s, file=sys.__stderr__)

    def _write(self, phase: Phase, **more: str) -> None:
        told: dict[str, Any] = {
            **self._fixed,
            "time": round(time.time(), 3),
            "samples": self._samples,
            "step_s": round(self._step_s, 4),
            "phase": phase,
            **more,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.atomic_write_bytes(self._path, json.dumps(told).encode(), durable=False)
        except OSError as error:
            if not self._failed_before:
                _log.warning("no heartbeat: %s; training goes on", error)
            self._failed_before = True


class Stragglers:
    """Compare the ranks' own seconds, and name a rank once while it slows down the others.

    Args:
        run: where the heartbeats that name a rank's host lie.
        shares: records of a whole batch that each rank takes: who has more may take longer.
    """

    def __init__(
        self, run: Path, shares: Sequence[int], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._clock = run, clock
        typical = statistics.median(shares)
        self._allowed = [max(1.0, share / max(typical, 1)) for share in shares]
        self._slow: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps = self._clock(), 0
        self._sums = [0.0] * len(self._allowed)

    def add(self, seconds: Sequence[float]) -> None:
        """Count a step: what each rank took for that part of it in which it waits for no other."""
        self._steps += 1
        self._sums = [total + s for total, s in zip(self._sums, seconds, strict=True)]
        if self._steps < WATCH_STEPS or self._clock() - self._since < WATCH_S:
            return
        # The lower one: of two ranks the slower would be half of its own median.
        typical = max(statistics.median_low(self._sums), 1e-9)
        cost = COSTS * (self._clock() - self._since)
        slow = {
            rank: total / typical
            for rank, (total, allowed) in enumerate(zip(self._sums, self._allowed, strict=True))
            if total > SLOW * typical * allowed and total - typical * allowed > cost
        }
        for rank in sorted(slow.keys() - self._slow):
            _log.warning(
                "rank %d%s is slow: its part of a step takes %.0f ms, %.1f times the median rank's",
                rank,
                self._host(rank),
                1000 * self._sums[rank] / self._steps,
                slow[rank],
            )
        self._slow = set(slow)
        self._begin()

    def _host(self, rank: int) -> str:
        try:
            told = json.loads((folder(self._run) / f"rank-{rank:05d}.json").read_bytes())
            return f" on {told['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
