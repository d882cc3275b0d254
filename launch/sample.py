"""Make a synthetic set by many processes: on a Slurm cluster, or on this machine, through submitit.

    python launch/sample.py --shards 64 --parallel 8 -- --run run --like store --out synthetic

What follows `--` goes to `sssd-hpc sample` as it is. Each shard is a job of one process, on one GPU
where slurm/cluster.yaml has any. This command waits, shows how far they are, starts again what
failed, and ends when the set is finished. Stopped, or with --detach, it leaves Slurm's jobs to
Slurm, and the same command watches them again. submitit's files lie in OUT/.submitit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

# Run as a file, Python looks for modules beside it alone.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch import clusters, jobs  # noqa: E402
from slurm import render  # noqa: E402
from sssd_hpc import cli, config, files  # noqa: E402
from sssd_hpc.errors import UserError  # noqa: E402
from sssd_hpc.generate import status  # noqa: E402
from sssd_hpc.generate.names import JOBS, REQUEST_FILE  # noqa: E402
from sssd_hpc.progress import Progress  # noqa: E402

SHARDS = 16
RETRIES = 2
IDLE_STOPS = 10
"""So often in a row may a shard be preempted without a record made."""
SAY_EVERY_S = 60.0
TAIL_LINES = 5


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of a set; what it knows is pickled, all state lies in OUT."""

    flags: tuple[str, ...]
    number: int
    count: int
    folder: str

    def __call__(self) -> int:
        """Run `sssd-hpc sample` and note its exit code; leave with one that is not 0."""
        from sssd_hpc import cli, files

        note = Path(self.folder) / f"{submitit.JobEnvironment().job_id}_end.json"
        note.unlink(missing_ok=True)
        code = cli.main(["sample", *self.flags, "--shard", f"{self.number}/{self.count}"])
        files.write_json(note, {"code": code})
        if code and "SUBMITIT_DEBUG_JOB_ID" not in os.environ:
            sys.exit(code)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Submit the same again: called in a signal handler, and whole records are whole."""
        return submitit.helpers.DelayedSubmission(self)


class Launch:
    """Shards on a cluster until each has ended well, or failed too often."""

    def __init__(self, cluster: clusters.Cluster, out: Path, count: int, retries: int) -> None:
        self._cluster, self._out, self._count, self._retries = cluster, out, count, retries
        self._folder = out.absolute() / JOBS
        self._active: dict[str, Shard] = {}
        self._tries: dict[int, int] = {}
        self._stops: dict[int, tuple[int, int]] = {}
        self._stopped = False
        self.failed: dict[int, str] = {}
        """What is to be said of each shard that failed."""
        self.code = 0

    def adopt(self, waiting: list[Shard], states: Mapping[str, str] | None) -> list[Shard]:
        """Watch jobs of an earlier launch that are still in the queue; return the other shards.

        Raises:
            UserError: nobody knows; or they are shards of another number of shards.
        """
        held = read_jobs(self._folder)
        if held and states is None:
            raise UserError(
                f"{self._folder} tells of jobs and squeue does not answer; repeat when it does"
            )
        live = {
            name: shard
            for name, shard in held.items()
            if (states or {}).get(name, clusters.GONE) not in {clusters.GONE, *clusters.ENDED}
        }
        counts = {count for _, count in live.values()}
        if counts - {self._count}:
            raise UserError(
                f"{len(live)} jobs of {max(counts)} shards are in the queue, the first "
                f"{min(live)}; give --shards {max(counts)}, or scancel them first"
            )
        numbers = {number: name for name, (number, _) in live.items()}
        self._active = {
            numbers[shard.number]: shard for shard in waiting if shard.number in numbers
        }
        return [shard for shard in waiting if shard.number not in numbers]

    def submit(self, waiting: list[Shard]) -> list[Shard]:
        """Start as many as there is room for; return the others."""
        room = self._cluster.room(len(self._active))
        now, later = waiting[:room], waiting[room:]
        if now:
            for name, shard in zip(self._cluster.submit(now), now, strict=True):
                self._active[name] = shard
            told = {name: [shard.number, shard.count] for name, shard in self._active.items()}
            files.write_json(self._folder / "jobs.json", told)
        return later

    def run(self, waiting: list[Shard], total: int) -> None:
        """Wait for the active shards and those that wait; `total` counts the set's records."""
        began, count = time.monotonic(), len(self._active) + len(waiting)
        with jobs.handing_on(self._stop), self._view(total) as show:
            while self._active or (waiting and not self._stopped):
                if not self._stopped:
                    waiting = self.submit(waiting)
                for name, state in self._cluster.ended(list(self._active)).items():
                    shard = self._active.pop(name)
                    if self._judge(name, shard, state):
                        waiting.append(shard)
                show(f"{count - len(self._active) - len(waiting)}/{count}")
                if self._stopped and not self._cluster.stop():
                    return
                elapsed = time.monotonic() - began
                time.sleep(min(0.2 + elapsed / 30, self._cluster.ask_every_s))

    def _judge(self, name: str, shard: Shard, state: str) -> bool:
        """Take note of how a shard ended; tell whether to start it again."""
        code = read_code(self._folder / f"{name}_end.json")
        if code == 0:
            return False
        stopped = state == "PREEMPTED" or (code == jobs.EXIT_RESUMABLE and state != "CANCELLED")
        if stopped and self._goes_on(shard.number):
            return not self._stopped
        tries = self._tries[shard.number] = self._tries.get(shard.number, 0) + 1
        again = code != jobs.EXIT_USER and state != "CANCELLED" and tries <= self._retries
        if again and not self._stopped:
            return True
        how = f"exit code {code}" if code is not None else "no exit code"
        where = self._folder / f"{name}_0_log.out"
        said = "".join(f"\n  {line}" for line in tail(where))
        self.failed[shard.number] = (
            f"{how}, {state.lower()}, after {tries} attempt(s): {where}{said}"
        )
        self.code = max(self.code, jobs.EXIT_USER if code == jobs.EXIT_USER else jobs.EXIT_FAILED)
        return False

    def _goes_on(self, number: int) -> bool:
        """Count an early stop of a shard; tell whether a record came in one of the last ten."""
        shards = status.examine(self._out).shards
        done = next((shard.done for shard in shards if shard.shard == number), 0)
        best, idle = self._stops.get(number, (-1, 0))
        self._stops[number] = (done, 0) if done > best else (best, idle + 1)
        return self._stops[number][1] < IDLE_STOPS

    def _stop(self) -> None:
        self._stopped = True
        self.code = jobs.EXIT_RESUMABLE

    @contextlib.contextmanager
    def _view(self, total: int) -> Iterator[Callable[[str], None]]:
        done = self._done()
        with Progress("sample", total=total, unit="records", done=done, every_s=SAY_EVERY_S) as bar:

            def show(ended: str) -> None:
                nonlocal done
                now = self._done()
                failed = {"failed": len(self.failed)} if self.failed else {}
                bar.advance(now - done, shards=ended, **failed)
                done = now

            yield show

    def _done(self) -> int:
        return status.examine(self._out).done if status.is_root(self._out) else 0


