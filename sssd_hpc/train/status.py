"""How a run stands, told from its files alone: `sssd-hpc status RUN`.

Reads, writes nothing, loads no torch: it answers on a login node while the run is elsewhere. The
ages of heartbeats are those of the files, not the writers' clocks. What cannot be read counts as
absent: the files may be half of a crash.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from sssd_hpc import config as configs
from sssd_hpc import files
from sssd_hpc.errors import UserError
from sssd_hpc.progress import duration
from sssd_hpc.train import heartbeat
from sssd_hpc.train import metrics as validated
from sssd_hpc.train.restart import HISTORY, newest_samples

State = Literal["new", "running", "finished", "stopped", "failed", "dead"]

SILENT_S = 60.0
"""A rank that steps is silent after so long, or after ten of its steps."""
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
FULL, EMPTY = "\u2588", "\u2591"
BAR, SPARKS, SHOWN = 20, 40, 5
COLOURS = {"running": 32, "finished": 32, "stopped": 33, "failed": 31, "dead": 31}


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The last that was heard of a rank."""

    rank: int
    host: str
    phase: str
    samples: int
    step_s: float
    age_s: float
    silent: bool
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a run stands; lists are oldest first."""

    run: str
    state: State
    why: str
    samples: int
    total: int | None
    samples_per_s: float | None
    eta_s: float | None
    checkpoint_samples: int | None
    checkpoint_age_s: float | None
    job_id: str
    restart: int
    ranks: list[Rank]
    restarts: list[dict[str, Any]]
    loss: float | None
    losses: list[float]
    """Means of up to 40 equal parts of the run."""
    validation: dict[str, Any] | None
    """The last validation, with its samples."""
    best: dict[str, Any] | None
    """The validation of the least Frechet distance, with its samples."""


def examine(run: Path, *, now: float | None = None) -> Status:
    """Return how a run stands; `now` is in seconds since 1970.

    Raises:
        UserError: `run` is not the folder of a run.
    """
    if not (run / "config.yaml").is_file() and not heartbeat.folder(run).is_dir():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    now = time.time() if now is None else now
    settings = _settings(run)
    total = _whole(settings.get("samples"))
    beats = heartbeat.read(run, now)
    ranks = [_rank(told, age, _whole(settings.get("timeout_s")) or 600) for told, age in beats]
    newest = newest_samples(run) or None
    metrics = [row for row in _lines(run / "metrics.jsonl") if _number(row.get("loss")) is not None]
    losses = [float(row["loss"]) for row in metrics]
    restarts = _lines(run / HISTORY)
    state, why = _state(ranks, newest, total)
    samples = max((rank.samples for rank in ranks), default=newest or 0)
    rate = _number(metrics[-1].get("samples_per_s")) if metrics else None
    running = state == "running" and rate and total
    manifest = run / "checkpoints" / f"samples-{newest or 0:09d}" / "MANIFEST.json"
    told = beats[0][0] if beats else {}
    found = validated.validations(run / "metrics.jsonl")
    best = validated.best(found)
    return Status(
        run=str(run),
        state=state,
        why=why,
        samples=samples,
        total=total,
        samples_per_s=rate,
        eta_s=max(total - samples, 0) / rate if running and rate and total else None,
        checkpoint_samples=newest,
        checkpoint_age_s=files.age_s(manifest, now) if newest else None,
        job_id=str(told.get("job_id", "")),
        restart=_whole(told.get("restart")) or 0,
        ranks=ranks,
        restarts=restarts,
        loss=losses[-1] if losses else None,
        losses=_means(losses, SPARKS),
        validation={"samples": max(found), **found[max(found)]} if found else None,
        best={"samples": best, **found[best]} if best is not None else None,
    )


def text(status: Status, stream: TextIO) -> str:
    """Return the status for people: with colours on a terminal, in ASCII where `stream` asks."""
    colours = stream.isatty() and "NO_COLOR" not in os.environ
    blocks = "utf" in (getattr(stream, "encoding", None) or "").lower()
    why = f"; {status.why}" if status.why else ""
    # What stands in the files must not drive the terminal.
    lines = [
        "".join(c for c in line if c.isprintable())
        for line in (f"{status.run}: ", why, *_facts(status, blocks=blocks))
    ]
    word = _coloured(status.state) if colours else status.state.upper()
    return "\n".join([f"{lines[0]}{word}{lines[1]}", *lines[2:]])


def _facts(status: Status, *, blocks: bool) -> list[str]:
    facts: list[tuple[str, str]] = []
    samples = f"{status.samples:,}"
    if status.total:
        share = min(status.samples / status.total, 1.0)
        full, empty = (FULL, EMPTY) if blocks else ("#", ".")
        done = int(share * BAR)
        samples = f"{full * done}{empty * (BAR - done)} {samples} of {status.total:,}, {share:.1%}"
    if status.state == "running" and status.samples_per_s:
        samples += f", {status.samples_per_s:.1f}/s"
    if status.eta_s is not None:
        samples += f", ETA {duration(status.eta_s)}"
    facts.append(("samples", samples))
    if status.checkpoint_samples is None:
        facts.append(("checkpoint", "none yet"))
    else:
        age = status.checkpoint_age_s
        ago = f", {duration(age)} ago" if age is not None else ""
        facts.append(("checkpoint", f"at {status.checkpoint_samples:,} samples{ago}"))
    facts += _about_ranks(status)
    if status.loss is not None:
        curve = f"  {sparkline(status.losses)}" if blocks and len(status.losses) > 1 else ""
        facts.append(("loss", f"{status.loss:.4g}, first {status.losses[0]:.4g}{curve}"))
    for name, row in (("validation", status.validation), ("best", status.best)):
        if row:
            facts.append((name, f"at {row['samples']:,} samples: {validated.words(row)}"))
    for line, attempt in enumerate(status.restarts[-SHOWN:]):
        count = f"{len(status.restarts)} ended" if not line else ""
        word = "requeued" if attempt.get("requeue") else "not requeued"
        facts.append(
            (
                "attempts" if not line else "",
                f"{count:<9} job {attempt.get('job_id')} restart {attempt.get('restart')} at "
                f"{attempt.get('samples')} samples: {word}: {attempt.get('reason')}",
            )
        )
    return [f"  {name:<11} {fact}" for name, fact in facts]


def _about_ranks(status: Status) -> list[tuple[str, str]]:
    if not status.ranks:
        return []
    hosts = list(dict.fromkeys(rank.host for rank in status.ranks))
    named = " ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    job = f", job {status.job_id} restart {status.restart}" if status.job_id else ""
    heard = duration(min(rank.age_s for rank in status.ranks))
    facts = [("ranks", f"{len(status.ranks)} on {named}{job}, last heard of {heard} ago")]
    for rank in [rank for rank in status.ranks if rank.silent or rank.error][:SHOWN]:
        said = rank.error or f"silent for {duration(rank.age_s)} at {rank.samples:,} samples"
        facts.append(("", f"rank {rank.rank} on {rank.host}: {said}"))
    return facts


def sparkline(values: Sequence[float]) -> str:
    """Return values as a row of blocks, lowest to highest.

    >>> sparkline([3.0, 1.0, 2.0])
    '█▁▄'
    """
    low, high = min(values), max(values)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[int((value - low) / step)] for value in values)


def _state(ranks: Sequence[Rank], newest: int | None, total: int | None) -> tuple[State, str]:
    again = "the same command goes on" if newest else "the same command starts anew"
    complete = newest is not None and total is not None and newest >= total
    failed = [rank for rank in ranks if rank.phase == "failed"]
    if failed:
        # The first to fail by a fault of its own. But who is killed says nothing.
        failed.sort(key=lambda rank: (rank.error == heartbeat.LOST, -rank.age_s))
        first = failed[0]
        mute = [rank for rank in ranks if rank.phase not in ("failed", "done")]
        names = ", ".join(f"rank {rank.rank} on {rank.host}" for rank in mute[:SHOWN])
        gone = f"; no word from {names}" if mute else ""
        return "failed", f"rank {first.rank} on {first.host}: {first.error}{gone}"
    if any(rank.phase != "done" for rank in ranks):
        silent = [rank for rank in ranks if rank.silent]
        if len(silent) == sum(rank.phase != "done" for rank in ranks):
            age = min(rank.age_s for rank in silent)
            return "dead", f"no rank was heard of for {duration(age)}; {again}"
        names = ", ".join(f"rank {rank.rank} on {rank.host}" for rank in silent[:SHOWN])
        phases = {rank.phase for rank in ranks}
        words = {"validate": "validating", "save": "saving"}
        doing = next((words[phase] for phase in words if phase in phases), "")
        doing = "starting" if phases == {"start"} else doing
        return "running", f"but {names} silent" if silent else doing
    if complete:
        return "finished", ""
    if newest is None and not ranks:
        return "new", "no checkpoint and no heartbeat yet"
    return "stopped", again


def _rank(told: dict[str, Any], age: float, timeout_s: float) -> Rank:
    phase = str(told.get("phase", ""))
    step_s = _number(told.get("step_s")) or 0.0
    # Starting and saving take as long as they may; others wait no longer than this either.
    patience = max(SILENT_S, 10 * step_s if phase == "step" else timeout_s)
    return Rank(
        rank=_whole(told.get("rank")) or 0,
        host=str(told.get("host", "?"))[:100],
        phase=phase,
        samples=_whole(told.get("samples")) or 0,
        step_s=step_s,
        age_s=age,
        silent=phase not in ("done", "failed") and age > patience,
        error=str(told.get("error", ""))[:300],
    )


def _settings(run: Path) -> dict[str, Any]:
    """Return the `train` part of the run's configuration, whatever version wrote it."""
    try:
        settings = configs.read_yaml(run / "config.yaml").get("train")
    except UserError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; what is none is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _means(values: Sequence[float], parts: int) -> list[float]:
    """Return the means of up to `parts` equal parts of a row of values."""
    count = min(parts, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _coloured(state: State) -> str:
    return f"\x1b[1;{COLOURS.get(state, 0)}m{state.upper()}\x1b[0m"
