"""`python -m sssd_hpc` with faults: test_training.py places it over the real one.

DISTURB holds the faults as JSON, by the attempt ("0", "1", .., or "*"):
- gate: ranks wait at this count of samples for RUN/go, or for a signal;
- kill: [rank, n], SIGKILL at its n-th write after its first checkpoint;
- at: [rank, samples, what], where what is raise, memory, kill, hang, nan or full (no file may
  grow).
Gates and faults come once the checkpoint before them is whole.
Each rank notes in RUN/taken-<rank>.txt which samples it takes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sssd_hpc.cli import main
from sssd_hpc.train import loop
from sssd_hpc.train.checkpoint import Writer
from sssd_hpc.train.loop import Vote

RUN = Path(sys.argv[sys.argv.index("--run") + 1])
RANK = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def install(faults: dict[str, Any]) -> None:
    step, loss, finish = loop.Trainer._step, loop.Trainer._loss, Writer.finish
    whom, where, what = faults.get("at", (None, None, ""))
    killed, last = faults.get("kill", (None, 0))
    writes = 0

    def disturbed_step(trainer: Any, state: Any, stop: Any) -> Vote:
        if state.samples in (faults.get("gate"), where):
            trainer.writer.finish()
        if state.samples == faults.get("gate"):
            (RUN / f"gate-{RANK}").touch()
            while not (RUN / "go").exists() and not stop.name:
                time.sleep(0.02)
        if (RANK, state.samples) == (whom, where):
            strike(what)
        return step(trainer, state, stop)

    def disturbed_loss(trainer: Any, engine: Any, numbers: range) -> Any:
        with open(RUN / f"taken-{RANK}.txt", "a") as stream:
            stream.writelines(f"{number}\n" for number in numbers)
        value = loss(trainer, engine, numbers)
        spoiled = (RANK, what) == (whom, "nan") and numbers.start // 4 * 4 == (where or 0)
        return value * float("nan") if spoiled else value

    def count(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal writes
        if name in WRITES and (name != "open" or "checkpoints" in str(arguments[0])):
            writes += 1
            if writes == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def disturbed_finish(writer: Writer) -> None:
        nonlocal killed
        pending = writer.pending
        finish(writer)
        if pending and killed == RANK:
            killed = None
            sys.addaudithook(count)

    loop.Trainer._step, loop.Trainer._loss = disturbed_step, disturbed_loss
    Writer.finish = disturbed_finish


def strike(what: str) -> None:
    if what == "raise":
        raise ValueError("the cause")
    if what == "memory":
        raise MemoryError("the cause")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


if __name__ == "__main__":
    by_attempt = json.loads(os.environ.get("DISTURB", "{}"))
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    install(by_attempt.get(attempt, by_attempt.get("*", {})))
    sys.exit(main(sys.argv[1:]))
