"""The batch script: held to its YAML, closed to injection, and every bad value said in one line."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slurm import render
from slurm.render import Cluster, directive, from_mapping
from sssd_hpc.errors import UserError

SLURM = Path(__file__).parents[2] / "slurm"
HOSTILE = {
    "spaces": "a b",
    "single quote": "it's",
    "double quote": 'say "x"',
    "substitution": "$(touch pwned)",
    "backticks": "`touch pwned`",
    "separators": "a;touch pwned|touch pwned&",
    "redirection": "a>pwned",
    "backslash": "a\\",
    "comment": "a # b",
    "option": "--nodes=99",
    "placeholder": "@SETUP@",
    "unicode": "Zürich-\u00e9\u4e2d",
}


@pytest.mark.parametrize("name", render.SCRIPTS)
def test_the_committed_script_is_the_rendering_of_the_committed_yaml(name: str) -> None:
    script = render.SCRIPTS[name](render.read_cluster(SLURM / "cluster.yaml"))
    assert (SLURM / name).read_text() == script


def test_the_yaml_names_every_key_with_its_default() -> None:
    assert render.read_cluster(SLURM / "cluster.yaml") == Cluster()
    text = (SLURM / "cluster.yaml").read_text()
    assert re.findall("^([a-z_]+):", text, flags=re.MULTILINE) == list(Cluster.__dataclass_fields__)


GPU_CLUSTER = {
    "name": "ecg",
    "partition": "gpu",
    "account": "proj-1",
    "nodes": 8,
    "gpus_per_node": 4,
    "cpus_per_task": 16,
    "memory": "480G",
    "time": "1-00:00:00",
    "signal_lead_s": 600,
    "network_interface": "ib0",
    "restarts": 3,
    "min_free_gb": 50,
    "setup": ["module load cuda/12.8", ". venv/bin/activate"],
    "options": {"qos": "long", "exclude": "node[7,9]", "exclusive": "", "output": "logs/%j.out"},
}


def test_a_cluster_of_gpus_golden() -> None:
    golden = Path(__file__).parent / "gpu_cluster.sbatch"
    assert render.render(from_mapping(GPU_CLUSTER)) == golden.read_text()


def test_a_shard_takes_one_gpu_and_is_one_process() -> None:
    lines = render.render_sample(from_mapping(GPU_CLUSTER)).splitlines()
    assert {
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --signal=USR1@600",
        "#SBATCH --output=logs/%j.out",
        "setup 'module load cuda/12.8'",
    } <= set(lines)
    plain = render.render_sample(Cluster()).splitlines()
    assert "#SBATCH --output=slurm-%A_%a.out" in plain
    assert not any("gpus" in line for line in plain)


def environment(folder: Path) -> dict[str, str]:
    """Return a job's environment in which srun, scontrol and squeue note how they were called."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "squeue", "python"):
        tool = tools / name
        tool.write_text(
            "#!/bin/bash\n"
            f"printf '%s\\n' {name} \"$@\" >>'{folder}/called'\n"
            f"env >>'{folder}/environment'\n"
            'case "$*" in *preflight*) exit "${PREFLIGHT:-0}" ;; esac\nexit "${CODE:-0}"\n'
        )
        tool.chmod(0o755)
    return {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "MASTER_ADDR": "left over",
    }


