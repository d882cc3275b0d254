"""Render the batch scripts from slurm/cluster.yaml: `python slurm/render.py [YAML] [--out FOLDER]`.

slurm/train.sbatch is one job of many nodes, slurm/sample.sbatch an array of jobs of one process.

A value is data: it reaches Slurm, bash and the job as it stands in the YAML, or is refused. The
exceptions are the lines of `setup`, which are shell code, each on its own.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sssd_hpc import config, files
from sssd_hpc.errors import UserError

HERE = Path(__file__).parent
# sbatch cuts its argument buffer off far beyond this, without a word.
MAX_LENGTH = 1000
OPTION = re.compile("[a-z][a-z0-9-]*")
TIME = re.compile("(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])")
MEMORY = re.compile("[0-9]+[KMGT]?")
INTERFACE = re.compile(r"[A-Za-z0-9^=][A-Za-z0-9_.,:=^@-]*")
# Slurm keeps most of these in 16 bits.
RANGES = {
    "nodes": (1, 65000),
    "gpus_per_node": (0, 1000),
    "cpus_per_task": (1, 65000),
    "signal_lead_s": (1, 65000),
    "restarts": (0, 10000),
    "min_free_gb": (0, 1e6),
}
# Options that the script is built around; most have a key of their own.
OWNED = {
    "job-name": "name",
    "partition": "partition",
    "account": "account",
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
    "time": "time",
    "signal": "signal_lead_s",
    "ntasks": "gpus_per_node",
    "ntasks-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "requeue": "",
    "no-requeue": "",
    "open-mode": "",
    "array": "",
    "wrap": "",
    "parsable": "",
    "test-only": "",
    "wait": "",
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The YAML of a cluster; its comments say what each key means."""

    name: str = "sssd-hpc"
    partition: str = ""
    account: str = ""
    nodes: int = 2
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    memory: str = ""
    time: str = "1:00:00"
    signal_lead_s: int = 120
    network_interface: str = ""
    restarts: int = 10
    min_free_gb: float = 1.0
    setup: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for key, (least, most) in RANGES.items():
            value = getattr(self, key)
            _check(least <= value <= most, key, value, f"in {least} .. {most}")
        _check(self.name != "", "name", self.name, "not empty")
        memory = not self.memory or MEMORY.fullmatch(self.memory)
        _check(memory, "memory", self.memory, "a number with K, M, G or T, as in 64G")
        _check(TIME.fullmatch(self.time), "time", self.time, "[DAYS-]HOURS:MINUTES:SECONDS, quoted")
        in_time = self.signal_lead_s < self.time_s
        _check(in_time, "signal_lead_s", self.signal_lead_s, f"less than time, {self.time}")
        interface = not self.network_interface or INTERFACE.fullmatch(self.network_interface)
        _check(interface, "network_interface", self.network_interface, "a name such as eth0")
        for key in ("name", "partition", "account"):
            _check_text(key, getattr(self, key))
        for line in self.setup:
            _check_text("setup", line)
        for option, value in self.options:
            self._check_option(option, value)

    def _check_option(self, option: str, value: str) -> None:
        where = f"options.{option}"
        _check(OPTION.fullmatch(option), "options", option, "a long option of sbatch, as in qos")
        _check_text(where, value)
        if option in OWNED:
            key = OWNED[option]
            instead = f"set {key} instead" if key else "the script needs its own"
            raise UserError(f"{where} is given, which the script decides: {instead}")

    @property
    def tasks_per_node(self) -> int:
        """One task a GPU, or one on the CPUs of a node without."""
        return max(1, self.gpus_per_node)

    @property
    def time_s(self) -> int:
        """The time limit in seconds."""
        match = TIME.fullmatch(self.time)
        assert match
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def read_cluster(path: Path) -> Cluster:
    """Read a cluster's YAML.

    Raises:
        UserError: no plain YAML, an unknown key, a value that Slurm cannot hold; names the key.
    """
    tree = config.read_yaml(path)
    try:
        return from_mapping(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_mapping(tree: Mapping[str, Any]) -> Cluster:
    """Return the cluster that a YAML mapping describes; absent keys take their defaults.

    Raises:
        UserError: an unknown key, or a value of another type.
    """
    kinds = {field.name: field.type for field in fields(Cluster)}
    given: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, 1)
            hint = f"; perhaps you meant {close[0]}" if close else ""
            raise UserError(f"{key!r} is not a key; keys are {', '.join(kinds)}{hint}")
        given[key] = _typed(key, kinds[key], value)
    return Cluster(**given)


def _typed(key: str, kind: object, value: Any) -> Any:
    if kind == "str":
        _check(isinstance(value, str), key, value, "text; quote it, or give 0 as '0'")
        return value
    if kind in ("int", "float"):
        numbers = (int,) if kind == "int" else (int, float)
        number = isinstance(value, numbers) and not isinstance(value, bool)
        _check(number, key, value, "a whole number" if kind == "int" else "a number")
        return value
    if key == "setup":
        lines = isinstance(value, list) and all(isinstance(line, str) for line in value)
        _check(lines, key, value, "a list of shell lines")
        return tuple(value)
    _check(isinstance(value, dict), key, value, "a mapping of sbatch's options")
    for option, setting in value.items():
        plain = isinstance(setting, str | int) and not isinstance(setting, bool)
        _check(plain, f"{key}.{option}", setting, 'text or a whole number; "" for a bare option')
    return tuple((str(option), str(setting)) for option, setting in value.items())


