"""A set by many processes through submitit: in this process, on this machine, and Slurm's part."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from launch import clusters, jobs
from launch import sample as launch
from slurm.render import Cluster
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from sssd_hpc.errors import UserError
from sssd_hpc.generate import array
from sssd_hpc.generate.beats import Beat
from sssd_hpc.generate.merge import verify
from tests.generate.conftest import make_run

# submitit leaves its two log files open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).parents[2]
# Stands in for the command line in the shards: says who it is, then ends as it is told.
STAND_IN = """
import os, pathlib, signal, sys, time

def main(args):
    out = pathlib.Path(args[args.index("--out") + 1])
    shard = args[args.index("--shard") + 1].partition("/")[0]
    tries = len(list(out.glob(f"ran-{shard}-*")))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    (out / f"ran-{shard}-{tries}").write_text(gpus)
    how = (out / "how").read_text().split()
    print("this is shard", shard, flush=True)
    if "mistake" in how and shard == "1":
        print("error: what, where")
        return 2
    if "killed" in how and shard == "1" and tries < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if "dies" in how and shard == "1":
        raise RuntimeError("fell \\x1b[2J over")
    if "preempted" in how and tries < 4:
        return 75
    if "wait" in how:
        got = []
        signal.signal(signal.SIGTERM, lambda n, f: got.append(n))
        (out / f"waits-{shard}").touch()
        end = time.monotonic() + 60
        while not got and time.monotonic() < end:
            time.sleep(0.02)
        return 75
    return 0
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of ten records and a trained run."""
    folder = tmp_path_factory.mktemp("work")
    simulate(folder / "root", num_records=10, seed=0)
    prepare(folder / "root", folder / "store", labels="NORM")
    make_run(folder / "run", ("NORM",), length=1000)
    return folder


@pytest.fixture
def flags(work: Path, tmp_path: Path) -> list[str]:
    """The flags of sample: five batches into a folder that is not there yet."""
    given = {"--run": work / "run", "--like": work / "store", "--out": tmp_path / "out"}
    return [*(str(word) for pair in given.items() for word in pair), "--batch-size", "2"]


@pytest.fixture
def stand_in(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, dict[str, int]]]:
    """Launch shards that are stand-ins; return the exit code and how often each shard ran."""
    package = tmp_path / "path" / "sssd_hpc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"__path__ += [{str(ROOT / 'sssd_hpc')!r}]\n__version__ = ''\n"
    )
    (package / "cli.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    # As where the launcher is run as a file: its processes need not find it.
    cloudpickle.register_pickle_by_value(launch)
    monkeypatch.setattr(array, "unfinished", lambda plan, out, count: list(range(count)))
    monkeypatch.setattr(array, "finish", lambda plan, out: (out / "finished").touch())
    out = tmp_path / "out"
    out.mkdir()

    def run(how: str, *options: str) -> tuple[int, dict[str, int]]:
        (out / "how").write_text(how)
        code = launch.main(["--cluster=local", *options, "--", *flags])
        ran = [path.name.split("-")[1] for path in out.glob("ran-*")]
        return code, {shard: ran.count(shard) for shard in sorted(set(ran))}

    return run


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[], bool]:
    return lambda: (tmp_path / "out" / "finished").exists()


def test_every_shard_runs_once(
    stand_in: Callable[..., Any], finished: Callable[[], bool], tmp_path: Path
) -> None:
    assert stand_in("", "--shards=3", "--parallel=2") == (0, {"0": 1, "1": 1, "2": 1})
    assert finished()
    assert {path.read_text() for path in (tmp_path / "out").glob("ran-*")} == {""}


def test_no_more_shards_than_batches_and_a_gpu_each(
    stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    code, ran = stand_in("", "--shards=99", "--parallel=2", "--gpus=1")
    assert (code, len(ran)) == (0, 5)
    assert {path.read_text() for path in (tmp_path / "out").glob("ran-*")} == {"0", "1"}


def test_a_shard_that_is_killed_is_started_again(
    stand_in: Callable[..., Any], finished: Callable[[], bool]
) -> None:
    assert stand_in("killed", "--parallel=2") == (0, {"0": 1, "1": 3})
    assert finished()


def test_being_preempted_does_not_count(stand_in: Callable[..., Any]) -> None:
    assert stand_in("preempted", "--shards=1", "--retries=0") == (0, {"0": 5})


@pytest.mark.parametrize(
    ("how", "code", "tries", "said"),
    [("mistake", 2, 1, "error: what, where"), ("dies", 1, 3, "fell [2J over")],
)
def test_a_shard_that_fails_is_named_with_its_logs_tail(
    how: str,
    code: int,
    tries: int,
    said: str,
    stand_in: Callable[..., Any],
    finished: Callable[[], bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stand_in(how, "--shards=3", "--parallel=3") == (code, {"0": 1, "1": tries, "2": 1})
    assert not finished()
    err = capsys.readouterr().err
    assert f"error: shard 1/3: {'exit code 2' if code == 2 else 'no exit code'}" in err
    assert f"after {tries} attempt(s)" in err
    assert said in err
    assert "\x1b" not in err
    log = re.search(r"(\S+_log\.out)", err)
    assert log
    assert "this is shard 1" in Path(log[1]).read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_shards_write_and_starts_no_more(
    number: signal.Signals,
    stand_in: Callable[..., Any],
    finished: Callable[[], bool],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        end = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("waits-*"))) < 2:
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert stand_in("wait", "--shards=3", "--parallel=2") == (75, {"0": 1, "1": 1})
    thread.join()
    assert not finished()
    assert "stopped early; the same command goes on" in capsys.readouterr().err


def test_a_second_launcher_is_told_of_the_first(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sssd_hpc import files

    folder = tmp_path / "out" / ".submitit"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    with files.locked(folder / "lock", ""):
        assert launch.main(["--cluster=local", "--", *flags]) == 2
    assert "another launch/sample.py works for" in capsys.readouterr().err


def test_real_shards_here_make_a_finished_set(
    work: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file, from another folder; then once more, which has nothing to do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "launch" / "sample.py"), "--cluster=local"]
    command += ["--shards=2", "--parallel=2", "--", *flags]
    said = []
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "10 record(s), finished\n" in said[0]
    assert "10 record(s), finished, every hash is right\n" in said[1]
    assert verify(tmp_path / "out") == 10
    assert len([*(tmp_path / "out" / ".submitit").glob("*_end.json")]) == 2


def test_debug_makes_the_shards_in_this_process(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert launch.main(["--cluster=debug", "--shards=3", "--", *flags]) == 0
    assert verify(out) == 10
    # What was damaged, and no more, is made again.
    before = (out / "SHA256SUMS.txt").read_bytes()
    (out / "records100/00000/00003_lr.dat").write_bytes(b"")
    assert launch.main(["--cluster=debug", "--shards=3", "--", *flags]) == 0
    assert (out / "SHA256SUMS.txt").read_bytes() == before
    assert "1 record(s) made now" in capfd.readouterr().out


MISTAKES: dict[str, tuple[list[str], list[str], str]] = {
    "no shards": (["--shards=0"], [], "--shards is 0; it must be at least 1"),
    "no places": (["--parallel=0"], [], "--parallel is 0"),
    "retries": (["--retries=-1"], [], "--retries is -1"),
    "time": (["--time=1h"], [], "[DAYS-]HOURS:MINUTES:SECONDS"),
    "detached here": (["--cluster=local", "--detach"], [], "--detach needs Slurm"),
    "one shard": ([], ["--shard", "0/3"], "--shard is among the flags after --"),
    "one record": ([], ["--only=3"], "--only is among the flags after --"),
    "a flag that is none": ([], ["--stepz", "3"], "--stepz"),
    "another seed": ([], ["--seed", "-1"], "--seed is -1"),
    "no such fold": ([], ["--folds", "11"], "folds 1-10"),
    "a folder with a percent": ([], ["--out", "a%j"], "--out is 'a%j'"),
    "no such YAML": (["--yaml=absent.yaml"], [], "absent.yaml"),
    "no Slurm": ([], [], "the jobs were not submitted"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    options, more, said = MISTAKES[case]
    assert launch.main([*options, "--", *flags, *more]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert said in err[-1]
    assert not list(tmp_path.rglob("*.hea"))


def test_a_root_of_another_request_is_refused_before_anything_is_submitted(
    flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--cluster=debug", "--", *flags]) == 0
    assert launch.main(["--cluster=local", "--", *flags, "--seed=7"]) == 2
    assert "was begun with seed 0 (now 7)" in capfd.readouterr().err


def slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str = "", size: int = 1001
) -> Path:
    """Put stand-ins for Slurm's commands on the path; sbatch keeps its scripts in `folder`."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    (folder / "squeue").write_text(squeue)
    for name, body in {
        "sbatch": f'n=$(ls "{folder}" | grep -c script); cp "$1" "{folder}/script$n"; '
        "echo Submitted batch job $((n + 7))",
        "srun": "true",
        "squeue": f'cat "{folder}/squeue"',
        "scontrol": f"echo 'MaxArraySize            = {size}'",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return folder


def test_slurm_gets_arrays_of_the_yamls_resources(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path, monkeypatch, size=2)
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "nodes: 8\npartition: gpu\ngpus_per_node: 4\nmemory: 64G\nsetup: [export A=1]\n"
        "options: {qos: long}\n"
    )
    args = ["--yaml", str(yaml), "--shards=5", "--parallel=2", "--time=0:30:00", "--detach"]
    assert launch.main([*args, "--partition=short", "--", *flags]) == 0
    scripts = [(tmp_path / f"script{n}").read_text() for n in range(3)]
    for script in scripts:
        assert {
            "#SBATCH --nodes=1",
            "#SBATCH --ntasks-per-node=1",
            "#SBATCH --gpus-per-node=1",
            "#SBATCH --partition=short",
            "#SBATCH --mem=64G",
            "#SBATCH --time=30",
            "#SBATCH --signal=USR2@120",
            "#SBATCH --requeue",
            "#SBATCH --qos=long",
        } <= set(script.splitlines())
        assert "setup 'export A=1'" in script
    assert "#SBATCH --array=0-1%2" in scripts[0]
    assert "dependency" not in scripts[0]
    assert "#SBATCH --dependency=afterany:7" in scripts[1]
    assert "#SBATCH --dependency=afterany:8" in scripts[2]
    assert "--array" not in scripts[2]
    told = json.loads((tmp_path / "out/.submitit/jobs.json").read_text())
    assert told == {"7_0": [0, 5], "7_1": [1, 5], "8_0": [2, 5], "8_1": [3, 5], "9": [4, 5]}


