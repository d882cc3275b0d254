"""What the launchers share: the folder they work for, submitit's parameters, signals, errors."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from slurm import render
from sssd_hpc.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXIT_FAILED, EXIT_USER, EXIT_RESUMABLE = 1, 2, 75
# What submitit sets by parameters of its own.
SUBMITITS = ("nodes", "ntasks-per-node", "time", "signal", "open-mode", "output")
# submitit counts timeouts and gives up; restarts are bounded where what was made is known.
NO_LIMIT = 1_000_000


def folder_of(flags: Sequence[str], option: str) -> Path:
    """Return the folder that `option` names among a command's flags; the last one wins.

    Raises:
        UserError: it is not named, or cannot stand in the names of Slurm's logs.
    """
    folder = ""
    for index, flag in enumerate(flags):
        if flag == option:
            folder = "".join(flags[index + 1 : index + 2])
        elif flag.startswith(f"{option}="):
            folder = flag.removeprefix(f"{option}=")
    if not folder:
        raise UserError(f"{option} is missing among the flags after --; name the folder")
    if not folder.isprintable() or "%" in folder or "\\" in folder:
        raise UserError(
            f"{option} is {folder!r}; submitit cannot write to a path with %, \\ or control "
            "characters"
        )
    return Path(folder)


def slurm_parameters(cluster: render.Cluster, tasks_per_node: int) -> dict[str, Any]:
    """Return submitit's parameters for a job of this cluster."""
    options = {
        option: _literal(value)
        for option, value in render.directives(cluster)
        if option not in SUBMITITS
    }
    return {
        "nodes": cluster.nodes,
        "ntasks_per_node": tasks_per_node,
        "time": -(-cluster.time_s // 60),
        "signal_delay_s": cluster.signal_lead_s,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": options,
    }


def _literal(value: str) -> str | bool:
    """Return a value as submitit must be given it: it quotes for bash, where a backslash stays."""
    return value.replace("\\", "\\\\") or True


@contextlib.contextmanager
def keyboard_kept_off() -> Iterator[None]:
    """Start processes that the keyboard's signal does not reach: this one hands it on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def handing_on(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for whatever would stop this process: the others save, then end."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        stop()

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def terminate(process: int) -> None:
    """Ask a process to end, which may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def split(args: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the launcher's own flags and, after `--`, those of the command."""
    words = list(sys.argv[1:] if args is None else args)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def guarded(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; a user's mistake is one line and EXIT_USER."""
    try:
        return work()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER
