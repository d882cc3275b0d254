"""A synthetic set by arrays of jobs on a real Slurm, under faults: the bytes of one calm process.

The model has a few thousand weights; disturbed_shards.py makes the faults that the lab cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from sssd_hpc.generate.merge import verify
from tests.generate.conftest import make_run
from tests.slurm_lab.lab import Lab, LabError, environment, poll

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "sample.sbatch"
LAUNCH = ROOT / "launch" / "sample.py"
RECORDS, BATCH = 96, 2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what sets share: run, store, the disturbed package."""
    folder = tmp_path_factory.mktemp("study")
    simulate(folder / "simulated", num_records=RECORDS, seed=0)
    prepare(folder / "simulated", folder / "store", labels="NORM")
    make_run(folder / "run", ("NORM",), length=1000)
    package = folder / "path" / "sssd_hpc"
    package.mkdir(parents=True)
    program = Path(__file__).with_name("disturbed_shards.py").read_text()
    head, future, body = program.partition("from __future__ import annotations\n")
    init = f"__path__ += [{str(ROOT / 'sssd_hpc')!r}]\n__version__ = '0.1.0'\n"
    (package / "__init__.py").write_text(head + future + init + body)
    real = (ROOT / "sssd_hpc" / "__main__.py").read_text()
    (package / "__main__.py").write_text(real)
    return folder


