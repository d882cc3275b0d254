"""Train the small model of conftest.py in several processes, one plan after another.

python world.py FOLDER < plans.json > outcomes.json

A plan is {"run": name, "world": 2, "settings": {...}} and may hold "signal": [rank, name, samples]
(a signal to a rank at a count of samples), "halt": the same but in the validation there,
"records" (a store of so many in ten folds), "spoil": [rank, samples] (a rank's loss is NaN there),
"slow": [rank, seconds] (its data take so much longer, each step), "hasty": rank (its clock runs a
million times too fast), "break": name (rank 0 cannot write that file of the run from 12 samples
on), or "of": run and "damage": kind (what is done to the
newest checkpoint of a copy of it first). Its outcome is the exit code and the last words of each
rank. Ranks are forked from one process that has imported everything, which saves seconds a plan.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from sssd_hpc.errors import Interrupted, PeerLost, UserError
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.train import engine, heartbeat, loop, validation
from sssd_hpc.train.loop import Vote

DEADLINE_S = 100.0


def neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def damage(run: Path, how: str) -> None:
    """Harm the newest checkpoint of a run on two ranks; `latest` then points at nothing of it."""
    newest = max((run / "checkpoints").iterdir())
    file = newest / "optimizer-00001-of-00002.safetensors"
    if how == "flipped":
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "missing":
        file.unlink()
    elif how == "outside":
        elsewhere = run.with_name("elsewhere")
        shutil.move(newest, elsewhere)
        newest.symlink_to(elsewhere)
    (run / "latest").unlink()
    if how == "missing":
        (run / "latest").symlink_to("nowhere")
    else:
        (run / "latest").write_text("../elsewhere\n")


def disturb(plan: dict[str, Any], rank: int) -> None:
    """Have this rank send itself a signal, spoil its loss, be slow or find a full disk."""
    whom, name, at = plan.get("signal", (None, "SIGTERM", 0))
    spoiled, when = plan.get("spoil", (None, 0))
    slow, wait_s = plan.get("slow", (None, 0.0))
    step, loss, draw = loop.Trainer._step, loop.Trainer._loss, loop.draw

    def acting(trainer: Any, state: Any, stop: Any) -> Vote:
        if rank == whom and state.samples == at:
            os.kill(os.getpid(), getattr(signal, name))
        if rank == 0 and "break" in plan and state.samples == 12:
            make_unwritable(trainer.run / plan["break"])
        return step(trainer, state, stop)

    def spoiling(trainer: Any, held: Any, numbers: range) -> Any:
        value = loss(trainer, held, numbers)
        reached = numbers.start // 4 * 4 == when
        return value * float("nan") if rank == spoiled and reached else value

    def dawdling(*given: Any) -> Any:
        time.sleep(wait_s if rank == slow else 0.0)
        return draw(*given)

    halted, word, place = plan.get("halt", (None, "SIGTERM", 0))
    see = validation.Validator._draw

    def halting(validator: Any, samples: int, *given: Any) -> Any:
        if rank == halted and samples == place:
            os.kill(os.getpid(), getattr(signal, word))
        return see(validator, samples, *given)

    validation.Validator._draw = halting
    validation.RECIPE = Recipe(epochs=1, batch_size=16, num_blocks=(1,), width=4)
    validation.BATCH, validation.EVERY_S = {"cpu": 2}, 0.0
    if rank == plan.get("hasty"):
        loop.time = SimpleNamespace(monotonic=lambda: 1e6 * time.monotonic())
    loop.Trainer._step, loop.Trainer._loss, loop.draw = acting, spoiling, dawdling
    heartbeat.WATCH_S, heartbeat.WATCH_STEPS = 0.0, 4


def make_unwritable(path: Path) -> None:
    """Put a folder where a file is to be written: even root cannot write it then."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.mkdir(parents=True)


def rank_of(plan: dict[str, Any], rank: int, port: int, folder: Path, small: ModuleType) -> int:
    place = (rank, plan["world"], rank, "127.0.0.1", port)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(dict(zip(names, map(str, place), strict=True)))
    disturb(plan, rank)
    if {"damage", "slow"} & plan.keys():
        logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    try:
        # Three groups of parameters, no two of which are treated alike.
        settings = {"learning_rate": 0.01, "weight_decay": 0.1, "kernel_rate": 0.3}
        config = small.make_config(**settings, **plan.get("settings", {}))
        told = {"num_records": plan["records"], "folds": 10} if "records" in plan else {}
        loop.train(config, small.make_store(**told), folder / plan["run"])
    except UserError as error:
        print(f"error: {error}")
        return 2
    except Interrupted as stop:
        print(f"stopped early: {stop}")
        return 75
    except PeerLost as error:
        print(f"lost: {error}")
        return 1
    return 0


def outcome(plan: dict[str, Any], folder: Path, small: ModuleType) -> dict[str, Any]:
    port, children = free_port(), []
    if "damage" in plan:
        shutil.copytree(folder / plan["of"], folder / plan["run"])
        damage(folder / plan["run"], plan["damage"])
    began = time.monotonic()
    for rank in range(plan["world"]):
        words = folder / f"rank-{rank}.txt"
        child = os.fork()
        if not child:
            with open(words, "w") as stream, contextlib.redirect_stdout(stream):
                code = rank_of(plan, rank, port, folder, small)
            os._exit(code)
        children.append((child, words))
    codes, said = [], []
    for child, words in children:
        status = None
        while status is None and time.monotonic() < began + DEADLINE_S:
            done, found = os.waitpid(child, os.WNOHANG)
            status = found if done else None
            time.sleep(0.02)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        codes.append(None if status is None else os.waitstatus_to_exitcode(status))
        said.append(words.read_text())
    return {"codes": codes, "said": said, "seconds": time.monotonic() - began}


def main() -> None:
    folder = Path(sys.argv[1])
    small = neighbour("conftest")
    # DeepSpeed speaks on stdout as soon as it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")
        importlib.import_module("torch._dynamo")
        engine.prebuild()
        outcomes = [outcome(plan, folder, small) for plan in json.load(sys.stdin)]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