def read_jobs(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the jobs of the last launch: shard and number of shards."""
    try:
        held = json.loads((folder / "jobs.json").read_bytes())
        return {str(name): (int(number), int(count)) for name, (number, count) in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def read_code(path: Path) -> int | None:
    """Return the exit code that a shard noted, None where it could not."""
    try:
        code = json.loads(path.read_bytes())["code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


def tail(path: Path) -> list[str]:
    """Return the last lines of a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    shown = ["".join(filter(str.isprintable, line))[:300] for line in lines if line.strip()]
    return shown[-TAIL_LINES:]


def run_debug(shards: Sequence[Shard], folder: Path) -> int:
    """Make the shards in this process, one after the other; an error opens pdb."""
    for shard in shards:
        code: int = submitit.DebugExecutor(folder).submit(shard).result()
        if code:
            return code
    return 0


def sample_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags of `sssd-hpc sample`.

    Raises:
        UserError: they do not fit, or are those of one shard.
    """

    @functools.wraps(cli.sample)
    def take(**values: Any) -> dict[str, Any]:
        return values

    values: dict[str, Any] = config.parse(take, flags, prog="sssd-hpc sample")
    for name in ("shard", "only"):
        if any(flag.partition("=")[0] == f"--{name}" for flag in flags):
            raise UserError(f"--{name} is among the flags after --; this command makes all shards")
        values.pop(name, None)
    return values


def main(args: Sequence[str] | None = None) -> int:
    """Make a set; exit codes as those of sssd-hpc."""
    words, flags = jobs.split(args)
    parser = argparse.ArgumentParser(
        prog="python launch/sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm")
    parser.add_argument("--shards", type=int, help=f"default: {SHARDS}; --parallel where local")
    parser.add_argument("--parallel", type=int, help="at a time; default: all on Slurm, 1 here")
    parser.add_argument("--partition", help="default: the YAML's")
    parser.add_argument("--gpus", type=int, choices=(0, 1), help="of a shard; default: as the YAML")
    parser.add_argument("--time", help="of a shard, [DAYS-]HOURS:MINUTES:SECONDS; the YAML's")
    parser.add_argument("--retries", type=int, default=RETRIES, help=f"of a shard: {RETRIES}")
    parser.add_argument("--detach", action="store_true", help="submit and leave")
    parser.add_argument("--yaml", type=Path, default=ROOT / "slurm" / "cluster.yaml")
    given = parser.parse_args(words)
    return jobs.guarded(lambda: _launch(given, flags))


def _launch(given: argparse.Namespace, flags: Sequence[str]) -> int:
    out = jobs.folder_of(flags, "--out")
    for name, least in (("shards", 1), ("parallel", 1), ("retries", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if given.detach and given.cluster != "slurm":
        raise UserError(f"--detach needs Slurm, --cluster is {given.cluster}")
    cluster = _shard_cluster(given)
    values = sample_flags(flags)

    from sssd_hpc.ecg.store import Store
    from sssd_hpc.generate import array, sampling

    values["folds"] = config.parse_folds(values["folds"])
    run, like = values.pop("run"), Store.open(values.pop("like"), verify=True)
    del values["out"]
    # Shards that measured for themselves might not agree, and the GPU may be elsewhere.
    fixed = values["batch_size"] is not None or (out / REQUEST_FILE).is_file()
    if cluster.gpus_per_node and not fixed:
        raise UserError(
            "--batch-size is missing: shards on GPUs need one for all; `sssd-hpc sample` without "
            "--shard measures on such a GPU what its memory holds, and says so"
        )
    plan = array.settled(sampling.plan(run, like, begun=out, **values), out)
    if values["batch_size"] is None:
        flags = [*flags, "--batch-size", str(plan.request.batch_size)]
    count = given.shards or (SHARDS if given.cluster == "slurm" else given.parallel or 1)
    count = min(count, len(plan.manifest.batches(plan.request.batch_size)))
    numbers = array.unfinished(plan, out, count)
    if not numbers:
        print(f"{out}: {len(plan.manifest)} record(s), finished, every hash is right")
        return 0
    folder = out.absolute() / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    shards = [Shard(tuple(flags), number, count, str(folder)) for number in numbers]
    if given.cluster == "debug":
        return run_debug(shards, folder)
    (folder / "lock").touch()
    busy = f"another launch/sample.py works for {out}; wait for it: sssd-hpc status {out}"
    with files.locked(folder / "lock", busy):
        where: clusters.Cluster = (
            clusters.Slurm(cluster, folder, given.parallel)
            if given.cluster == "slurm"
            else clusters.Local(cluster, folder, given.parallel or 1)
        )
        launch = Launch(where, out, count, given.retries)
        waiting = launch.adopt(shards, clusters.queue() if given.cluster == "slurm" else {})
        if given.detach:
            launch.submit(waiting)
            print(f"{len(waiting)} shard(s) submitted; sssd-hpc status {out}; logs: {folder}")
            return 0
        launch.run(waiting, len(plan.manifest))
        for number, words in sorted(launch.failed.items()):
            print(f"error: shard {number}/{count}: {words}", file=sys.stderr)
        if launch.code == jobs.EXIT_RESUMABLE:
            print("stopped early; the same command goes on", file=sys.stderr)
        if not launch.code:
            array.finish(array.settled(plan, out), out)
            print(f"{out}: {len(plan.manifest)} record(s), finished")
        return launch.code


def _shard_cluster(given: argparse.Namespace) -> render.Cluster:
    cluster = render.of_shard(render.read_cluster(given.yaml))
    chosen = {
        "partition": given.partition,
        "gpus_per_node": given.gpus,
        "time": given.time,
    }
    return dataclasses.replace(cluster, **{k: v for k, v in chosen.items() if v is not None})


if __name__ == "__main__":
    sys.exit(main())
