"""The lab itself: a cluster, its faults, and that nothing of it stays."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm_lab import packages
from tests.slurm_lab.lab import Lab, LabError, poll

ROOT = Path(__file__).parents[2]

# The first attempt waits for a fault, the second ends.
TWO_ATTEMPTS = """#!/bin/bash
echo "attempt ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || sleep 300
"""

# Each rank says which signals it gets.
LISTENERS = """#!/bin/bash
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit
srun bash -c 'for s in USR1 TERM; do trap "echo $s" $s; done; echo on; while :; do sleep 0.1; done'
"""


def submit(lab: Lab, folder: Path, script: str, *options: str) -> str:
    append = "--open-mode=append"
    return lab.sbatch(f"--output={folder}/%j.out", append, *options, script=script)


def ended(lab: Lab, job: str) -> list[str]:
    """Both attempts' states; the log can be a moment behind the queue."""
    poll("two attempts are logged", 10, lambda: len(lab.attempts(job)) == 2)
    return lab.attempts(job)


def test_every_node_is_a_machine_of_its_own(lab: Lab) -> None:
    assert lab.node_states() == {f"node{i}": "idle" for i in (1, 2, 3, 4)}
    told = lab.run("srun", "-N2", "-l", "bash", "-c", "hostname; hostname -i; ps ax | wc -l")
    lines = sorted(told.stdout.splitlines())
    assert [line for line in lines if "node" in line] == ["0: node1", "1: node2"]
    assert [line for line in lines if ".77." in line] == ["0: 10.77.0.11", "1: 10.77.0.12"]
    assert all(int(line.split()[1]) < 12 for line in lines if line.split()[1].isdigit())


def test_nodes_reach_each_other_and_nothing_else(lab: Lab) -> None:
    def reaches(address: str) -> bool:
        probe = f"exec 3<>/dev/tcp/{address}/6818"
        return not lab.run("bash", "-c", probe, node="node1", check=False, timeout=1).returncode

    assert reaches("node2")
    assert not reaches("192.0.2.1")
    assert lab.run("ip", "route", node="node1").stdout.split()[0] == "10.77.0.0/24"
    lab.cut_link("node2")
    assert not reaches("node2")


def test_a_job_sees_the_callers_python_and_no_outer_job(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "7")
    told = lab.run("srun", "bash", "-c", "command -v python; echo $SLURM_PROCID").stdout.split()
    assert told == [str(Path(sys.executable).with_name("python")), "0"]


def test_a_job_moves_on_when_its_node_loses_power(lab: Lab, tmp_path: Path) -> None:
    job = submit(lab, tmp_path, TWO_ATTEMPTS)
    first = lab.wait(job, "RUNNING", 20)["NodeList"]
    lab.power_off(first)
    assert not lab.is_on(first)
    second = lab.wait(job, "COMPLETED", 60)["NodeList"]
    assert second != first
    assert ended(lab, job) == ["NODE_FAIL", "COMPLETED"]
    assert lab.output(job) == f"attempt 0 on {first}\nattempt 1 on {second}\n"


def test_a_job_moves_on_when_its_nodes_link_is_cut(lab: Lab, tmp_path: Path) -> None:
    job = submit(lab, tmp_path, TWO_ATTEMPTS)
    first = lab.wait(job, "RUNNING", 20)["NodeList"]
    lab.cut_link(first)
    assert lab.wait(job, "COMPLETED", 60)["NodeList"] != first
    # Nobody could tell the node: the first attempt still runs there.
    assert "sleep 300" in lab.run("ps", "ax", node=first).stdout


def test_a_job_outlives_the_controller(lab: Lab, tmp_path: Path) -> None:
    job = submit(lab, tmp_path, "#!/bin/bash\nsleep 7; echo done\n")
    lab.wait(job, "RUNNING", 20)
    lab.kill_controller()
    assert "is DOWN" in lab.run("scontrol", "ping", check=False).stdout
    lab.start_controller()
    assert lab.wait(job, "COMPLETED", 30)["Restarts"] == "0"
    assert lab.output(job) == "done\n"


@pytest.mark.parametrize("user_signal", [True, False], ids=["user signal", "TERM alone"])
def test_a_higher_partition_takes_the_nodes(lab: Lab, tmp_path: Path, user_signal: bool) -> None:
    if not user_signal:
        lab.configure(SlurmctldParameters=None)
    lab.run("scontrol", "update", "PartitionName=main", "GraceTime=2")
    low = submit(lab, tmp_path, LISTENERS, "--nodes=4", "--exclusive", "--signal=USR1@60")
    lab.wait(low, "RUNNING", 20)
    poll("the ranks listen", 20, lambda: lab.output(low).count("on\n") == 4)
    high = submit(lab, tmp_path, "#!/bin/bash\n", "--nodes=4", "--exclusive", "--partition=high")
    lab.wait(high, "COMPLETED", 40)
    lab.wait(low, "COMPLETED", 20)
    assert ended(lab, low) == ["PREEMPTED", "COMPLETED"]
    heard = [line for line in lab.output(low).splitlines() if line in ("USR1", "TERM")]
    assert heard.count("USR1") == (4 if user_signal else 0)
    assert heard[0] == ("USR1" if user_signal else "TERM")


