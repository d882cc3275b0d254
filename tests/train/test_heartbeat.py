"""Signs of life of a rank, and the report on ranks that are slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sssd_hpc.errors import Interrupted
from sssd_hpc.train import heartbeat
from sssd_hpc.train.heartbeat import Heartbeat, Stragglers


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(run: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "heartbeats" / f"rank-{rank:05d}.json").read_text())
    return found


def test_a_heartbeat_tells_who_where_and_how_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    clock = Clock()
    with Heartbeat(tmp_path, 3, samples=40, clock=clock) as heart:
        found = told(tmp_path, 3)
        assert found.pop("time") == pytest.approx(time.time(), abs=60)
        assert found == {
            "rank": 3,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "job_id": "17",
            "restart": 2,
            "samples": 40,
            "step_s": 0.0,
            "phase": "start",
        }
        heart.beat("step", 44)
        clock.now += 6
        heart.beat("step", 48)
        found = told(tmp_path, 3)
        assert (found["phase"], found["samples"], found["step_s"]) == ("step", 48, 6.0)
    assert told(tmp_path, 3)["phase"] == "done"
    assert [entry.name for entry in (tmp_path / "heartbeats").iterdir()] == ["rank-00003.json"]


def test_steps_are_written_every_few_seconds_and_phases_at_once(tmp_path: Path) -> None:
    clock = Clock()
    with Heartbeat(tmp_path, 0, clock=clock) as heart:
        heart.beat("step", 4)
        clock.now += heartbeat.EVERY_S - 0.1
        heart.beat("step", 8)
        assert told(tmp_path)["samples"] == 4
        heart.beat("save", 8)
        assert (told(tmp_path)["phase"], told(tmp_path)["samples"]) == ("save", 8)


@pytest.mark.parametrize(
    ("error", "phase", "words"),
    [
        (Interrupted("SIGUSR1 came"), "done", None),
        (RuntimeError("no\nmemory"), "failed", "no memory"),
        (RuntimeError("pair.cc: Connection closed by peer"), "failed", heartbeat.LOST),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
    ids=["signal", "error", "another's", "silent error"],
)
def test_how_a_rank_ended_is_told(
    tmp_path: Path, error: BaseException, phase: str, words: str | None
) -> None:
    with pytest.raises(type(error)), Heartbeat(tmp_path, 0, lost=["Connection closed"]):
        raise error
    assert (told(tmp_path)["phase"], told(tmp_path).get("error")) == (phase, words)


def test_a_heartbeat_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "heartbeats").write_text("a file")
    heartbeat.clear(tmp_path, 1)
    with Heartbeat(tmp_path, 0) as heart:
        heart.beat("save", 4)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["no heartbeat"]


def test_beats_cost_next_to_nothing(tmp_path: Path) -> None:
    """A step of the paper's model takes 0.1 s and more: 1 % of that is 1 ms."""
    with Heartbeat(tmp_path, 0) as heart:
        heart.beat("step", 0)
        began = time.perf_counter()
        for samples in range(2000):
            heart.beat("step", samples)
        assert (time.perf_counter() - began) / 2000 < 1e-4


def test_ranks_beyond_the_present_number_are_forgotten(tmp_path: Path) -> None:
    for rank in range(4):
        with Heartbeat(tmp_path, rank):
            pass
    (tmp_path / "heartbeats" / "note.txt").write_text("mine")
    heartbeat.clear(tmp_path, 2)
    names = sorted(entry.name for entry in (tmp_path / "heartbeats").iterdir())
    assert names == ["note.txt", "rank-00000.json", "rank-00001.json"]


def test_a_rank_that_hangs_prints_where(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sssd_hpc.train.heartbeat import *\n"
        "def stuck():\n    while not time.sleep(0.05): sys.stderr.flush()\n"
        "with Heartbeat(Path(sys.argv[1]), 0, timeout_s=0.3): stuck()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        words = [child.stderr.readline() for _ in range(3)]
    finally:
        child.kill()
        child.communicate()
    assert words[0].startswith("Timeout")
    assert "in stuck" in words[2]


def watch(
    tmp_path: Path, shares: list[int], seconds: list[float], steps: int = 20
) -> tuple[Stragglers, Clock]:
    clock = Clock()
    stragglers = Stragglers(tmp_path, shares, clock=clock)
    for _ in range(steps):
        clock.now += 6
        stragglers.add(seconds)
    return stragglers, clock


def test_a_rank_that_stays_slow_is_named_once_with_its_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Heartbeat(tmp_path, 2):
        watch(tmp_path, [2, 2, 2, 2], [2.0, 2.0, 4.0, 2.8], steps=40)
    (record,) = caplog.records
    assert record.message == (
        f"rank 2 on {os.uname().nodename} is slow: its part of a step takes 4000 ms, "
        "2.0 times the median rank's"
    )


def test_of_two_ranks_the_slow_one_is_named_and_again_after_a_recovery(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stragglers, clock = watch(tmp_path, [1, 1], [2.0, 6.0])
    for seconds in ([2.0, 2.0], [2.0, 6.0]):
        for _ in range(10):
            clock.now += 6
            stragglers.add(seconds)
    assert [record.message.partition(" is")[0] for record in caplog.records] == ["rank 1"] * 2


@pytest.mark.parametrize(
    ("shares", "seconds", "steps"),
    [
        ([2, 2], [2.0, 2.8], 20),
        ([2, 1, 1], [4.0, 2.0, 2.0], 20),
        ([1, 1], [0.1, 9.0], 9),
        ([1, 1], [0.1, 0.6], 20),
    ],
    ids=["within bounds", "more to do", "short", "costs little"],
)
def test_who_is_little_slower_or_has_more_to_do_is_not_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shares: list[int],
    seconds: list[float],
    steps: int,
) -> None:
    watch(tmp_path, shares, seconds, steps)
    assert not caplog.records


def test_ranks_that_do_not_say_how_they_ended_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks 1 and 2 lose rank 0, which hangs, and rank 3, which fails by itself."""
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.5)
    ranks = [Heartbeat(tmp_path, rank, samples=12, lost=["closed"]) for rank in range(4)]
    for rank in ranks:
        rank.beat("step", 12)
    ranks[3].__exit__(ValueError, ValueError("the cause"), None)
    lost = RuntimeError("connection closed")
    with ThreadPoolExecutor(2) as pool:
        for rank in ranks[1:3]:
            pool.submit(rank.__exit__, RuntimeError, lost, None)
    (record,) = caplog.records
    assert record.message.startswith(f"no word from rank 0 on {os.uname().nodename} for ")
    assert record.message.endswith(" s: it was at 12 samples")


def test_training_leaves_its_last_heartbeat(tmp_path: Path, small: SimpleNamespace) -> None:
    from sssd_hpc.train.loop import train

    train(small.config(samples=8), small.store(), tmp_path)
    found = told(tmp_path)
    assert (found["phase"], found["samples"]) == ("done", 8)