def execute(
    cluster: Cluster,
    folder: Path,
    *args: str,
    rendered: Callable[[Cluster], str] = render.render,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    script = folder / "script"
    script.write_text(rendered(cluster))
    return subprocess.run(
        ["bash", str(script), *args],
        env=environment(folder) | extra,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_no_value_runs_or_adds_a_line(value: str, tmp_path: Path) -> None:
    cluster = from_mapping(
        {
            "name": value,
            "partition": value,
            "account": value,
            "setup": [f"note={_bash_quoted(value)}; export note"],
            "options": {"comment": value},
        }
    )
    plain = render.render(Cluster(name="x", partition="x", account="x"))
    lines = render.render(cluster).splitlines()
    assert len(lines) == len(plain.splitlines()) + 2
    assert execute(cluster, tmp_path, "--run", "run").returncode == 0
    assert f"\nnote={value}\n" in (tmp_path / "environment").read_text()
    assert not (tmp_path / "pwned").exists()


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "15",
    "SLURM_ARRAY_TASK_COUNT": "16",
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_a_shard_is_given_runs(value: str, tmp_path: Path) -> None:
    cluster = from_mapping(
        {"name": value, "setup": [f"note={_bash_quoted(value)}; export note"], "restarts": 4}
    )
    args = ["--run", value, "--like", "s", "--out", value]
    extra = {**ARRAY, "CODE": "75"}
    result = execute(cluster, tmp_path, *args, rendered=render.render_sample, **extra)
    assert result.returncode == 75, result.stderr
    called = (tmp_path / "called").read_text()
    command = ["srun", "python", "-m", "sssd_hpc", "sample", *args, "--shard", "3/16"]
    question = ["python", "-m", "sssd_hpc.train.restart", f"--out={value}", "--shard=3/16"]
    question += ["--exit-code", "75", "--budget", "4"]
    assert called == "\n".join([*command, *question]) + "\n"
    assert f"\nnote={value}\n" in (tmp_path / "environment").read_text()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("array", "args", "said"),
    [
        ({}, ["--out", "o"], "numbered from 0 without a gap: sbatch --array=0-15"),
        ({**ARRAY, "SLURM_ARRAY_TASK_MIN": "1"}, ["--out=o"], "without a gap"),
        ({**ARRAY, "SLURM_ARRAY_TASK_COUNT": "8"}, ["--out=o"], "without a gap"),
        (ARRAY, ["--run", "r"], "--out is missing: sbatch --array=0-15 slurm/sample.sbatch"),
    ],
)
def test_an_array_with_a_gap_or_without_a_folder_is_refused(
    array: dict[str, str], args: list[str], said: str, tmp_path: Path
) -> None:
    result = execute(Cluster(), tmp_path, *args, rendered=render.render_sample, **array)
    assert result.returncode == 2
    assert said in result.stderr
    assert not (tmp_path / "called").exists()


def _bash_quoted(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


# What sbatch 22.05 makes of such a line was seen on a real one (test_train_sbatch.py).
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a-b_c.d", "#SBATCH --x=a-b_c.d"),
        ("a b", '#SBATCH --x="a b"'),
        ('say "x"', '#SBATCH --x="say \\"x\\""'),
        ("a\\", '#SBATCH --x="a\\\\"'),
        ("$(x) `y`", '#SBATCH --x="$(x) `y`"'),
        ("", "#SBATCH --x"),
    ],
)
def test_directives_are_quoted_by_the_rules_of_sbatch(value: str, line: str) -> None:
    assert directive("x", value) == line


@pytest.mark.parametrize("value", [*HOSTILE.values(), "a\nb"], ids=[*HOSTILE, "newline"])
def test_the_arguments_reach_the_ranks_as_they_are(value: str, tmp_path: Path) -> None:
    args = ["--preset", value, "--run", "run", "--data=" + value]
    assert execute(Cluster(), tmp_path, *args).returncode == 0
    called = (tmp_path / "called").read_text()
    assert called.endswith("\n".join(["rank", "python", "-m", "sssd_hpc", "train", *args]) + "\n")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [*HOSTILE.values(), "50%t%"], ids=[*HOSTILE, "percent"])
def test_the_run_folder_is_taken_literally(value: str, tmp_path: Path) -> None:
    result = execute(Cluster(), tmp_path, "--run", "first", f"--run={value}")
    if "\\" in value:
        assert result.returncode == 2
        assert "backslash" in result.stderr
        return
    assert result.returncode == 0
    assert (tmp_path / value / "logs").is_dir()
    escaped = value.replace("%", "%%")
    assert f"\n--output={escaped}/logs/rank-%t.log\n" in (tmp_path / "called").read_text()
    assert not (tmp_path / "pwned").exists()


