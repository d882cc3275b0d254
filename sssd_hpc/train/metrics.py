"""RUN/metrics.jsonl: one JSON object a line, counted in samples seen."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from collections.abc import Mapping
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


def validations(path: Path) -> dict[int, dict[str, Any]]:
    """Return what each validation found, by samples seen; lines that hold none are passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
                row = json.loads(line)
                if isinstance(row["validation"], dict) and type(row["samples"]) is int:
                    found[row["samples"]] = row["validation"]
    return found


def words(found: Mapping[str, Any]) -> str:
    """Return a validation in words."""
    names = {"frechet": "Frechet distance", "roc_auc": "TRTS ROC-AUC"}
    told = [
        f"{title} {found[name]:.4g}"
        for name, title in names.items()
        if isinstance(found.get(name), float)
    ]
    return ", ".join([*told, *([str(found["reason"])] if found.get("reason") else [])])


def best(found: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the samples of the validation with the least Frechet distance, None without one.

    Not the greatest TRTS ROC-AUC: records more typical of their label than real ones score best
    there, and one clear record drawn again and again scores perfectly. The distance grows wherever
    the mean or the spread of drawn records leaves that of real ones.
    """
    known = {
        samples: row["frechet"]
        for samples, row in found.items()
        if isinstance(row.get("frechet"), float) and math.isfinite(row["frechet"])
    }
    return min(known, key=lambda samples: (known[samples], samples), default=None)


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