def test_restore_mends_everything(lab: Lab) -> None:
    lab.sbatch("--nodes=2", "--output=/dev/null", "--wrap=sleep 300")
    lab.run("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    lab.power_off("node2")
    lab.cut_link("node3")
    lab.configure(KillWait="9")
    lab.kill_controller()
    lab.restore()
    assert set(lab.node_states().values()) == {"idle"}
    assert lab.run("srun", "-N4", "-l", "hostname").stdout.count("node") == 4
    assert "KillWait                = 3 sec" in lab.run("scontrol", "show", "config").stdout


def test_a_wait_says_why_it_ended(lab: Lab, tmp_path: Path) -> None:
    job = submit(lab, tmp_path, "#!/bin/bash\necho the reason\nexit 3\n")
    with pytest.raises(LabError, match=r"(?s)JobState=FAILED.*the reason"):
        lab.wait(job, "COMPLETED", 20)
    job = submit(lab, tmp_path, "#!/bin/bash\nsleep 300\n")
    with pytest.raises(LabError, match=r"not within 1 s: job \d+ COMPLETED"):
        lab.wait(job, "COMPLETED", 1)


def test_a_hanging_command_is_killed(lab: Lab) -> None:
    assert lab.run("sleep", "300", check=False, timeout=0.5).returncode == -signal.SIGKILL
    assert "sleep 300" not in lab.run("ps", "ax").stdout


def test_accounting_answers_sacct(accounting_lab: Lab, tmp_path: Path) -> None:
    job = submit(accounting_lab, tmp_path, "#!/bin/bash\nexit 3\n")
    accounting_lab.wait(job, "FAILED", 20)
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=state,exitcode"]

    def told() -> bool:
        return accounting_lab.run(*sacct, "--jobs", job).stdout == "FAILED|3:0\n"

    poll("sacct tells the job's end", 20, told)


def namespaces(pid: str) -> set[str]:
    kinds = ("mnt", "uts", "ipc", "net", "pid_for_children")
    try:
        return {str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in kinds}
    except OSError:
        return set()


def processes() -> list[str]:
    return [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]


def links_here() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def live_in(spaces: set[str]) -> list[str]:
    return [pid for pid in processes() if namespaces(pid) & spaces]


def test_nothing_of_a_lab_stays(start_lab: Callable[..., Lab]) -> None:
    mounts, links = Path("/proc/self/mountinfo").read_text(), links_here()
    lab = start_lab()
    lab.wait(lab.sbatch("--nodes=2", "--output=/dev/null", "--wrap=srun sleep 300"), "RUNNING", 20)
    spaces = namespaces(str(lab.pid())) - namespaces("self")
    for node in lab.nodes:
        inside = lab.run("bash", "-c", "readlink /proc/self/ns/*", node=node).stdout.split()
        spaces |= {space for space in inside if not space.startswith(("user", "cgroup", "time"))}
    assert len(spaces - namespaces("self")) == 25
    assert len(live_in(spaces)) > 16
    lab.stop()
    assert live_in(spaces) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert links_here() == links
    lab.stop()
    assert lab.pid() is None
    with pytest.raises(LabError, match="the lab is off"):
        lab.run("true")


@pytest.mark.usefixtures("lab")
def test_a_lab_ends_with_its_parent(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from tests.slurm_lab.lab import Lab
with Lab(Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(300)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "up\n"
        spaces = namespaces(str(Lab(tmp_path).pid())) - namespaces("self")
        before = live_in(spaces)
        parent.send_signal(signal.SIGKILL)
    assert len(before) > 3
    poll("the lab is gone", 10, lambda: not live_in(spaces))


def test_two_labs_do_not_meet(lab: Lab, start_lab: Callable[..., Lab], tmp_path: Path) -> None:
    other = start_lab()
    job = submit(lab, tmp_path, "#!/bin/bash\nsleep 300\n", "--nodes=4", "--exclusive")
    lab.wait(job, "RUNNING", 20)
    assert set(other.node_states().values()) == {"idle"}
    assert other.run("srun", "-N4", "-l", "hostname").stdout.count("node") == 4
    other.power_off("node1")
    assert lab.is_on("node1")
    other.stop()
    assert lab.job(job)["JobState"] == "RUNNING"


@pytest.mark.usefixtures("lab")
def test_by_hand(tmp_path: Path) -> None:
    def by_hand(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.slurm_lab", "--folder", str(tmp_path / "lab")]
        return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)

    try:
        assert "exec sinfo" in by_hand("start").stdout
        assert "already" in by_hand("start").stderr
        assert by_hand("exec", "--on", "node2", "hostname").stdout == "node2\n"
        assert by_hand("power-off", "node2").returncode == 0
        assert by_hand("exec", "--on", "node2", "true").stderr == "error: node2 is off\n"
        assert by_hand("restore").returncode == 0
        assert by_hand("exec", "srun", "--nodelist=node2", "hostname").stdout == "node2\n"
    finally:
        assert by_hand("stop").returncode == 0
    assert not (tmp_path / "lab").exists()
    assert by_hand("stop").returncode == 0
    assert by_hand("exec", "true").stderr == "error: the lab is off\n"


def test_a_missing_package_is_a_skip_and_in_ci_a_failure(
    start_lab: Callable[..., Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not installed: slurmctld slurmd"):
        start_lab()
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match=r"slurmdbd mariadb-server; `make"):
        start_lab(accounting=True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.fail.Exception, match="needs root"):
        start_lab()


@pytest.mark.parametrize("code", [0, 100])
def test_packages_are_installed_without_starting_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    policy, seen = tmp_path / "policy-rc.d", tmp_path / "seen"
    apt = tmp_path / "apt-get"
    bash = shutil.which("bash")
    apt.write_text(f'#!{bash}\necho "$@" >>{seen}\n{policy}; echo $? >>{seen}\nexit {code}\n')
    apt.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    packages.install(policy)
    lines = seen.read_text().splitlines()
    assert lines[:2] == ["-qq update", "101"]
    assert ("apt-get update failed" in capfd.readouterr().out) == bool(code)
    if not code:
        assert lines[2].endswith(
            "slurmctld slurmd slurm-client munge iproute2 slurmdbd mariadb-server"
        )
    assert not policy.exists()