def test_arrays_that_are_refused_midway_leave_none(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = slurm(tmp_path, monkeypatch, size=2)
    sbatch = (folder / "bin" / "sbatch").read_text()
    limit = f'[ -e "{folder}/script0" ] && {{ echo "AssocMaxSubmitJobLimit" >&2; exit 1; }}\n'
    (folder / "bin" / "sbatch").write_text(sbatch.replace("n=$(", limit + "n=$(", 1))
    (folder / "bin" / "scancel").write_text(f'#!/bin/bash\necho "$@" >"{folder}/cancelled"\n')
    (folder / "bin" / "scancel").chmod(0o755)
    assert launch.main(["--shards=5", "--detach", "--", *flags]) == 2
    assert "AssocMaxSubmitJobLimit" in capsys.readouterr().err
    assert (folder / "cancelled").read_text() == "7\n"
    assert not (tmp_path / "out/.submitit/jobs.json").exists()


def test_jobs_in_the_queue_are_watched_and_not_submitted_again(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = slurm(tmp_path, monkeypatch)
    args = ["--shards=3", "--detach", "--", *flags]
    assert launch.main(args) == 0
    (folder / "squeue").write_text("7_0 RUNNING\n7_1 PENDING\n7_2 FAILED\n")
    assert launch.main(args) == 0
    assert "1 shard(s) submitted" in capsys.readouterr().out
    told = json.loads((tmp_path / "out/.submitit/jobs.json").read_text())
    assert told == {"7_0": [0, 3], "7_1": [1, 3], "8": [2, 3]}
    assert launch.main(["--shards=2", "--detach", "--", *flags]) == 2
    said = "2 jobs of 3 shards are in the queue, the first 7_0; give --shards 3, or scancel"
    assert said in capsys.readouterr().err
    (folder / "bin" / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert launch.main(args) == 2
    assert "squeue does not answer" in capsys.readouterr().err


def test_the_queue_is_believed_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, str] | None] = [
        {"7_0": "RUNNING", "7_1": "COMPLETED"},
        None,
        {"7_0": "COMPLETING"},
        {"7_0": "REQUEUED"},
        {},
        {},
    ]
    monkeypatch.setattr(clusters, "queue", lambda: answers.pop(0))
    cluster = clusters.Slurm(Cluster(), Path(), None)
    names = ["7_0", "7_1"]
    assert cluster.ended(names) == {"7_1": "COMPLETED"}
    assert cluster.ended(["7_0"]) == {}
    assert cluster.ended(["7_0"]) == {}
    assert cluster.ended(["7_0"]) == {}
    assert cluster.ended(["7_0"]) == {}
    assert cluster.ended(["7_0"]) == {"7_0": "gone"}


def test_a_job_that_slurm_holds_after_a_failed_launch_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = "7_0 RUNNING None\n7_1 PENDING launch failed requeued held\n7_2 PENDING Resources\n"
    slurm(tmp_path, monkeypatch, held)
    (tmp_path / "bin" / "scancel").write_text(f'#!/bin/bash\necho "$@" > "{tmp_path}/cancelled"\n')
    (tmp_path / "bin" / "scancel").chmod(0o755)
    assert clusters.queue() == {"7_0": "RUNNING", "7_1": clusters.HELD, "7_2": "PENDING"}
    cluster = clusters.Slurm(Cluster(), Path(), None)
    assert cluster.ended(["7_0", "7_1", "7_2"]) == {"7_1": clusters.HELD}
    assert (tmp_path / "cancelled").read_text() == "7_1\n"
    watch = launch.Launch(cluster, tmp_path, 3, retries=2)
    assert watch._judge("7_1", launch.Shard((), 1, 3, ""), clusters.HELD)


def test_a_cancelled_shard_is_not_started_again(tmp_path: Path) -> None:
    watch = launch.Launch(clusters.Slurm(Cluster(), tmp_path, None), tmp_path, 2, retries=2)
    shard = launch.Shard((), 1, 2, "")
    folder = tmp_path / ".submitit"
    folder.mkdir()
    (folder / "7_1_end.json").write_text('{"code": 75}')
    assert not watch._judge("7_1", shard, "CANCELLED")
    assert watch.code == 1
    assert "exit code 75, cancelled, after 1 attempt(s)" in watch.failed[1]
    assert watch._judge("8", shard, "NODE_FAIL")
    assert not watch._judge("9", shard, "NODE_FAIL")


def test_being_preempted_again_and_again_without_a_record_counts(tmp_path: Path) -> None:
    watch = launch.Launch(clusters.Slurm(Cluster(), tmp_path, None), tmp_path, 2, retries=0)
    shard = launch.Shard((), 1, 2, "")
    (tmp_path / ".submitit").mkdir()
    for done in range(30):
        with Beat(tmp_path, 1, 2, total=30, done=done):
            pass
        assert watch._judge("7_1", shard, "PREEMPTED")
    for _ in range(launch.IDLE_STOPS - 1):
        assert watch._judge("7_1", shard, "PREEMPTED")
    assert not watch._judge("7_1", shard, "PREEMPTED")
    assert "preempted, after 1 attempt(s)" in watch.failed[1]


def test_room_is_what_parallel_leaves() -> None:
    assert clusters.Slurm(Cluster(), Path(), None).room(5) > 1e9
    cluster = clusters.Slurm(Cluster(), Path(), 4)
    assert cluster.room(0) > 1e9
    assert (cluster.room(3), cluster.room(9)) == (1, 0)


def test_a_shard_leaves_slurm_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sssd_hpc import cli

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name, value in {"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(cli, "main", lambda args: 75)
    shard = launch.Shard(("--run", "r"), 1, 2, str(tmp_path))
    with pytest.raises(SystemExit) as left:
        shard()
    assert left.value.code == 75
    assert launch.read_code(tmp_path / "7_1_end.json") == 75
    assert shard.checkpoint().function == shard


def test_flags_are_those_of_the_command() -> None:
    values = launch.sample_flags(["--run", "r", "--like", "s", "--out", "o", "--seed", "3"])
    assert (values["run"], values["out"], values["seed"]) == (Path("r"), Path("o"), 3)
    assert not {"shard", "only"} & values.keys()
    with pytest.raises(UserError, match="--like"):
        launch.sample_flags(["--run", "r", "--out", "o"])
    assert jobs.folder_of(["--out=o"], "--out") == Path("o")


def test_shards_get_one_batch_size(
    work: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid = flags[: flags.index("--batch-size")]
    on_gpus = tmp_path / "gpus.yaml"
    on_gpus.write_text((ROOT / "slurm" / "cluster.yaml").read_text())
    assert launch.main(["--yaml", str(on_gpus), "--gpus", "1", "--", *unsaid]) == 2
    assert "--batch-size is missing" in capsys.readouterr().err
    assert launch.main(["--cluster", "debug", "--gpus", "0", "--shards", "2", "--", *unsaid]) == 0
    held = json.loads((tmp_path / "out" / ".generation.json").read_text())
    assert held["batch_size"] == 16
