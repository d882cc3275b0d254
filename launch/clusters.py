"""Where shards run: arrays of Slurm's jobs, or processes on this machine; both through submitit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import submitit

from launch import jobs
from slurm import render
from sssd_hpc.errors import UserError

# A job in one of these states has ended, and Slurm does not start it again.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
GONE = "gone"
HELD = "HELD"
"""A job that no node could start, which waits until somebody releases it."""

Work = Callable[[], int]
"""What one job does; submitit pickles it."""


class Cluster(Protocol):
    """Where shards run."""

    ask_every_s: float
    """How long to wait at most before asking again."""

    def room(self, running: int) -> int:
        """Return how many more may be submitted beside those that run or wait."""

    def submit(self, shards: Sequence[Work]) -> list[str]:
        """Start shards and return their jobs, in order."""

    def ended(self, names: Collection[str]) -> Mapping[str, str]:
        """Return those of the jobs that ended for good, with their last state."""

    def stop(self) -> bool:
        """Make of the jobs what this command's end asks for; tell whether to wait for them."""


class Slurm:
    """Arrays of jobs; bigger ones than the cluster allows are split."""

    # A controller serves thousands.
    ask_every_s = 15.0

    def __init__(self, cluster: render.Cluster, folder: Path, parallel: int | None) -> None:
        self._cluster, self._folder, self._parallel = cluster, folder, parallel
        self._missed: set[str] = set()

    def room(self, running: int) -> int:
        """All at first: Slurm itself keeps an array within --parallel. Then what that leaves."""
        if self._parallel is None or not running:
            return sys.maxsize
        return max(self._parallel - running, 0)

    def submit(self, shards: Sequence[Work]) -> list[str]:
        """Submit shards as arrays.

        Raises:
            UserError: there is no Slurm here, or it refuses the job.
        """
        names: list[str] = []
        try:
            size = max_array_size()
            for first in range(0, len(shards), size):
                # Only one after the other do several arrays keep within --parallel.
                before = names[-1].partition("_")[0] if names and self._parallel else ""
                names += self._array(shards[first : first + size], before)
        except (RuntimeError, submitit.core.utils.FailedJobError) as error:
            arrays = sorted({name.partition("_")[0] for name in names})
            if arrays:
                # All or none: nobody would know of those that were taken.
                subprocess.run(["scancel", *arrays], check=False, timeout=60)  # noqa: S603, S607
            raise UserError(f"the jobs were not submitted: {error}") from error
        return names

    def _array(self, shards: Sequence[Work], before: str) -> list[str]:
        executor = submitit.SlurmExecutor(self._folder, max_num_timeout=jobs.NO_LIMIT)
        executor.update_parameters(
            **jobs.slurm_parameters(self._cluster, 1),
            array_parallelism=self._parallel or len(shards),
            dependency=f"afterany:{before}" if before else None,
            setup=['fail() { echo "error: $*" >&2; exit 2; }', *render.environment(self._cluster)],
            srun_args=["--open-mode=append"],
        )
        with submitit.helpers.clean_env(), executor.batch():
            submitted = [executor.submit(shard) for shard in shards]
        return [job.job_id for job in submitted]

    def ended(self, names: Collection[str]) -> Mapping[str, str]:
        """Ask squeue, which knows ended jobs for some minutes; its silence says nothing."""
        states = queue()
        if states is None:
            return {}
        found = {name: states[name] for name in names if states.get(name) in {HELD, *ENDED}}
        if held := [name for name, state in found.items() if state == HELD]:
            # Nobody will: another one takes its place.
            _run(["scancel", *held])
        # What is not there twice in a row has ended long ago.
        missing = {name for name in names if name not in states}
        found.update(dict.fromkeys(missing & self._missed, GONE))
        self._missed = missing
        return found

    def stop(self) -> bool:
        """Leave the jobs to Slurm."""
        return False


def queue() -> dict[str, str] | None:
    """Return the state of every job of this user; None while the controller is away."""
    said = _run(["squeue", "--noheader", "--array", "--me", "--states=all", "--format=%i %T %r"])
    if said is None:
        return None
    states = {}
    for line in said.splitlines():
        if len(words := line.split(maxsplit=2)) > 1:
            held = words[1] == "PENDING" and "launch failed" in line
            states[words[0]] = HELD if held else words[1]
    return states


def _run(command: Sequence[str]) -> str | None:
    """Return what a command of Slurm's says, None where it fails or does not answer."""
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def max_array_size() -> int:
    """Return how many jobs an array may have, where the cluster says so."""
    told = _run(["scontrol", "show", "config"]) or ""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, flags=re.MULTILINE)
    return max(int(found[1]), 1) if found else sys.maxsize


class Local:
    """Processes on this machine, `parallel` at a time, each with a GPU of its own if any."""

    ask_every_s = 0.5

    def __init__(self, cluster: render.Cluster, folder: Path, parallel: int) -> None:
        self._cluster, self._folder, self._parallel = cluster, folder, parallel
        self._running: dict[str, tuple[int, submitit.Job[int]]] = {}
        self._told: set[str] = set()

    def room(self, running: int) -> int:
        """Return how many places are free."""
        return self._parallel - running

    def submit(self, shards: Sequence[Work]) -> list[str]:
        """Start processes."""
        return [self._start(shard) for shard in shards]

    def _start(self, shard: Work) -> str:
        taken = {slot for slot, _ in self._running.values()}
        slot = next(slot for slot in range(self._parallel) if slot not in taken)
        gpus = [slot] if self._cluster.gpus_per_node else []
        executor = submitit.LocalExecutor(self._folder, max_num_timeout=jobs.NO_LIMIT)
        executor.update_parameters(
            gpus_per_node=len(gpus),
            visible_gpus=gpus,
            timeout_min=jobs.NO_LIMIT,
            signal_delay_s=self._cluster.signal_lead_s,
            stderr_to_stdout=True,
        )
        with jobs.keyboard_kept_off(), submitit.helpers.clean_env():
            job = executor.submit(shard)
        self._running[job.job_id] = slot, job
        return job.job_id

    def ended(self, names: Collection[str]) -> Mapping[str, str]:
        """Return the processes that have ended."""
        gone = [name for name in names if self._running[name][1].done()]
        for name in gone:
            del self._running[name]
        return dict.fromkeys(gone, GONE)

    def stop(self) -> bool:
        """Let the processes write what they have drawn, and wait for that."""
        # Once each: a second signal would stop the writing.
        for name in self._running.keys() - self._told:
            self._told.add(name)
            jobs.terminate(int(name))
        return True
