"""Whether a job that ended goes back into the queue: decided from its exit code and its past.

The batch scripts run `python -m sssd_hpc.train.restart` once an attempt; each leaves one line in
RUN/restarts.jsonl, or OUT/.shards/restarts.jsonl of a synthetic set. Node failures and preemptions
without a warning leave none: Slurm itself requeues those, and ends the script before it can ask.
Touches no checkpoint and loads no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGTERM, SIGUSR1, SIGUSR2

from sssd_hpc import files
from sssd_hpc.errors import UserError

HISTORY = "restarts.jsonl"
SHARDS = ".shards"
DONE, USER, RESUMABLE = 0, 2, 75
# A rank that is told to stop before it listens, while Python starts, dies of USR1, USR2 or TERM.
STOPPED_EARLY = (RESUMABLE, *(128 + number for number in (SIGUSR1, SIGUSR2, SIGTERM)))
REQUEUED, STOPPED = 0, 1
BUDGET = 10
"""Crashes that one job may come back from by default, and attempts in a row that may end where they
began."""
PATIENCE = 2
"""Crashes without a newer checkpoint after which a job stops: the third would be no better."""
# A controller that restarts is away for seconds to minutes.
ASK_FOR_S, ASK_EVERY_S = 300.0, 10.0
# What asking again does not change.
REFUSALS = ("disabled", "denied", "Invalid job id")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One line of RUN/restarts.jsonl: how one attempt of a job ended."""

    job_id: str
    restart: int
    """How often Slurm had restarted the job before."""
    time: float
    """When it ended, seconds since 1970."""
    exit_code: int
    samples: int
    """Samples of the newest checkpoint, or records that a shard has made."""
    requeue: bool
    reason: str


def decide(
    exit_code: int, samples: int, history: Sequence[Attempt], *, budget: int = BUDGET
) -> tuple[bool, str]:
    """Return whether to requeue a job, and why; a pure function.

    `samples` counts the newest checkpoint's, `history` holds the job's earlier attempts, oldest
    first. Only a checkpoint newer than all before is progress. `budget` bounds crashes alone.
    """
    if exit_code == DONE:
        return False, "finished"
    if exit_code == USER:
        return False, "exit code 2: it would fail the same way again; mend what its error names"
    crashed = exit_code not in STOPPED_EARLY
    why = f"exit code {exit_code}"
    idle, idle_crashes = _idle(crashed, samples, history)
    if crashed and idle_crashes >= PATIENCE:
        return False, f"{why}, and {idle_crashes} crashes in a row without a newer checkpoint"
    if idle >= BUDGET:
        return False, f"{why}, and {idle} attempts in a row without a newer checkpoint"
    crashes = crashed + sum(_crashed(attempt) for attempt in history)
    if crashes > budget:
        return False, f"{why}, and the budget of {budget} restarts after a crash is used up"
    if crashed:
        return True, f"{why}, restart {crashes} of {budget} after a crash"
    when = "" if exit_code == RESUMABLE else ", while it started"
    return True, f"{why}: stopped early{when}"


def _idle(crashed: bool, samples: int, history: Sequence[Attempt]) -> tuple[int, int]:
    """Count the attempts, and the crashes among them, since the newest checkpoint came."""
    best = 0
    idle = idle_crashes = 0
    steps = [(_crashed(attempt), attempt.samples) for attempt in history]
    for crash, count in [*steps, (crashed, samples)]:
        idle, idle_crashes = (0, 0) if count > best else (idle + 1, idle_crashes + crash)
        best = max(best, count)
    return idle, idle_crashes


def _crashed(attempt: Attempt) -> bool:
    return attempt.exit_code not in (DONE, USER, *STOPPED_EARLY)


def newest_samples(run: Path) -> int:
    """Return the samples of the newest finished checkpoint of a run, 0 without one."""
    found = (run / "checkpoints").glob("samples-*/MANIFEST.json")
    counts = [path.parent.name.removeprefix("samples-") for path in found]
    return max((int(count) for count in counts if count.isdecimal()), default=0)


