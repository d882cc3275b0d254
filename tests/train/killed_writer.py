"""A program for test_kill.py: end a child with SIGKILL at each of its writes, see what it leaves.

A child is this process forked; an audit hook counts what it opens, makes, renames and removes, and
kills it at the given count. `save RUN` prints, for each kill point of writing a checkpoint of 12
samples into a run that holds 4 and 8, what is then found. `train RUN KILLS` kills a whole training
at that many points, lets another child go on, and prints the manifests of the last checkpoints.
RUN must be called killed-run, so that its files are told from others.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.model.checkpoint import Checkpoint, read
from sssd_hpc.train import checkpoint, engine, loop, metrics, validation
from sssd_hpc.train.checkpoint import load_newest
from sssd_hpc.train.ranks import Group

WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "half-written")


def child(work: Callable[[], None], kill_at: int) -> int | None:
    """Run `work` in a child killed at its event number `kill_at`; return its events if it lived."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        events = 0

        def count(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal events
            concerns_us = name != "open" or "killed-run" in str(arguments[0])
            if name in WATCHED and concerns_us:
                events += 1
                if events == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        status = 1
        try:
            work()
            os.write(writer, str(events).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader) as stream:
        said = stream.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert status == 0, "the child failed"
    return int(said)


def cut_files_first() -> None:
    """Let each tensor file stand half written once before it is written whole."""
    whole = checkpoint.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        sys.audit("half-written")
        whole(tensors, path)

    checkpoint.save_file = save_file


def killed_saves(run: Path) -> list[int]:
    """Return the count of samples found after a kill at each write of a save."""

    def save(samples: int) -> None:
        tensors = {"model": {"w": torch.full((50,), float(samples))}}
        checkpoint.save(run, Checkpoint(samples, tensors, {}), group=Group(), keep=2)

    found = []
    lived = None
    while lived is None:
        shutil.rmtree(run, ignore_errors=True)
        save(4)
        save(8)
        lived = child(lambda: save(12), kill_at=len(found) + 1)
        # No half of a checkpoint is ever visible.
        for entry in run.glob("checkpoints/samples-*"):
            read(entry)
        newest = load_newest(run)
        assert newest is not None
        assert newest.tensors["model"]["w"][0] == newest.samples
        assert not [*run.glob(".tmp-*"), *run.glob("checkpoints/.tmp-*")]
        found.append(newest.samples)
        save(16)
    return found


def killed_trainings(run: Path, kills: int) -> list[str]:
    """Return the last checkpoint's manifest, the best one's name and what validations found after
    an unkilled run and after each killed one.
    """
    # Once here instead of once in every child.
    engine.prebuild()
    importlib.import_module("torch._dynamo")
    conftest = beside("conftest.py")
    config = conftest.make_config(samples=16, validate_every=8, keep_checkpoints=1)
    store = conftest.make_store(30, folds=10)
    validation.RECIPE = Recipe(epochs=1, num_blocks=(1,), width=4)

    def train() -> None:
        loop.train(config, store, run)

    def outcome() -> str:
        manifest = (run / (run / "latest").read_text().strip() / "MANIFEST.json").read_text()
        best = (run / "best").read_text()
        assert read(run / best.strip()).samples in (8, 16)
        found = metrics.validations(run / "metrics.jsonl")
        told = [(samples, row["frechet"], row["roc_auc"]) for samples, row in found.items()]
        shutil.rmtree(run)
        return f"{manifest}{best}{told}"

    events = child(train, kill_at=0)
    assert events is not None
    outcomes = [outcome()]
    for kill_at in range(1, events, events // kills):
        assert child(train, kill_at) is None
        assert child(train, kill_at=0) is not None
        outcomes.append(outcome())
    return outcomes


def beside(name: str) -> ModuleType:
    """Import a file of this folder."""
    spec = importlib.util.spec_from_file_location("beside", Path(__file__).with_name(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    cut_files_first()
    if mode == "save":
        print(json.dumps(killed_saves(Path(folder))))
    else:
        print(json.dumps(killed_trainings(Path(folder), int(rest[0]))))