def _check(holds: object, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{key} is {value!r:.200}; it must be {allowed}")


def _check_text(key: str, value: str) -> None:
    # A directive ends with its line, and sbatch drops or misreads control characters.
    _check(value.isprintable(), key, value, "one line of printable characters")
    _check(len(value) <= MAX_LENGTH, key, value, f"at most {MAX_LENGTH} characters")


def directives(cluster: Cluster) -> list[tuple[str, str]]:
    """Return sbatch's options and their values, "" for a bare one, in the order of the script."""
    gpus = str(cluster.gpus_per_node) if cluster.gpus_per_node else None
    chosen = {
        "job-name": cluster.name,
        "partition": cluster.partition or None,
        "account": cluster.account or None,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.tasks_per_node),
        "gpus-per-node": gpus,
        "cpus-per-task": str(cluster.cpus_per_task),
        "mem": cluster.memory or None,
        "time": cluster.time,
        "signal": f"USR1@{cluster.signal_lead_s}",
        "requeue": "",
        "open-mode": "append",
        "output": "slurm-%j.out",
    }
    chosen.update(cluster.options)
    return [(option, value) for option, value in chosen.items() if value is not None]


def directive(option: str, value: str) -> str:
    r"""Return one #SBATCH line.

    sbatch reads its lines by rules of its own: it expands nothing, but a backslash counts inside
    either kind of quotes and an open `#` begins a comment.
    """
    if not value:
        return f"#SBATCH --{option}"
    if re.fullmatch("[A-Za-z0-9_.,:@%+/-]+", value):
        return f"#SBATCH --{option}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


def render(cluster: Cluster) -> str:
    """Return the batch script of a training; a pure function."""
    lines = [directive(option, value) for option, value in directives(cluster)]
    return _fill("train.sbatch.in", {"DIRECTIVES": lines, "ATTEMPT": attempt(cluster)})


def render_sample(cluster: Cluster) -> str:
    """Return the batch script of an array of shards; a pure function."""
    lines = [directive(option, value) for option, value in directives(of_shard(cluster))]
    parts = {"DIRECTIVES": lines, "ENVIRONMENT": environment(cluster), "BUDGET": _budget(cluster)}
    return _fill("sample.sbatch.in", parts)


def of_shard(cluster: Cluster) -> Cluster:
    """Return the resources of one shard: a process, on one GPU where the cluster has any."""
    options = {"output": "slurm-%A_%a.out", **dict(cluster.options)}
    return replace(
        cluster,
        nodes=1,
        gpus_per_node=min(cluster.gpus_per_node, 1),
        options=tuple(options.items()),
    )


def attempt(cluster: Cluster) -> list[str]:
    """Return the shell lines between the variable `run` and the ranks, which end by `finish $?`."""
    exports = []
    if cluster.network_interface:
        name = shlex.quote(cluster.network_interface)
        exports = [f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}"]
    parts = {
        "ENVIRONMENT": environment(cluster),
        "EXPORTS": exports,
        "BUDGET": _budget(cluster),
        "MIN_FREE_GB": [f"--min-free-gb {cluster.min_free_gb:g}"],
    }
    return _fill("attempt.sh.in", parts).splitlines()


def environment(cluster: Cluster) -> list[str]:
    """Return the shell lines that set up a job, after `fail` was defined."""
    parts = {"SETUP": [f"setup {shlex.quote(line)}" for line in cluster.setup]}
    return _fill("environment.sh.in", parts).splitlines()


def _budget(cluster: Cluster) -> list[str]:
    return [f"--budget {cluster.restarts}"]


SCRIPTS = {"train.sbatch": render, "sample.sbatch": render_sample}


def _fill(template: str, parts: Mapping[str, Sequence[str]]) -> str:
    """Return a template with every @NAME@ replaced, once: what is put in is not read again."""

    def lines(match: re.Match[str]) -> str:
        name, newline = match.groups()
        return "\n".join(parts[name]) + newline if parts[name] else ""

    text = (HERE / template).read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@(\n?)", lines, text)


def main(args: Sequence[str] | None = None) -> int:
    """Write the scripts of a YAML; exit code 2 and one line where it cannot be."""
    parser = argparse.ArgumentParser(prog="python slurm/render.py", description=__doc__)
    parser.add_argument("yaml", type=Path, nargs="?", default=HERE / "cluster.yaml")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the scripts")
    given = parser.parse_args(args)
    try:
        cluster = read_cluster(given.yaml)
        for name, rendered in SCRIPTS.items():
            files.atomic_write_text(given.out / name, rendered(cluster))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
