"""Who this process is among those of a run, and how they talk: rank discovery and collectives.

A run is started by Slurm (`srun`), by torchrun, or alone; `discover` tells which from the
environment and refuses half a set of variables, which would have processes wait for each other for
ever. `Group` carries what the loop needs besides gradients: small sums and small objects.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from sssd_hpc import files
from sssd_hpc.errors import AgreedError, PeerLost, UserError

T = TypeVar("T")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
# Above what services use, below what the kernel hands out to clients.
FIRST_PORT, NUM_PORTS = 20_000, 12_000
# What gloo and NCCL say when a peer closes the connection, resets it, or does not answer in time.
PEER_LOST = ("Connection closed", "Connection reset", "Timed out", "timeout", "NCCL", "Broken pipe")


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`, and where rank 0 is to be met."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: Literal["single", "torchrun", "slurm"]

    def environment(self) -> dict[str, str]:
        """Return the variables by which torch and DeepSpeed know the same."""
        values = (self.rank, self.world_size, self.local_rank, self.master_addr, self.master_port)
        return dict(zip(TORCHRUN, map(str, values), strict=True))


def discover(environ: Mapping[str, str]) -> Ranks:
    """Return who this process is: by torchrun's variables, an srun step's, or alone.

    MASTER_ADDR and MASTER_PORT alone may override what follows from Slurm's variables.

    Raises:
        UserError: half a set, values that are no numbers, or a job of several tasks that were not
            started by srun.
    """
    where = ("MASTER_ADDR", "MASTER_PORT")
    given = [name for name in TORCHRUN if name in environ]
    step = "SLURM_STEP_ID" in environ
    if given and not (step and set(given) <= set(where)):
        _whole(TORCHRUN, environ, "torchrun sets all of them; unset them to train in one process")
        return _checked("torchrun", environ, TORCHRUN[:3], environ["MASTER_ADDR"])
    if step:
        _whole(SLURM, environ, "srun sets all of them")
        host = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        return _checked("slurm", environ, SLURM[:3], host)
    if environ.get("SLURM_NTASKS", "1") != "1" and "SLURM_JOB_ID" in environ:
        raise UserError(
            f"SLURM_NTASKS is {environ['SLURM_NTASKS']} but this process is no srun step; start "
            "training by srun, as slurm/train.sbatch does"
        )
    return Ranks(0, 1, 0, "127.0.0.1", 0, "single")


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as node[03-05,9],login1.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"([\w.-]*)(?:\[(\w+)[^\]]*\])?([\w.-]*)(,.*)?", nodes)
    host = "".join(part or "" for part in match.groups()[:3]) if match else ""
    if not host:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host")
    return host


class Group:
    """The processes of a run. One alone talks to itself and needs no process group."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def gather(self, value: T) -> list[T]:
        """Return every rank's small object, in the order of ranks, to every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums over ranks of a few numbers, the same bits on every rank."""
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return [float(value) for value in sums]

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 work; return its result, a small object, to every rank.

        Raises:
            UserError, OSError: rank 0's, on every rank.
        """
        answer: list[Any] = [_attempt(work) if self.rank == 0 else None]
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        value, failure, mendable = answer[0]
        if failure:
            raise self._agreed(failure, mendable)
        result: T = value
        return result

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Let every rank work; return all results, small objects, to every rank.

        Raises:
            UserError, OSError: the first rank's that failed, on every rank.
        """
        answers = self.gather(_attempt(work))
        for rank, (_, failure, mendable) in enumerate(answers):
            if failure:
                where = f"rank {rank}: " if self.world_size > 1 else ""
                raise self._agreed(f"{where}{failure}", mendable)
        return [value for value, _, _ in answers]  # type: ignore[misc]

    def _agreed(self, failure: str, mendable: bool) -> Exception:
        """Return an error that all ranks raise; only rank 0's will be said."""
        if not mendable:
            return OSError(failure)
        return UserError(failure) if self.rank == 0 else AgreedError(failure)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str, bool]:
    """Return what the work returns, or the words of its error and whether the user can mend it."""
    try:
        return work(), "", True
    except UserError as error:
        return None, str(error), True
    except OSError as error:
        mendable = files.mendable(error)
        hint = "; mend that and give the same command again" if mendable else ""
        return None, f"{error}{hint}", mendable


@contextlib.contextmanager
def open_group(ranks: Ranks, backend: str, timeout_s: float) -> Iterator[Group]:
    """Yield the group of a run; torch's process group is up inside the block if there are several.

    Args:
        ranks: who this process is.
        backend: gloo or nccl.
        timeout_s: seconds after which a silent peer is taken for dead.

    Raises:
        PeerLost: the ranks do not find each other, or one of them is gone or silent.
    """
    if ranks.world_size == 1:
        yield Group()
        return
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{ranks.master_addr}:{ranks.master_port}",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            f"rank {ranks.rank} of {ranks.world_size} does not reach the others at "
            f"{ranks.master_addr}:{ranks.master_port}: {' '.join(str(error).split())[:200]}"
        ) from error
    try:
        yield Group(ranks.rank, ranks.world_size)
    except RuntimeError as error:
        # gloo raises RuntimeError, NCCL its subclass DistBackendError; other errors are the rank's.
        words = " ".join(str(error).split())
        if not any(sign in words for sign in PEER_LOST):
            raise
        raise PeerLost(
            f"rank {ranks.rank} lost the others: {words[-160:]}; see what the first to fail says"
        ) from error
    # Not in a finally: after an error peers may be gone, and leaving in good form would wait.
    dist.destroy_process_group()


def _whole(names: Sequence[str], environ: Mapping[str, str], hint: str) -> None:
    missing = [name for name in names if name not in environ]
    if missing:
        there = [name for name in names if name in environ]
        raise UserError(
            f"of the variables of a launcher {', '.join(there)} are set but {', '.join(missing)} "
            f"are not; {hint}"
        )


def _checked(
    launcher: Literal["torchrun", "slurm"],
    environ: Mapping[str, str],
    names: Sequence[str],
    host: str,
) -> Ranks:
    numbers = {name: environ[name] for name in names}
    port = environ.get("MASTER_PORT")
    if port is None:
        # A requeued job may meet its old port still closing.
        job, restart = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_RESTART_COUNT", "0")
        numbers |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}
    else:
        numbers["MASTER_PORT"] = port
    for name, text in numbers.items():
        if not text.isdecimal():
            raise UserError(f"{name} is {text!r}; it must be a whole number")
    rank, world_size, local_rank = (int(environ[name]) for name in names)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names[0]} is {rank} and {names[1]} {world_size}; ranks are 0 .. size - 1"
        )
    if port is None:
        drawn = int(numbers["SLURM_JOB_ID"]) * 31 + int(numbers["SLURM_RESTART_COUNT"]) * 1009
        port = str(FIRST_PORT + drawn % NUM_PORTS)
    return Ranks(rank, world_size, local_rank, host, int(port), launcher)
