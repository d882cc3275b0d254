"""One command through submitit: in this process, on this machine, and what Slurm is given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import jobs
from launch import train as launch
from slurm.render import Cluster
from sssd_hpc import cli
from sssd_hpc.errors import UserError

ROOT = Path(__file__).parents[2]
# Stands in for the package in the ranks: says who it is, then ends as it is told.
STAND_IN = """
import json, os, pathlib, signal, time

def main(args):
    run = pathlib.Path(args[args.index("--run") + 1])
    got = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, f: got.append(n))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    seen = {name: os.environ.get(name) for name in names}
    rank = seen["RANK"]
    (run / f"{rank}.tmp").write_text(json.dumps({**seen, "args": args}))
    os.rename(run / f"{rank}.tmp", run / f"{rank}.json")
    if "raise" in args and rank == "1":
        raise RuntimeError("rank 1 fell")
    if "kill" in args and rank == "1":
        print("rank 1 was here", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if "wrong" in args or "wrong on 1" in args and rank == "1":
        print("error: what, where")
        return 2
    if "wrong on 1" in args:
        print("error: rank 0 lost the others")
        return 1
    if "wait" in args:
        end = time.monotonic() + 60
        while not got and time.monotonic() < end:
            time.sleep(0.02)
        return 75
    return 0
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package of that name before the real one for every process that is started."""
    package = tmp_path / "path" / "sssd_hpc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    # As in a shell inside somebody's job.
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("MASTER_ADDR", "left.over")
    run = tmp_path / "run a"
    run.mkdir()
    return run


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def test_local_ranks_meet_and_get_the_flags_as_they_are(stand_in: Path) -> None:
    flags = ["--run", str(stand_in), "--x", 'a "b" $(c)\n`d`']
    process = start("--cluster", "local", "--tasks-per-node", "2", "--", *flags)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    ranks = [json.loads((stand_in / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["args"] for rank in ranks] == [["train", *flags]] * 2
    assert [(rank["WORLD_SIZE"], rank["LOCAL_RANK"]) for rank in ranks] == [("2", "0"), ("2", "1")]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert {rank["SLURM_JOB_ID"] for rank in ranks} == {None}


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("wrong", 2, "error: what, where\n"),
        ("wrong on 1", 2, "error: what, where\n"),
        (
            "raise",
            1,
            "error: rank 1 ended without a word; its log ends: RuntimeError: rank 1 fell\n",
        ),
        ("kill", 1, "error: rank 1 ended without a word; its log ends: rank 1 was here\n"),
    ],
)
def test_a_local_rank_that_fails_gives_its_code_and_its_words(
    how: str, code: int, said: str, stand_in: Path
) -> None:
    process = start("--cluster=local", "--tasks-per-node=2", "--", "--run", str(stand_in), how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in err
    assert err.count("\n") == 1


LOSS = (1, "error: rank 0 lost the others: Connection reset")
ALONE = (1, "error: rank 0 of 2 does not reach the others at 127.0.0.1:20000")


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([(0, ""), (0, "")], 0),
        ([LOSS, (2, "error: x")], 2),
        ([ALONE, (2, "error: x"), LOSS], 2),
        ([(75, "stopped early: SIGTERM"), (2, "error: x")], 2),
        ([LOSS, (1, "error: x")], 1),
        ([(1, "error: x"), ALONE], 1),
        ([LOSS, LOSS], 1),
        ([(75, "stopped early: SIGTERM"), LOSS], 1),
        ([(75, "stopped early: SIGTERM"), (75, "stopped early: SIGTERM")], 75),
        ([(0, ""), (75, "stopped early: what came to the others")], 75),
        ([(0, ""), (1, "error: x")], 1),
    ],
)
def test_the_run_ends_by_its_cause_and_not_by_what_followed(
    ends: list[tuple[int, str]], code: int
) -> None:
    assert launch.cause(ends)[0] == code
    if (code, "error: x") in ends:
        assert launch.cause(ends) == (code, "error: x")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_local_ranks_save(number: signal.Signals, stand_in: Path) -> None:
    process = start("--cluster=local", "--tasks-per-node=2", "--", "--run", str(stand_in), "wait")
    end = time.monotonic() + 60
    while len(list(stand_in.glob("*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


# submitit leaves its two log files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_debug_runs_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def main(args: list[str]) -> int:
        seen.append([str(os.getpid()), *args])
        return 75

    monkeypatch.setattr(cli, "main", main)
    flags = ["--preset", "tiny", "--run", str(tmp_path)]
    assert launch.main(["--cluster", "debug", "--", *flags]) == 75
    assert seen == [[str(os.getpid()), "train", *flags]]


MISTAKES = {
    "no run": (["--", "--preset", "tiny"], "--run is missing among the flags after --"),
    "run without a value": (["--", "--run"], "--run is missing"),
    "run with a percent": (["--", "--run", "a%j"], "--run is 'a%j'"),
    "run of two lines": (["--", "--run", "a\nb"], "control characters"),
    "no such YAML": (["--yaml", "absent.yaml", "--", "--run", "r"], "absent.yaml"),
    "no tasks": (["--tasks-per-node", "0", "--", "--run", "r"], "--tasks-per-node is 0"),
    "many nodes": (["--nodes", "70000", "--", "--run", "r"], "nodes is 70000"),
    "local nodes": (["--cluster=local", "--nodes=2", "--", "--run", "r"], "--cluster slurm"),
    "debug ranks": (
        ["--cluster=debug", "--tasks-per-node=2", "--", "--run", "r"],
        "give --cluster local",
    ),
    "no Slurm": (["--", "--run", "r"], "the job was not submitted"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    args, said = MISTAKES[case]
    assert launch.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


def submitted(folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """Return the script that a stand-in for sbatch was given."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" "{folder}/script"; echo Submitted batch job 7',
        "srun": f'printf \'%s\\n\' "$@" >>{folder}/called; exit "${{CODE:-0}}"',
        "python": f"printf '%s\\n' python \"$@\" >>{folder}/called",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert launch.main(list(args)) == 0
    return (folder / "script").read_text()


def test_slurm_gets_the_job_of_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "name: 'a\\b $(touch pwned)'\npartition: gpu\ngpus_per_node: 4\nmemory: 64G\n"
        "time: '2:00:30'\nsetup: [export A=1]\noptions: {qos: long, exclusive: ''}\n"
    )
    run = tmp_path / "run it's"
    args = ["--yaml", str(yaml), "--nodes", "3", "--", "--preset", "tiny", "--run", str(run)]
    script = submitted(tmp_path, monkeypatch, *args)
    directives = {line for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "#SBATCH --job-name='a\\\\b $(touch pwned)'",
        "#SBATCH --partition=gpu",
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --mem=64G",
        "#SBATCH --time=121",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --qos=long",
        "#SBATCH --exclusive",
    } <= directives
    assert not any("wckey" in line for line in directives)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS": "12"}
    result = subprocess.run(
        ["bash", str(tmp_path / "script")],
        env={**os.environ, **slurm, "SLURM_JOB_NODELIST": "node[1-3]"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    called = (tmp_path / "called").read_text()
    assert called.index("sssd_hpc.train.preflight") < called.index("submitit.core._submit")
    assert f"--run={run}\n" in called
    assert not (tmp_path / "pwned").exists()


def test_a_rank_of_a_slurm_job_leaves_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(cli, "main", lambda args: 75)
    with pytest.raises(SystemExit) as left:
        launch.Train(("--run", "r"))()
    assert left.value.code == 75


def test_checkpoint_submits_the_same_again() -> None:
    train = launch.Train(("--run", "r"))
    again = train.checkpoint()
    assert again.function == train
    assert (again.args, again.kwargs) == ((), {})


def test_the_last_run_flag_wins_as_it_does_for_the_command() -> None:
    assert jobs.folder_of(["--run", "a", "--run=b"], "--run") == Path("b")
    with pytest.raises(UserError, match="--run is missing"):
        jobs.folder_of([], "--run")


def test_what_submitit_sets_is_left_to_it() -> None:
    parameters = launch.slurm_parameters(Cluster(), 1, Path("run"))
    assert not set(jobs.SUBMITITS) & set(parameters["additional_parameters"])
