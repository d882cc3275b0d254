"""Train through submitit: on a Slurm cluster, on this machine, or in this process.

    python launch/train.py --nodes 2 -- --preset tiny --data store --run run

What follows `--` goes to `sssd-hpc train` as it is. On Slurm the job is that of slurm/train.sbatch:
the same YAML, the same checks on every node, the same rule for what goes back into the queue.
submitit's files lie in RUN/submitit.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

# Run as a file, Python looks for modules beside it alone.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch import jobs  # noqa: E402
from slurm import render  # noqa: E402
from sssd_hpc.errors import UserError  # noqa: E402

# What a rank says that lost, or does not reach, another: see sssd_hpc.errors.PeerLost.
PEERS = "the others"


@dataclasses.dataclass(frozen=True)
class Train:
    """One rank of a training; what it knows is pickled, all state lies in RUN."""

    flags: tuple[str, ...]
    local_port: int | None = None
    """Where the ranks of submitit's local executor meet; Slurm's find each other by themselves."""

    def __call__(self) -> int:
        """Run `sssd-hpc train` and return its exit code; on Slurm leave with what is not 0."""
        if self.local_port is not None:
            here = submitit.JobEnvironment()
            os.environ.update(
                RANK=str(here.global_rank),
                WORLD_SIZE=str(here.num_tasks),
                LOCAL_RANK=str(here.local_rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(self.local_port),
            )
        from sssd_hpc import cli

        code = cli.main(["train", *self.flags])
        if code and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            # For srun, which ends the other ranks, and for the job's last line, which asks why.
            sys.exit(code)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Submit the same again: called in a signal handler, while the ranks save by themselves."""
        return submitit.helpers.DelayedSubmission(self)


def slurm_parameters(cluster: render.Cluster, tasks_per_node: int, run: Path) -> dict[str, Any]:
    """Return submitit's parameters for the job that slurm/train.sbatch would be."""
    return {
        **jobs.slurm_parameters(cluster, tasks_per_node),
        "setup": [f"run={shlex.quote(str(run))}", *render.attempt(cluster)],
        "srun_args": ["--kill-on-bad-exit=1", "--wait=600", "--open-mode=append"],
        "teardown": ["finish $?"],
    }


def submit_slurm(train: Train, cluster: render.Cluster, tasks_per_node: int, run: Path) -> str:
    """Submit a job and return its id.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    try:
        # As the batch script starts a rank: `rank` is a variable of its shell.
        python = f'bash -c "$rank" rank {shlex.quote(sys.executable)}'
        executor = submitit.SlurmExecutor(
            _folder(run), max_num_timeout=jobs.NO_LIMIT, python=python
        )
        executor.update_parameters(**slurm_parameters(cluster, tasks_per_node, run))
        with submitit.helpers.clean_env():
            return executor.submit(train).job_id
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"the job was not submitted: {error}") from error


def run_local(train: Train, cluster: render.Cluster, tasks_per_node: int, run: Path) -> int:
    """Train on this machine, one process a rank, and return the exit code of the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    executor = submitit.LocalExecutor(_folder(run), max_num_timeout=jobs.NO_LIMIT)
    executor.update_parameters(
        tasks_per_node=tasks_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=jobs.NO_LIMIT,
        signal_delay_s=cluster.signal_lead_s,
        stderr_to_stdout=True,
    )
    # The keyboard's signal reaches every process: submitit's would kill the ranks while they save.
    with jobs.keyboard_kept_off(), submitit.helpers.clean_env():
        job = executor.submit(dataclasses.replace(train, local_port=port))
    print(f"{tasks_per_node} rank(s), logs: {job.paths.folder}/{job.job_id}_*_log.out", flush=True)
    with jobs.handing_on(lambda: jobs.terminate(int(job.job_id))):
        while not job.done():
            time.sleep(0.1)
    code, said = cause([_end(job.task(rank), rank) for rank in range(tasks_per_node)])
    if code:
        print(said, file=sys.stderr)
    return code


def cause(ends: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """Return the exit code and words, among those of all ranks, that say why the run ended.

    A user's mistake comes before a failure, and a failure before an early stop. Of failures those
    count least where a rank only lost the others.
    """

    def weight(end: tuple[int, str]) -> tuple[bool, bool, int, bool]:
        code, said = end
        return code == jobs.EXIT_USER, code not in (0, jobs.EXIT_RESUMABLE), code, PEERS not in said

    return max(ends, key=weight)


def _end(task: submitit.Job[int], rank: int) -> tuple[int, str]:
    """Return the exit code of a rank that has ended, and the line of its log that says why."""
    log = (task.stdout() or "").strip().splitlines() or [""]
    # A rank that was killed left no result, and submitit would wait for it.
    if not task.paths.result_pickle.exists() or task.exception():
        return jobs.EXIT_FAILED, f"error: rank {rank} ended without a word; its log ends: {log[-1]}"
    lines = [line for line in log if line.startswith(("error:", "stopped early:"))]
    return task.result(), (lines or log)[-1]


def run_debug(train: Train, run: Path) -> int:
    """Train in this process, where a debugger sees it; an error opens pdb."""
    executor = submitit.DebugExecutor(_folder(run))
    return executor.submit(train).result()


def _folder(run: Path) -> Path:
    return run.absolute() / "submitit" / "%j"


def main(args: Sequence[str] | None = None) -> int:
    """Submit or run a training; exit codes as those of sssd-hpc."""
    words, flags = jobs.split(args)
    parser = argparse.ArgumentParser(
        prog="python launch/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm")
    parser.add_argument("--nodes", type=int, help="default: the YAML's; 1 here")
    parser.add_argument("--tasks-per-node", type=int, help="default: one a GPU, or one; 1 here")
    parser.add_argument("--yaml", type=Path, default=ROOT / "slurm" / "cluster.yaml")
    given = parser.parse_args(words)
    return jobs.guarded(lambda: _launch(given, flags))


def _launch(given: argparse.Namespace, flags: Sequence[str]) -> int:
    run = jobs.folder_of(flags, "--run")
    cluster = render.read_cluster(given.yaml)
    for flag, value in (("--nodes", given.nodes), ("--tasks-per-node", given.tasks_per_node)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}; it must be at least 1")
    train = Train(tuple(flags))
    if given.cluster != "slurm" and (given.nodes or 1) > 1:
        raise UserError(
            f"--nodes is {given.nodes} with --cluster {given.cluster}, which is this machine; "
            "give --cluster slurm, or more --tasks-per-node"
        )
    if given.cluster == "debug":
        if (given.tasks_per_node or 1) > 1:
            raise UserError(
                f"--tasks-per-node is {given.tasks_per_node} with --cluster debug, which is one "
                "process; give --cluster local"
            )
        return run_debug(train, run)
    default = cluster.tasks_per_node if given.cluster == "slurm" else 1
    tasks = given.tasks_per_node or default
    cluster = dataclasses.replace(
        cluster,
        nodes=given.nodes or cluster.nodes,
        gpus_per_node=tasks if cluster.gpus_per_node else 0,
    )
    if given.cluster == "local":
        return run_local(train, cluster, tasks, run)
    job_id = submit_slurm(train, cluster, tasks, run)
    print(f"Submitted batch job {job_id}; logs: {run / 'submitit' / job_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
