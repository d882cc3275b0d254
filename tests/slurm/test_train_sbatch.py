"""The batch script and submitit's job on a real Slurm; the ranks are a stand-in that obeys."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm.render import directive
from sssd_hpc.train.restart import read_history
from tests.slurm_lab.lab import Lab, poll

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
# Placed over the real package: all of it but the command line, which says who it is and obeys.
STAND_IN = """
import json, os, pathlib, signal, time

def main(args):
    run = pathlib.Path(args[args.index("--run") + 1])
    rank, restart = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    got = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda n, f: got.append(signal.Signals(n).name))
    print("attempt", restart, flush=True)
    seen = {k: v for k, v in os.environ.items() if k.startswith(("SLURM", "OMP_", "MASTER_"))}
    name = f"seen-{rank}-{restart}.json"
    (run / f".{name}").write_text(json.dumps({"args": args, **seen}))
    os.rename(run / f".{name}", run / name)
    if "wrong" in args:
        return 2
    if "die" in args and rank == 1 and ("always" in args or not restart):
        # What srun sends to a rank that is not there yet is lost.
        while not (run / f"seen-0-{restart}.json").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 120
    stays = "always" in args or ("wait" in args or "die" in args) and not restart
    while stays and time.monotonic() < end:
        time.sleep(0.02)
        if got:
            print("saved at", got[0], flush=True)
            return 75
    return 0
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that jobs are submitted in; the stand-in is what they import."""
    package = tmp_path / "path" / "sssd_hpc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__ += [{str(ROOT / 'sssd_hpc')!r}]\n")
    (package / "__main__.py").write_text("import sys; from sssd_hpc.cli import main\n")
    with open(package / "__main__.py", "a") as stream:
        stream.write("sys.exit(main(sys.argv[1:]))\n")
    (package / "cli.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("MASTER_ADDR", "left.over")
    return tmp_path


def seen(run: Path, rank: int, restart: int = 0) -> dict[str, Any] | None:
    path = run / f"seen-{rank}-{restart}.json"
    return json.loads(path.read_text()) if path.exists() else None


def both_ranks_run(run: Path) -> bool:
    return bool(seen(run, 0) and seen(run, 1))


def test_the_committed_script_starts_one_rank_a_node(lab: Lab, work: Path) -> None:
    flags = ["--run", "run a%t", "--x", "a 'b' \"c\" $(touch pwned) `touch pwned`\n\\ # é"]
    job = lab.sbatch(SCRIPT, *flags, cwd=work)
    lab.wait(job, "COMPLETED", 60)
    run = work / "run a%t"
    ranks = [seen(run, rank) or {} for rank in (0, 1)]
    assert [rank["args"] for rank in ranks] == [["train", *flags]] * 2
    for rank, node in zip(ranks, ("node1", "node2"), strict=True):
        assert (rank["SLURM_NTASKS"], rank["SLURM_LOCALID"]) == ("2", "0")
        assert rank["SLURMD_NODENAME"] == node
        assert rank["OMP_NUM_THREADS"] == "1"
        assert "MASTER_ADDR" not in rank
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert not (run / "restarts.jsonl").exists()
    assert not (work / "pwned").exists()


HOSTILE = [
    *("a b", "it's", 'say "x"', "$(touch pwned)", "`touch pwned`", "a;b|c&d>e", "back\\slash"),
    *("a # b", "#", "Zürich", "a\\", "'", '"', "--nodes=9", "%j", "~", "*", "${HOME}", " a "),
]


def test_sbatch_reads_a_directive_as_it_was_given(lab: Lab, work: Path) -> None:
    for value in HOSTILE:
        script = f"#!/bin/bash\n#SBATCH --hold\n{directive('job-name', value)}\ntrue\n"
        job = lab.sbatch(script=script, cwd=work)
        shown = lab.run("scontrol", "show", "job", job).stdout.splitlines()[0]
        lab.run("scancel", job)
        assert shown == f"JobId={job} JobName={value}"
    assert not (work / "pwned").exists()


def test_a_signal_leads_to_a_second_attempt(lab: Lab, work: Path) -> None:
    job = lab.sbatch(SCRIPT, "--run", "run", "wait", cwd=work)
    run = work / "run"
    poll("both ranks", 30, lambda: both_ranks_run(run))
    lab.run("scancel", "--signal=USR1", job)
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "1"
    (line,) = read_history(run, job)
    assert (line.exit_code, line.restart, line.requeue) == (75, 0, True)
    for rank in (0, 1):
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        assert log.startswith("attempt 0\nsaved at SIG")
        assert log.endswith("attempt 1\n")


def test_a_rank_that_dies_once_costs_one_attempt(lab: Lab, work: Path) -> None:
    job = lab.sbatch(SCRIPT, "--run", "run", "die", cwd=work)
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "1"
    (line,) = read_history(work / "run", job)
    assert line.exit_code == 137
    assert "first to end was rank 1 on node2, with exit code 137" in lab.output(job)
    assert "restart 1 of 10" in line.reason


def test_a_job_that_only_dies_is_stopped(lab: Lab, work: Path) -> None:
    job = lab.sbatch(SCRIPT, "--run", "run", "die", "always", cwd=work)
    assert lab.wait(job, "FAILED", 90)["Restarts"] == "1"
    first, second = read_history(work / "run", job)
    assert (first.requeue, second.requeue) == (True, False)
    assert "2 crashes in a row without a newer checkpoint" in lab.output(job)


def test_a_mistake_is_not_tried_again(lab: Lab, work: Path) -> None:
    job = lab.sbatch(SCRIPT, "--run", "run", "wrong", cwd=work)
    found = lab.wait(job, "FAILED", 60)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")


def test_a_cancelled_job_stays_cancelled(lab: Lab, work: Path) -> None:
    job = lab.sbatch(SCRIPT, "--run", "run", "wait", cwd=work)
    run = work / "run"
    poll("both ranks", 30, lambda: both_ranks_run(run))
    lab.run("scancel", job)
    assert lab.wait(job, "CANCELLED", 60)["Restarts"] == "0"
    assert "saved at SIGTERM" in (run / "logs" / "rank-0.log").read_text()


def launch(lab: Lab, work: Path, *flags: str) -> str:
    script, run = str(ROOT / "launch" / "train.py"), str(work / "run")
    command = (sys.executable, script, "--", "--run", run, *flags)
    said = lab.run(*command, cwd=work).stdout
    assert said.startswith("Submitted batch job ")
    return said.split()[3].rstrip(";")


def test_submitits_job_is_the_same_job(lab: Lab, work: Path) -> None:
    job = launch(lab, work)
    lab.wait(job, "COMPLETED", 60)
    ranks = [seen(work / "run", rank) or {} for rank in (0, 1)]
    assert [rank["args"] for rank in ranks] == [["train", "--run", str(work / "run")]] * 2
    assert {rank["SLURM_NTASKS"] for rank in ranks} == {"2"}


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_submitits_job_comes_back_after_a_signal(lab: Lab, work: Path, name: str) -> None:
    job = launch(lab, work, "wait")
    run = work / "run"
    poll("both ranks", 30, lambda: both_ranks_run(run))
    lab.run("scancel", f"--signal={name}", job)
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "1"
    (line,) = read_history(run, job)
    assert (line.exit_code, line.requeue) == (75, True)
