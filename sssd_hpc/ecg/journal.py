"""The journal of an unfinished store: samples and outcomes that survive a kill at any point.

Samples go to the future `signals.npy`, one line a record to the journal. Samples are flushed before
the line that vouches for them, and a resumed journal is believed only as far as its lines are whole
and the samples match their hashes. It knows nothing of ECGs.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from sssd_hpc.files import naming, sha256_bytes

CHUNK = 256
"""Records between two flushes: what a kill can cost."""

NPY_HEADER_BYTES = 128
"""Kept free at the head of the samples; the header has this size whatever the record count."""


@dataclass(frozen=True)
class Outcome:
    """One line: an accepted record's waveform hash and flags, or why it is rejected."""

    reason: str = ""
    sha256: str = ""
    flags: tuple[str, ...] = ()


class Journal:
    """Outcomes in order, and the samples of those accepted; a context manager.

    `outcomes` holds what was found on the disk when opened and everything added since.
    """

    def __init__(self, signals: Path, lines: Path, record_bytes: int, max_records: int) -> None:
        self.outcomes: list[Outcome] = []
        self._record_bytes = record_bytes
        self._unflushed: list[bytes] = []
        self._signals = _open(signals)
        self._lines = _open(lines)
        self._resume(max_records)
        self._num_flushed = len(self.outcomes)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.close()
        self._lines.close()

    def add(self, outcome: Outcome, samples: bytes = b"") -> None:
        """Take the next outcome, with its samples if it is accepted; flush every `CHUNK`."""
        assert len(samples) == (0 if outcome.reason else self._record_bytes)
        self.outcomes.append(outcome)
        self._unflushed.append(samples)
        if len(self._unflushed) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk: samples first, then the lines that vouch for them."""
        with naming(Path(self._signals.name)):
            self._signals.write(b"".join(self._unflushed))
            _sync(self._signals)
        lines = (json.dumps(asdict(outcome)) for outcome in self.outcomes[self._num_flushed :])
        with naming(Path(self._lines.name)):
            self._lines.write("".join(f"{line}\n" for line in lines).encode())
            _sync(self._lines)
        self._num_flushed = len(self.outcomes)
        self._unflushed.clear()

    def _resume(self, max_records: int) -> None:
        kept = num_accepted = 0
        self._signals.seek(NPY_HEADER_BYTES)
        for line in self._lines:
            outcome = _parse(line)
            if outcome is None or len(self.outcomes) == max_records:
                break
            if not outcome.reason:
                if sha256_bytes(self._signals.read(self._record_bytes)) != outcome.sha256:
                    break
                num_accepted += 1
            self.outcomes.append(outcome)
            kept += len(line)
        _cut(self._lines, kept)
        _cut(self._signals, NPY_HEADER_BYTES + num_accepted * self._record_bytes)


def finish_signals(path: Path, shape: tuple[int, int, int]) -> None:
    """Write the .npy header of int16 `shape` into the space kept free before the samples."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": shape}
    )
    assert len(header.getvalue()) == NPY_HEADER_BYTES
    with open(path, "r+b") as stream:
        stream.write(header.getvalue())
        _sync(stream)


def _open(path: Path) -> BinaryIO:
    path.touch()
    return open(path, "r+b")


def _cut(stream: BinaryIO, size: int) -> None:
    stream.truncate(size)
    stream.seek(size)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _parse(line: bytes) -> Outcome | None:
    """Return a line's outcome, or None if it was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
        return Outcome(value["reason"], value["sha256"], tuple(value["flags"]))
    except (ValueError, LookupError, TypeError):
        return None