def test_the_ranks_get_their_environment_and_no_leftover(tmp_path: Path) -> None:
    assert execute(Cluster(network_interface="ib0"), tmp_path, "--run", "run").returncode == 0
    seen = set((tmp_path / "environment").read_text().splitlines())
    wanted = ("GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=3")
    assert {*wanted, "SRUN_CPUS_PER_TASK=3"} <= seen
    assert not any(line.startswith("MASTER_ADDR=") for line in seen)


def test_without_an_interface_none_is_set(tmp_path: Path) -> None:
    assert execute(Cluster(), tmp_path, "--run", "run").returncode == 0
    assert "SOCKET_IFNAME" not in (tmp_path / "environment").read_text()


@pytest.mark.parametrize(
    ("extra", "code", "asks", "trains"),
    [
        ({}, 0, False, True),
        ({"CODE": "75"}, 75, True, True),
        ({"CODE": "137"}, 137, True, True),
        ({"PREFLIGHT": "2"}, 2, True, False),
    ],
    ids=["done", "stopped early", "killed", "preflight"],
)
def test_what_ends_badly_is_put_to_restart(
    extra: dict[str, str], code: int, asks: bool, trains: bool, tmp_path: Path
) -> None:
    result = execute(Cluster(restarts=4), tmp_path, "--run", "run", **extra)
    assert result.returncode == code
    called = (tmp_path / "called").read_text()
    question = f"sssd_hpc.train.restart\n--run=run\n--exit-code\n{code}\n--budget\n4\n"
    assert (question in called) is asks
    assert ("\nsssd_hpc\ntrain\n" in called) is trains