def newest_records(out: Path, shard: str) -> int:
    """Return how many records a shard K/N of a synthetic set last told of, 0 where it told none."""
    number, _, count = shard.partition("/")
    path = out / SHARDS / f"{number:0>5}-of-{count:0>5}.json"
    try:
        done = json.loads(path.read_bytes())["done"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return done if isinstance(done, int) else 0


def read_history(run: Path, job_id: str) -> list[Attempt]:
    """Return the earlier attempts of one job, oldest first; a line cut short is passed over."""
    path = run / HISTORY
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    attempts = []
    for line in lines:
        try:
            attempt = Attempt(**json.loads(line))
        except (ValueError, TypeError):
            continue
        numbers = (attempt.restart, attempt.exit_code, attempt.samples)
        if attempt.job_id == job_id and all(isinstance(number, int) for number in numbers):
            attempts.append(attempt)
    return attempts


def record(run: Path, attempt: Attempt) -> None:
    """Add a line to RUN/restarts.jsonl, on a line of its own even after one that was cut short."""
    path = run / HISTORY
    with open(path, "a+b") as stream, files.naming(path):
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(asdict(attempt)).encode() + b"\n")


def ask(
    command: Sequence[str],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Return what a command of Slurm's answers, asking again while the controller is away.

    Raises:
        UserError: Slurm refuses, or the controller stays away.
    """
    end = clock() + ASK_FOR_S
    while True:
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run: {error.strerror}") from error
        if result.returncode == 0:
            return result.stdout.strip()
        said = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        if clock() >= end or any(refusal in said for refusal in REFUSALS):
            raise UserError(f"{' '.join(command)}: {said}")
        print(f"{' '.join(command)}: {said}; asking again", flush=True)
        sleep(ASK_EVERY_S)


def _not_ours(job_id: str, restart: int) -> str:
    """Return why this attempt of a job must not requeue it, "" where it may."""
    state, *count = ask(["squeue", "-h", "-j", job_id, "-O", "State,RestartCnt"]).split() or [""]
    if count and count != [str(restart)]:
        # This one's node was lost to Slurm, which did not wait; its requeue would end the next.
        return f"attempt {count[0]} is under way, this was {restart}"
    # Requeued now, a job that was cancelled would come back.
    ends = "Slurm itself ends, or requeues, what it stops"
    return "" if state == "RUNNING" else f"it is {state or 'gone'}: {ends}"


def main(args: Sequence[str] | None = None) -> int:
    """Decide, record, say and do it. Returns 0 when the job is in the queue again, else 1."""
    parser = argparse.ArgumentParser(prog="python -m sssd_hpc.train.restart", description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--run", type=Path, help="folder of the run")
    kind.add_argument("--out", type=Path, help="folder of the synthetic set")
    parser.add_argument("--shard", default="0/1", help="of the set, K/N")
    parser.add_argument("--exit-code", type=int, required=True, help="of the attempt that ended")
    parser.add_argument("--budget", type=int, default=BUDGET, help="restarts after a crash")
    given = parser.parse_args(args)
    environ = os.environ
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id:
        raise UserError("SLURM_JOB_ID is not set: only a Slurm job can be requeued")
    if "SLURM_ARRAY_JOB_ID" in environ:
        # The number of one of an array's jobs is that of the whole array.
        job_id = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    place = given.run or given.out / SHARDS
    samples = newest_samples(place) if given.run else newest_records(given.out, given.shard)
    history = read_history(place, job_id)
    again, reason = decide(given.exit_code, samples, history, budget=given.budget)
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    try:
        if again and (why := _not_ours(job_id, restart)):
            again, reason = False, f"{reason}; {why}"
        attempt = Attempt(
            job_id=job_id,
            restart=restart,
            time=round(time.time(), 3),
            exit_code=given.exit_code,
            samples=samples,
            requeue=again,
            reason=reason,
        )
        # Before the act: without a record nothing would bound the restarts.
        if given.out:
            place.mkdir(exist_ok=True)
        record(place, attempt)
        word = "requeue" if again else "stop"
        what = "samples saved" if given.run else "records made"
        print(f"job {job_id}, {samples} {what}: {word}: {reason}", flush=True)
        if again:
            ask(["scontrol", "requeue", job_id])
    except (OSError, UserError) as error:
        print(f"error: job {job_id} is not requeued: {error}; submit it again", file=sys.stderr)
        return STOPPED
    return REQUEUED if again else STOPPED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER)
