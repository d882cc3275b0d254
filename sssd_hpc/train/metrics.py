"""RUN/metrics.jsonl: one JSON object a line, counted in samples seen."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

from sssd_hpc import files


def peak_memory_gib() -> float:
    """Return the most GPU memory that this process has held, or without a GPU main memory."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / (1 << 30), 3)
    # Linux counts KiB.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 3)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line, flushed to the disk.

    Raises:
        OSError: the disk is full or not writable; it names the file.
    """
    with files.naming(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def truncate(path: Path, samples: int) -> None:
    """Drop the lines beyond `samples`, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            beyond = row["samples"] > samples
        except (ValueError, KeyError, TypeError):
            break
        if beyond:
            break
        kept.append(f"{line}\n")
    files.atomic_write_text(path, "".join(kept))