@pytest.fixture(scope="module")
def calm(study: Path) -> str:
    """The hashes of a set that one process makes, undisturbed."""
    out = study / "calm"
    command = [sys.executable, "-m", "sssd_hpc", "sample", *flags(study, out)]
    environ = {**os.environ, "PYTHONPATH": str(study / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return (out / "SHA256SUMS.txt").read_text()


def flags(study: Path, out: Path) -> list[str]:
    given = ("--run", study / "run", "--like", study / "store", "--out", out)
    return [*map(str, given), "--batch-size", str(BATCH)]


@pytest.fixture
def disturb(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[int, list[dict[str, int]]]], Path]:
    """Plan faults, by shard and attempt; return the folder of the set."""
    monkeypatch.setenv("PYTHONPATH", str(study / "path"))
    monkeypatch.setenv("DISTURB", str(tmp_path))
    out = tmp_path / "out"

    def plan(faults: dict[int, list[dict[str, int]]]) -> Path:
        by_shard = {str(shard): attempts for shard, attempts in faults.items()}
        (tmp_path / "plan.json").write_text(json.dumps({"out": str(out), "faults": by_shard}))
        return out

    return plan


def start(lab: Lab, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a command on the controller's machine."""
    # The time is kept inside: killing nsenter would leave the command behind.
    limit = ["timeout", "--signal=KILL", "200"]
    command = [*lab.entrance(cwd=cwd), *limit, sys.executable, str(LAUNCH), *arguments]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(lab: Lab, process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Wait for a command to succeed, letting no requeued job wait for its two minutes."""

    def probe() -> bool:
        start_held(lab)
        return process.poll() is not None

    try:
        poll("the launcher's end", seconds, probe)
    finally:
        if process.poll() is None:
            process.kill()
        out, err = process.communicate()
        print(err)
    assert process.returncode == 0, err
    return out, err


def start_held(lab: Lab) -> None:
    query = ["squeue", "-h", "-r", "-t", "pending", "-o", "%A %r"]
    for line in lab.run(*query, check=False).stdout.splitlines():
        job, reason = line.split(maxsplit=1)
        # Set again and again, it would never come.
        if reason == "BeginTime" and starts(lab, job) > time.time() + 5:
            lab.start_now(job)


def starts(lab: Lab, job: str) -> float:
    """When a job may start; now, while the controller is away."""
    with contextlib.suppress(LabError, ValueError, KeyError):
        return datetime.fromisoformat(lab.job(job)["StartTime"]).timestamp()
    return 0.0


def gates(folder: Path) -> dict[int, str]:
    """The shards that wait at a gate, and their nodes."""
    names = (path.name.split("-") for path in folder.glob("gate-*"))
    return {int(shard): node for _, shard, node in names}


@pytest.fixture
def launcher(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    begun: list[subprocess.Popen[str]] = []

    def launch(*arguments: str) -> subprocess.Popen[str]:
        begun.append(start(lab, *arguments, cwd=tmp_path))
        return begun[-1]

    yield launch
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_an_array_under_faults_ends_in_the_bytes_of_a_calm_process(
    lab: Lab,
    study: Path,
    calm: str,
    tmp_path: Path,
    disturb: Callable[..., Path],
    launcher: Callable[..., subprocess.Popen[str]],
) -> None:
    """Sixteen shards: some killed at random changes, one preempted, one's node without power."""
    faults: dict[int, list[dict[str, int]]] = {1: [{"gate": 4}], 6: [{"gate": 4}]}
    # Three batches of two records of two files each are twelve changes, beside a shard's own.
    dice = random.Random(5)
    for shard in dice.sample([*range(2, 6), *range(7, 16)], 5):
        faults[shard] = [{"kill": dice.randint(1, 13)}]
    faults[shard].append({"kill": 1})
    print("faults", faults)
    out = disturb(faults)
    arguments = ["--shards", "16", "--", *flags(study, out)]
    began = time.monotonic()
    process = launcher(*arguments)
    poll("two shards at their gates", 60, lambda: len(gates(tmp_path)) == 2)
    preempted, dark = gates(tmp_path)[1], gates(tmp_path)[6]
    print("preempted", preempted, "dark", dark)
    high = lab.sbatch(
        *("--partition=high", f"--nodelist={preempted}", "--exclusive", "--output=/dev/null"),
        "--wrap=true",
    )
    lab.wait(high, "COMPLETED", 60)
    lab.power_off(dark)
    lab.kill_controller()
    (tmp_path / "go").touch()
    lab.start_controller()
    said, _ = ended(lab, process, 120)
    assert f"{RECORDS} record(s), finished" in said
    assert (out / "SHA256SUMS.txt").read_text() == calm
    assert verify(out) == RECORDS
    attempts = [path.name for path in (tmp_path / "attempts").iterdir()]
    # The last kill of all: its shard may have written all before it.
    assert len(attempts) >= 16 + sum(map(len, faults.values()))
    print(f"{time.monotonic() - began:.0f} s, {len(attempts)} attempts")
    # Again: nothing is submitted.
    said, _ = ended(lab, launcher(*arguments), 60)
    assert "finished, every hash is right" in said
    assert len([*(tmp_path / "attempts").iterdir()]) == len(attempts)


def test_sbatch_alone_makes_a_set_whose_last_shard_finishes_it(
    lab: Lab, study: Path, calm: str, tmp_path: Path, disturb: Callable[..., Path]
) -> None:
    out = disturb({1: [{"kill": 5}], 2: [{"gate": 4}]})
    job = lab.sbatch("--array=0-3", SCRIPT, *flags(study, out), cwd=tmp_path)
    poll("a shard at its gate", 60, lambda: gates(tmp_path))
    lab.run("scancel", "--signal=USR1", f"{job}_2")
    (tmp_path / "go").touch()

    def finished() -> bool:
        start_held(lab)
        return (out / "SHA256SUMS.txt").exists()

    poll("the set", 90, finished)
    poll("the queue is empty", 60, lambda: not lab.run("squeue", "-h").stdout)
    assert (out / "SHA256SUMS.txt").read_text() == calm
    assert verify(out) == RECORDS
    logs = {path.name: path.read_text() for path in tmp_path.glob(f"slurm-{job}_*.out")}
    assert len(logs) == 4
    assert "exit code 137" in logs[f"slurm-{job}_1.out"]
    assert "exit code 75: stopped early" in logs[f"slurm-{job}_2.out"]
