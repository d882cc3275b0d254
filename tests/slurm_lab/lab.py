"""A real Slurm cluster of several nodes on one machine.

The lab is one tree of processes: the controller's machine is a set of namespaces (network, mounts,
hostname, IPC, processes) and the nodes are such sets inside it, joined by a bridge, with no way
out. Nothing of it has a name outside: two labs cannot meet, and when the outermost process is
killed the kernel takes every process, mount and network device with it.

All machines see the real file system; private to the lab are /run, /etc/hosts and /etc/slurm, and
to a node its hostname, address, process ids and /dev/shm. This file knows nothing of pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from tests.slurm_lab.machines import CONTROLLER, DATABASE, NODE, hosts
from tests.slurm_lab.settings import PARTITIONS, write_settings

T = TypeVar("T")
ENDED = {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


class LabError(RuntimeError):
    """The lab, or a job in it, did not do what was asked."""


def poll(what: str, seconds: float, probe: Callable[[], T | None]) -> T:
    """Ask until the answer is true and return it.

    Raises: LabError when that takes longer than `seconds`.
    """
    end = time.monotonic() + seconds
    while not (answer := probe()):
        if time.monotonic() > end:
            raise LabError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)
    return answer


class Lab:
    """A cluster in `folder`; as a context manager it is up inside the `with`.

    `folder` holds its configuration and log/; everything else vanishes when the lab stops.
    Partition `main` is preempted, requeued, by partition `high`.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 2, accounting: bool = False):
        self.folder = folder.absolute()
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.cpus = cpus
        self.accounting = accounting
        self.settings: dict[str, str | None] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        try:
            self.start(die_with_parent=True)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Up and down

    def start(self, die_with_parent: bool = False) -> None:
        """Bring the cluster up: every node idle. `die_with_parent`: the caller's end is its end."""
        if self.pid():
            raise LabError(f"a lab is running in {self.folder}")
        shutil.rmtree(self.folder / "log", ignore_errors=True)
        for name in ("etc", "log", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(hosts(self.nodes))
        for i in range(2):
            # Slurm binds only a device; the null device, as no program here opens it.
            if not (gpu := self.folder / "dev" / f"nvidia{i}").exists():
                os.mknod(gpu, 0o020666, os.makedev(1, 3))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        self._write_configuration()
        self._boot(die_with_parent)
        self.run(
            "munged", "--force", f"--key-file={key}", f"--log-file={key.parent}/log/munged.log"
        )
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for node in self.nodes:
            self._start_node(node)
        self.wait_idle()

    def stop(self) -> None:
        """Take the cluster away, whatever state it is in; twice does no harm."""
        if pid := self.pid():
            # The first process inside takes all others along; the one outside waits for that.
            with suppress(OSError):
                inside = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                os.kill(int(inside[0]) if inside else pid, signal.SIGKILL)
            poll("the lab's end", 10, lambda: not self.pid())
        if self._process:
            self._process.wait()
        (self.folder / "pid").unlink(missing_ok=True)

    def pid(self) -> int | None:
        """The outermost process of a running lab, else None."""
        try:
            pid = int((self.folder / "pid").read_text())
            # A number can be another process's by now; a zombie's command line is empty.
            ours = os.fsencode(self.folder) in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if ours else None

    def _boot(self, die_with_parent: bool) -> None:
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--mount-proc"]
        script = ["bash", "-c", CONTROLLER, "slurm-lab", str(self.folder), str(len(self.nodes))]
        command = ["unshare", *namespaces, "--fork", "--kill-child=KILL", *script]
        with (self.folder / "log" / "boot.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command] if die_with_parent else command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        (self.folder / "pid").write_text(str(self._process.pid))
        assert self._process.stdout
        with self._process.stdout as pipe:
            if pipe.readline() != b"ready\n":
                raise LabError(f"the lab did not boot: {self.log('boot')}")

    def _write_configuration(self) -> None:
        write_settings(self.folder, len(self.nodes), self.cpus, self.accounting, self.settings)

    def _start_accounting(self) -> None:
        self._detached(DATABASE, "mariadb")
        ping = ["mariadb-admin", "--socket=/run/mysqld/mysqld.sock", "ping"]
        poll("mariadb answers", 60, lambda: not self.run(*ping, check=False).returncode)
        self.run("slurmdbd")
        # The first call answers when slurmdbd has built its tables.
        add = ["sacctmgr", "--immediate", "add", "cluster", "lab"]
        poll("slurmdbd answers", 60, lambda: not self.run(*add, check=False).returncode)

    def _detached(self, script: str, log: str, *arguments: str) -> None:
        out = self.folder / "log" / f"{log}.out"
        wrapped = f'log=$1; shift; (exec </dev/null >"$log" 2>&1; {script}) &'
        self.run("bash", "-c", wrapped, "slurm-lab", str(out), *arguments)

    # Faults

    def power_off(self, node: str) -> None:
        """Cut a node's current: its processes are gone and nobody is told."""
        self.cut_link(node)
        inside = 'pid=$(cat "/run/$1.pid"); cat "/proc/$pid/task/$pid/children"'
        self.run("bash", "-c", f"kill -9 $({inside})", "slurm-lab", node)
        poll(f"{node} is off", 10, lambda: not self.is_on(node))

    def power_on(self, node: str) -> None:
        """Start a node that is off, so that its slurmd listens."""
        self.heal_link(node)
        self._start_node(node)
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{node}/6818"]
        poll(f"{node} is on", 20, lambda: not self.run(*probe, check=False).returncode)

    def is_on(self, node: str) -> bool:
        return self._node_pid(node) is not None

    def _start_node(self, node: str) -> None:
        unshare = "unshare --mount --uts --ipc --pid --mount-proc --fork --kill-child=KILL"
        start = f'exec nsenter --net="/run/netns/$1" {unshare} bash -c "$2" "$1" "$1"'
        script = f'echo "$BASHPID" >"/run/$1.pid"; {start}'
        self._detached(script, node, node, NODE)

    def _node_pid(self, node: str) -> str | None:
        """The node's outermost process, as the controller's machine counts."""
        root = Path(f"/proc/{self.pid()}/root")
        try:
            pid = (root / "run" / f"{node}.pid").read_text().strip()
            alive = (root / "proc" / pid / "cmdline").read_bytes()  # Empty where it is a zombie.
        except OSError:
            return None
        return pid if alive else None

    def cut_link(self, node: str) -> None:
        """Pull a node's cable: its processes go on and nobody hears them."""
        self.run("ip", "link", "set", f"v{node[4:]}", "down")

    def heal_link(self, node: str) -> None:
        self.run("ip", "link", "set", f"v{node[4:]}", "up")

    def kill_controller(self) -> None:
        """Kill slurmctld once it has saved what runs: it does so within five seconds.

        Nothing starts meanwhile: a job that it forgot would be started again beside itself, which
        drains the node ("Duplicate jobid") and holds the job.
        """
        self._open_partitions("DOWN")
        starts = self.run("squeue", "-h", "-t", "running", "-o", "%S").stdout.split()
        newest = max((datetime.fromisoformat(start).timestamp() for start in starts), default=0)
        saved = Path(f"/proc/{self.pid()}/root/run/slurmctld/job_state")

        def is_saved() -> bool:
            return time.time() > newest + 6 or (
                saved.exists() and saved.stat().st_mtime > newest + 1
            )

        poll("slurmctld saves its jobs", 10, is_saved)
        self.run("bash", "-c", 'kill -9 "$(cat /run/slurmctld.pid)"')

    def start_controller(self) -> None:
        """Start slurmctld; it finds its jobs again in what it saved."""
        self.run("slurmctld")
        poll("slurmctld answers", 30, self._controller_answers)
        self._open_partitions("UP")

    def _open_partitions(self, state: str) -> None:
        for partition in PARTITIONS:
            self.run("scontrol", "update", f"PartitionName={partition}", f"State={state}")

    def _controller_answers(self) -> bool:
        return "is UP" in self.run("scontrol", "ping", check=False).stdout

    def configure(self, **settings: str | None) -> None:
        """Change slurm.conf of the running cluster; None takes a line out."""
        self.settings.update(settings)
        self._write_configuration()
        self.run("scontrol", "reconfigure")

    def restore(self) -> None:
        """Make it as it was after `start`: no jobs, every node idle, the first configuration."""
        if not self._controller_answers():
            self.start_controller()
        self.settings.clear()
        self.configure()
        self.run("scancel", "--user=root")
        for node, state in self.node_states().items():
            self.heal_link(node)
            well = state in ("idle", "alloc", "mix", "comp")
            if self.is_on(node) and well:
                continue
            # A slurmd that starts says so at once; one that was cut off is asked much later.
            if self.is_on(node):
                self.power_off(node)
            self.power_on(node)
            if not well:
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        poll("the queue is empty", 30, lambda: not self.run("squeue", "--noheader").stdout)
        self.wait_idle()

    # Work

    def run(
        self,
        *command: str,
        node: str = "",
        cwd: Path | None = None,
        stdin: str = "",
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller's machine, or on a node's, and return what it printed.

        `python` is the caller's. After `timeout` seconds it is killed: return code -9.
        Raises: LabError where `check` and it fails.
        """
        # The time is kept inside: killing nsenter would leave the command behind.
        result = subprocess.run(
            [*self.entrance(node, cwd), "timeout", "--signal=KILL", str(timeout), *command],
            env=environment(),
            input=stdin,
            capture_output=True,
            text=True,
        )
        if check and result.returncode:
            told = (result.stderr + result.stdout).strip()
            raise LabError(f"exit code {result.returncode} of {' '.join(command)}: {told}")
        return result

    def entrance(self, node: str = "", cwd: Path | None = None) -> list[str]:
        """The words to put before a command that shall run on a machine of the lab."""
        pids = [self.pid(), *([self._node_pid(node)] if node else [])]
        if None in pids:
            raise LabError(f"{node if pids[0] else 'the lab'} is off")
        enter = []
        for pid in pids:
            # The process itself is one that made its namespaces: it lives above its own pid one.
            processes = f"--pid=/proc/{pid}/ns/pid_for_children"
            enter += ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", processes]
        return [*enter, "env", f"--chdir={cwd or Path.cwd()}"]

    def sbatch(self, *arguments: str | Path, script: str = "", cwd: Path | None = None) -> str:
        """Submit and return the job's id; `script`: the text of one that is no file."""
        words = map(str, arguments)
        return self.run("sbatch", "--parsable", *words, cwd=cwd, stdin=script).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Reason, NodeList, Restarts, StdOut, .."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)", text.splitlines()[0]))

    def output(self, job: str) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def attempts(self, job: str) -> list[str]:
        """The states in which a job's attempts ended, from the completion log."""
        path = self.folder / "log" / "jobcomp.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return re.findall(rf"^JobId={job} .*?JobState=(\S+)", "\n".join(lines), re.MULTILINE)

    def wait(self, job: str, states: str | Collection[str], timeout: float) -> dict[str, str]:
        """Wait until a job is in one of `states` and return what `job` says then.

        Slurm holds a requeued job for two minutes (Reason=BeginTime), here for two seconds.
        Raises: LabError when `timeout` seconds pass or the job ends in another state.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        found: Mapping[str, str] = {}

        def probe() -> dict[str, str] | None:
            nonlocal found
            try:
                found = self.job(job)
            except LabError:
                return None  # The controller is away.
            if found["JobState"] in wanted:
                return dict(found)
            if found["JobState"] in ENDED:
                raise LabError(f"job {job} ended")
            held = found["JobState"] == "PENDING" and found["Reason"] == "BeginTime"
            if held and found["StartTime"] != "Unknown":
                start = datetime.fromisoformat(found["StartTime"])
                if start.timestamp() > time.time() + 5:
                    self.start_now(job)
            return None

        try:
            return poll(f"job {job} {' or '.join(sorted(wanted))}", timeout, probe)
        except LabError as error:
            raise LabError(f"{error}\n{self._obituary(job, found)}") from None

    def start_now(self, job: str) -> None:
        """End the two minutes for which a requeued job is held.

        Within the second of the requeue a node would still refuse it: "Job credential revoked".
        """
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)

    def node_states(self) -> dict[str, str]:
        """Each node's state as sinfo shortens it; a `*` says that it does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False).stdout
        return dict(line.split() for line in lines.splitlines())

    def wait_idle(self, timeout: float = 60) -> None:
        idle = dict.fromkeys(self.nodes, "idle")
        try:
            poll("every node idle", timeout, lambda: self.node_states() == idle)
        except LabError as error:
            raise LabError(f"{error}; {self.node_states()}") from None

    def log(self, name: str, lines: int = 20) -> str:
        """The last lines of one log: slurmctld, node1, boot, .."""
        path = self.folder / "log" / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])

    def _obituary(self, job: str, found: Mapping[str, str]) -> str:
        shown = " ".join(f"{k}={found.get(k)}" for k in ("JobState", "Reason", "NodeList"))
        try:
            tail = "\n".join(self.output(job).splitlines()[-20:])
        except LabError:
            tail = ""
        return f"job {job}: {shown} {self.node_states()}\n{tail}\n{self.log('slurmctld')}"


def environment() -> dict[str, str]:
    """This process's environment without a job's own, with its Python in front."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SALLOC"))}
    return {**outer, "PATH": f"{Path(sys.executable).parent}:{outer.get('PATH', os.defpath)}"}
