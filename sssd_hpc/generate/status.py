"""How a synthetic set stands, told from its files alone: `sssd-hpc status OUT`, and the launcher.

Reads, writes nothing, loads neither torch nor numpy. The ages of progress files are those of the
files, not the writers' clocks. What cannot be read counts as absent.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from sssd_hpc.errors import UserError
from sssd_hpc.generate.names import JOBS, MANIFEST_FILE, REQUEST_FILE, SHARDS, SUMS_FILE
from sssd_hpc.progress import duration

State = Literal["new", "drawing", "finished", "stopped", "failed"]

SILENT_S = 120.0
"""A shard that draws is silent after so long without a word, or after so many of its batches."""
FILE = re.compile(r"[0-9]{5,}-of-[0-9]{5,}\.json")
BAR, SHOWN = 20, 5
COLOURS = {"drawing": 32, "finished": 32, "stopped": 33, "failed": 31}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The last that was heard of a shard."""

    shard: int
    done: int
    total: int
    records_per_s: float
    phase: str
    host: str
    job_id: str
    age_s: float
    silent: bool
    error: str


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a set stands."""

    root: str
    state: State
    done: int
    total: int | None
    records_per_s: float
    eta_s: float | None
    num_shards: int
    shards: list[Shard]
    """Those that were heard of, by number."""


def is_root(path: Path) -> bool:
    """Tell whether a set is made in a folder, or jobs were submitted that will."""
    return (path / REQUEST_FILE).is_file() or (path / JOBS).is_dir()


def examine(out: Path, *, now: float | None = None) -> Status:
    """Return how a set stands; `now` is in seconds since 1970.

    Raises:
        UserError: `out` is not the folder of a set.
    """
    if not is_root(out):
        raise UserError(f"{out} is not a folder that sample made: it has no {REQUEST_FILE}")
    total = _total(out)
    if (out / SUMS_FILE).is_file():
        return Status(
            root=str(out),
            state="finished",
            done=total or 0,
            total=total,
            records_per_s=0.0,
            eta_s=None,
            num_shards=0,
            shards=[],
        )
    count, shards = _shards(out, time.time() if now is None else now)
    drawing = [shard for shard in shards if shard.phase == "drawing" and not shard.silent]
    done = sum(shard.done for shard in shards)
    rate = sum(shard.records_per_s for shard in drawing)
    failed = any(shard.phase == "failed" for shard in shards)
    return Status(
        root=str(out),
        state="drawing" if drawing else "failed" if failed else "stopped" if shards else "new",
        done=done,
        total=total,
        records_per_s=rate,
        eta_s=max(total - done, 0) / rate if total and rate else None,
        num_shards=count,
        shards=shards,
    )


def text(status: Status, stream: TextIO) -> str:
    """Return the status for people: in colours on a terminal, in ASCII where `stream` asks."""
    word = status.state.upper()
    if stream.isatty() and "NO_COLOR" not in os.environ:
        word = f"\x1b[1;{COLOURS.get(status.state, 0)}m{word}\x1b[0m"
    why = "; the same command goes on" if status.state in ("stopped", "failed") else ""
    why = "; no shard has begun" if status.state == "new" else why
    blocks = "utf" in (getattr(stream, "encoding", None) or "").lower()
    facts = [f"  {name:<11} {fact}" for name, fact in _facts(status, blocks=blocks)]
    # What stands in the files must not drive the terminal.
    root, *lines = ["".join(filter(str.isprintable, line)) for line in (status.root, *facts)]
    return "\n".join([f"{root}: {word}{why}", *lines])


def _facts(status: Status, *, blocks: bool) -> list[tuple[str, str]]:
    records = f"{status.done:,}"
    if status.total:
        share = min(status.done / status.total, 1.0)
        full, empty = ("\u2588", "\u2591") if blocks else ("#", ".")
        filled = int(share * BAR)
        bar = full * filled + empty * (BAR - filled)
        records = f"{bar} {records} of {status.total:,}, {share:.1%}"
    if status.records_per_s:
        records += f", {status.records_per_s:.1f}/s"
    if status.eta_s is not None:
        records += f", ETA {duration(status.eta_s)}"
    facts = [("records", records)]
    if not status.shards:
        return facts
    phases = [("silent" if shard.silent else shard.phase) for shard in status.shards]
    counts = {phase: phases.count(phase) for phase in dict.fromkeys(sorted(phases))}
    counts["not heard of"] = status.num_shards - len(phases)
    told = ", ".join(f"{n} {phase}" for phase, n in counts.items() if n)
    facts.append(("shards", f"{status.num_shards}: {told}"))
    for shard in [s for s in status.shards if s.silent or s.phase == "failed"][:SHOWN]:
        job = f", job {shard.job_id}" if shard.job_id else ""
        said = f"silent for {duration(shard.age_s)}" if shard.silent else shard.error
        facts.append(("", f"shard {shard.shard} on {shard.host}{job}: {said}"))
    return facts


def _total(out: Path) -> int | None:
    try:
        with open(out / MANIFEST_FILE, encoding="utf-8") as stream:
            total = json.loads(stream.readline(1 << 20))["records"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return total if isinstance(total, int) else None


def _shards(out: Path, now: float) -> tuple[int, list[Shard]]:
    """Return the number of shards of the newest launch, and those heard of."""
    found: list[tuple[float, int, Shard]] = []
    for path in sorted((out / SHARDS).glob("*.json")):
        if not FILE.fullmatch(path.name):
            continue
        try:
            age = max(round(now - path.stat().st_mtime, 1), 0.0)
            told = json.loads(path.read_bytes())
            found.append((age, int(told["shards"]), _shard(told, age)))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    if not found:
        return 0, []
    count = min(found, key=lambda each: each[0])[1]
    return count, sorted((s for _, n, s in found if n == count), key=lambda shard: shard.shard)


def _shard(told: dict[str, Any], age: float) -> Shard:
    phase = str(told["phase"])
    return Shard(
        shard=int(told["shard"]),
        done=int(told["done"]),
        total=int(told["total"]),
        records_per_s=float(told["records_per_s"]),
        phase=phase,
        host=str(told.get("host", "?"))[:100],
        job_id=str(told.get("job_id", ""))[:50],
        age_s=age,
        silent=phase == "drawing" and age > SILENT_S,
        error=str(told.get("error", ""))[:300],
    )