@pytest.mark.parametrize(
    ("flock", "code"),
    [(0, 0), (99, 75), (65, 0)],
    ids=["free", "held", "no locks on this file system"],
)
def test_a_restart_waits_for_who_still_trains_in_the_folder(
    flock: int, code: int, tmp_path: Path
) -> None:
    environment(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    tool = tmp_path / "bin" / "flock"
    tool.write_text(f"#!/bin/bash\nexit {flock}\n")
    tool.chmod(0o755)
    result = execute(Cluster(), tmp_path, "--run", "run", SLURM_RESTART_COUNT="1")
    assert result.returncode == code, result.stderr
    assert ("something still trains in run after 900 s" in result.stdout) is (code == 75)
    assert ("\nsssd_hpc\ntrain\n" in (tmp_path / "called").read_text()) is (code == 0)


def test_the_first_rank_to_end_gives_the_cause(tmp_path: Path) -> None:
    env = environment(tmp_path)
    # Two ranks as srun would end them: the second is killed because of the first.
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do [ $# -gt 0 ] || exit 0; shift; done\n'
        "export SLURMD_NODENAME=node1\n"
        'SLURM_PROCID=1 CODE=2 "$@"; SLURM_PROCID=0 CODE=143 "$@"; exit 143\n'
    )
    script = tmp_path / "script"
    script.write_text(render.render(Cluster()))
    # The second time the first's note lies there.
    for _ in range(2):
        result = subprocess.run(
            ["bash", str(script), "--run", "run"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert "first to end was rank 1 on node1, with exit code 2" in result.stdout
    assert "--exit-code\n2\n" in (tmp_path / "called").read_text()


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("false", "the setup line failed: false"),
        ("echo 'open", "the setup line failed: echo 'open"),
        ("if true; then", "the setup line failed: if true; then"),
    ],
)
def test_a_setup_line_that_fails_stops_the_job_and_is_named(
    setup: str, said: str, tmp_path: Path
) -> None:
    result = execute(Cluster(setup=("export A=1", setup)), tmp_path, "--run", "run")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {said}"
    assert not (tmp_path / "called").exists()


def test_a_job_without_a_run_says_how_to_submit_one(tmp_path: Path) -> None:
    result = execute(Cluster(), tmp_path, "--preset", "tiny")
    assert result.returncode == 2
    assert "--run is missing: sbatch slurm/train.sbatch" in result.stderr


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"partitoin": "x"}, "perhaps you meant partition"),
    "not a name": ({7: "x"}, "7 is not a key"),
    "newline": ({"account": "a\n#SBATCH --nodes=9"}, "account is 'a\\n#SBATCH"),
    "carriage return": ({"partition": "a\rb"}, "printable"),
    "control character": ({"name": "a\x1b[0m"}, "printable"),
    "line separator": ({"name": "a\u2028b"}, "printable"),
    "too long": ({"account": "x" * 1001}, "at most 1000 characters"),
    "no name": ({"name": ""}, "name is ''"),
    "null": ({"partition": None}, "partition is None; it must be text"),
    "a number as text": ({"account": 12}, "account is 12; it must be text; quote it"),
    "no nodes": ({"nodes": 0}, "nodes is 0; it must be in 1 .."),
    "many nodes": ({"nodes": 10**9}, "nodes is 1000000000"),
    "half a node": ({"nodes": 1.5}, "whole number"),
    "nodes as text": ({"nodes": "2"}, "nodes is '2'; it must be a whole number"),
    "yes nodes": ({"nodes": True}, "nodes is True"),
    "negative GPUs": ({"gpus_per_node": -1}, "gpus_per_node is -1"),
    "no CPUs": ({"cpus_per_task": 0}, "cpus_per_task is 0"),
    "memory": ({"memory": "64 GB"}, "memory is '64 GB'"),
    "memory as a number": ({"memory": 64}, "quote it"),
    "unquoted time": ({"time": 3600}, "time is 3600; it must be text; quote it"),
    "time": ({"time": "1h"}, "[DAYS-]HOURS:MINUTES:SECONDS"),
    "time in other digits": ({"time": "\u0661:00:00"}, "[DAYS-]HOURS:MINUTES:SECONDS"),
    "lead beyond the time": ({"time": "0:02:00"}, "signal_lead_s is 120; it must be less than"),
    "no lead": ({"signal_lead_s": 0}, "signal_lead_s is 0"),
    "interface": ({"network_interface": "eth0 $(x)"}, "network_interface is"),
    "restarts": ({"restarts": -1}, "restarts is -1"),
    "disk": ({"min_free_gb": float("nan")}, "min_free_gb is nan"),
    "setup as text": ({"setup": "module load x"}, "a list of shell lines"),
    "setup of numbers": ({"setup": [1]}, "a list of shell lines"),
    "setup of two lines": ({"setup": ["a\nb"]}, "one line"),
    "options as a list": ({"options": ["qos"]}, "a mapping"),
    "option's name": ({"options": {"qos x": "y"}}, "options is 'qos x'"),
    "option's line": ({"options": {"qos": "a\nb"}}, "options.qos is"),
    "option's list": ({"options": {"qos": ["a"]}}, "options.qos is"),
    "option with a key": ({"options": {"mem": "4G"}}, "set memory instead"),
    "option of the script": ({"options": {"array": "0-9"}}, "the script needs its own"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_in_one_line(case: str) -> None:
    tree, said = BAD[case]
    with pytest.raises(UserError) as caught:
        from_mapping(tree)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["nodes: 1\nnodes: 2\n", "- 1\n", "a: [", "a: !!python/object:x {}\n", "time: 1:00:00\n"],
)
def test_a_bad_file_is_one_line_and_leaves_the_script_alone(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mine.yaml", tmp_path / "train.sbatch"
    path.write_text(text)
    out.write_text("before")
    assert render.main([str(path), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}")
    assert err.count("\n") == 1
    assert out.read_text() == "before"


def test_a_yaml_of_ones_own_is_rendered_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("partition: gpu\n")
    assert render.main([str(path), "--out", str(tmp_path)]) == 0
    for name, rendered in render.SCRIPTS.items():
        assert (tmp_path / name).read_text() == rendered(Cluster(partition="gpu"))
