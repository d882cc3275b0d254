"""How far a shard is: OUT/.shards/NNNNN-of-NNNNN.json, for `sssd-hpc status` and the launcher.

A small file every few seconds, renamed and not flushed; it never stops the drawing. Loads no torch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sssd_hpc import files
from sssd_hpc.generate.names import SHARDS

_log = logging.getLogger(__name__)

EVERY_S = 5.0

Phase = Literal["drawing", "done", "stopped", "failed"]


class Beat:
    """Tell how many of a shard's `total` records are there; as a context manager also how it ended.

    What ends the block by an error is told as `failed`, an interruption as `stopped`.
    """

    def __init__(
        self,
        out: Path,
        number: int,
        count: int,
        *,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = out / SHARDS / f"{number:05d}-of-{count:05d}.json"
        self._fixed = {
            "shard": number,
            "shards": count,
            "total": total,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
        }
        self._first = self._done = done
        self._clock = clock
        self._began = self._wrote = clock()
        self._failed_before = False

    def __enter__(self) -> Beat:
        self._write("drawing")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is None:
            self._write("done")
        elif isinstance(value, Exception):
            words = " ".join(str(value).split())
            self._write("failed", error=words[:300] or type(value).__name__)
        else:
            self._write("stopped")

    def beat(self, done: int) -> None:
        """Tell how many records are there; written only where it is due."""
        self._done = done
        if self._clock() - self._wrote >= EVERY_S:
            self._write("drawing")

    def _write(self, phase: Phase, **more: str) -> None:
        self._wrote = self._clock()
        told: dict[str, Any] = {
            **self._fixed,
            "done": self._done,
            "records_per_s": (self._done - self._first) / max(self._wrote - self._began, 1e-9),
            "phase": phase,
            **more,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.atomic_write_bytes(self._path, json.dumps(told).encode(), durable=False)
        except OSError as error:
            if not self._failed_before:
                _log.warning("no progress file: %s; drawing goes on", error)
            self._failed_before = True
