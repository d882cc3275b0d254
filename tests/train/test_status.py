"""What `sssd-hpc status` tells of runs in every state, from files alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sssd_hpc import cli
from sssd_hpc import config as configs
from sssd_hpc.errors import UserError
from sssd_hpc.progress import duration
from sssd_hpc.train import heartbeat, status
from sssd_hpc.train.restart import Attempt, record

NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path: Path, small: SimpleNamespace) -> Path:
    """A run of 1000 samples that nobody has touched yet."""
    config = small.config(samples=1000, timeout_s=300)
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    return tmp_path


def beat(run: Path, rank: int, phase: str, *, age: float, samples: int = 600, **more: Any) -> None:
    """Leave a heartbeat of this age; the writer's own clock is far off."""
    (run / "heartbeats").mkdir(exist_ok=True)
    path = run / "heartbeats" / f"rank-{rank:05d}.json"
    told = {"rank": rank, "host": f"node{rank}", "pid": 1, "time": 3.0, "samples": samples}
    told |= {"step_s": 0.5, "phase": phase, "job_id": "17", "restart": 1, **more}
    path.write_text(json.dumps(told))
    os.utime(path, (NOW - age, NOW - age))


def test_the_last_validation_and_the_best_are_told(run: Path) -> None:
    metrics(run, [1.0])
    found = [{"frechet": 2.5, "roc_auc": 0.75}, {"frechet": None, "reason": "3 are \x1b[1m bad"}]
    with open(run / "metrics.jsonl", "a") as stream:
        for number, row in enumerate(found, 1):
            print(json.dumps({"samples": 400 * number, "validation": row}), file=stream)
        stream.write(
            '{"samples": Infinity, "validation": {}}\n{"samples": 900, "validation": 3}\n{'
        )
    beat(run, 0, "validate", age=1, samples=800)
    state = status.examine(run, now=NOW)
    assert state.validation == {"samples": 800, **found[1]}
    assert state.best == {"samples": 400, **found[0]}
    assert state.losses == [1.0]
    told = status.text(state, io.StringIO())
    assert "RUNNING; validating" in told
    assert "  validation  at 800 samples: 3 are [1m bad\n" in told
    assert "  best        at 400 samples: Frechet distance 2.5, TRTS ROC-AUC 0.75" in told


def checkpoint(run: Path, samples: int, age: float = 30) -> None:
    manifest = run / "checkpoints" / f"samples-{samples:09d}" / "MANIFEST.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    os.utime(manifest, (NOW - age, NOW - age))


def metrics(run: Path, losses: list[float]) -> None:
    rows = [
        {"samples": 10 * i + 10, "loss": loss, "samples_per_s": 4.0}
        for i, loss in enumerate(losses)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def shown(run: Path) -> str:
    return status.text(status.examine(run, now=NOW), io.StringIO())


def test_a_running_run_tells_rate_eta_and_the_age_of_its_checkpoint(run: Path) -> None:
    beat(run, 0, "step", age=2)
    beat(run, 1, "step", age=4, samples=596)
    checkpoint(run, 400)
    checkpoint(run, 500, age=90)
    metrics(run, [1.0, 0.5, 0.25])
    found = status.examine(run, now=NOW)
    assert (found.state, found.why, found.samples, found.total) == ("running", "", 600, 1000)
    assert (found.samples_per_s, found.eta_s) == (4.0, 100.0)
    assert (found.checkpoint_samples, found.checkpoint_age_s) == (500, 90.0)
    assert (found.job_id, found.restart) == ("17", 1)
    assert (found.loss, found.losses) == (0.25, [1.0, 0.5, 0.25])
    text = shown(run)
    assert "600 of 1,000, 60.0%, 4.0/s, ETA 1 min 40 s" in text
    assert "at 500 samples, 1 min 30 s ago" in text
    assert "2 on node0 node1, job 17 restart 1, last heard of 2 s ago" in text


@pytest.mark.parametrize(
    ("phase", "age", "step_s", "silent"),
    [
        ("step", 59, 0.5, False),
        ("step", 61, 0.5, True),
        ("step", 200, 30.0, False),
        ("save", 299, 0.5, False),
        ("save", 301, 0.5, True),
        ("start", 299, 0.0, False),
        ("start", 301, 0.0, True),
    ],
)
def test_patience_goes_by_what_the_rank_was_doing(
    run: Path, phase: str, age: float, step_s: float, silent: bool
) -> None:
    beat(run, 0, phase, age=age, step_s=step_s)
    assert status.examine(run, now=NOW).state == ("dead" if silent else "running")


def test_a_silent_rank_among_others_is_named(run: Path) -> None:
    beat(run, 0, "step", age=1)
    beat(run, 1, "step", age=70, samples=580)
    found = status.examine(run, now=NOW)
    assert (found.state, found.why) == ("running", "but rank 1 on node1 silent")
    assert "rank 1 on node1: silent for 1 min 10 s at 580 samples" in shown(run)


def test_the_age_is_the_files_whatever_the_clocks_say(run: Path) -> None:
    beat(run, 0, "step", age=-40)
    found = status.examine(run, now=NOW)
    assert (found.state, found.ranks[0].age_s) == ("running", 0.0)


def test_a_finished_run(run: Path) -> None:
    beat(run, 0, "done", age=9000, samples=1000)
    checkpoint(run, 1000, age=9001)
    found = status.examine(run, now=NOW)
    assert (found.state, found.eta_s) == ("finished", None)
    assert ": FINISHED\n" in shown(run)


def test_a_run_that_saved_and_stopped_is_resumable_and_says_why(run: Path) -> None:
    beat(run, 0, "done", age=50, samples=600)
    checkpoint(run, 600)
    attempt = Attempt(
        job_id="17",
        restart=1,
        time=NOW,
        exit_code=75,
        samples=600,
        requeue=True,
        reason="exit code 75: stopped early, its state saved",
    )
    record(run, attempt)
    found = status.examine(run, now=NOW)
    assert (found.state, found.why) == ("stopped", "the same command goes on")
    assert found.restarts == [asdict(attempt)]
    expected = "1 ended   job 17 restart 1 at 600 samples: requeued: exit code 75: stopped early"
    assert expected in shown(run)


def test_a_dead_run(run: Path) -> None:
    beat(run, 0, "step", age=4000)
    beat(run, 1, "save", age=4100)
    checkpoint(run, 500)
    found = status.examine(run, now=NOW)
    assert found.state == "dead"
    assert found.why == "no rank was heard of for 1 h 06 min; the same command goes on"


def test_the_first_rank_to_fail_and_the_mute_one_are_named(run: Path) -> None:
    beat(run, 0, "failed", age=6, error=heartbeat.LOST)
    beat(run, 3, "failed", age=3, error="later")
    beat(run, 1, "failed", age=5, error="out of memory")
    beat(run, 2, "step", age=9)
    found = status.examine(run, now=NOW)
    assert found.state == "failed"
    assert found.why == "rank 1 on node1: out of memory; no word from rank 2 on node2"


def test_an_earlier_attempts_ranks_do_not_count(run: Path) -> None:
    beat(run, 0, "step", age=1, restart=2)
    beat(run, 1, "failed", age=100, error="old")
    found = status.examine(run, now=NOW)
    assert (found.state, [rank.rank for rank in found.ranks]) == ("running", [0])


def test_a_new_run_and_one_from_before_heartbeats(run: Path) -> None:
    assert status.examine(run, now=NOW).state == "new"
    checkpoint(run, 500)
    assert status.examine(run, now=NOW).state == "stopped"
    checkpoint(run, 1000)
    assert status.examine(run, now=NOW).state == "finished"


def test_half_written_files_count_as_absent(run: Path) -> None:
    beat(run, 0, "step", age=1)
    (run / "heartbeats" / "rank-00001.json").write_text('{"rank": ')
    (run / "heartbeats" / "rank-00002.json").write_text('{"rank": "two"}')
    (run / "config.yaml").write_text("train: [")
    (run / "metrics.jsonl").write_text(
        '{"loss": 1.5}\n{"loss": NaN}\n{"loss": Infinity}\n[1]\n{"loss": "x"}\n{"lo'
    )
    (run / "restarts.jsonl").write_bytes(b"\xff\n")
    found = status.examine(run, now=NOW)
    assert (found.state, found.total, found.loss) == ("running", None, 1.5)
    assert len(found.ranks) == 1
    assert shown(run)


def test_what_ranks_say_cannot_drive_a_terminal(run: Path) -> None:
    beat(run, 0, "failed", age=1, error="a\x1b[2Jb\x07", host="x\x1by")
    assert "\x1b" not in shown(run)
    assert "\x07" not in shown(run)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is not the folder of a run"):
            status.examine(folder)


class Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


def test_colours_and_blocks_are_for_terminals(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(run, 0, "step", age=1)
    metrics(run, [3.0, 1.0, 2.0])
    found = status.examine(run, now=NOW)
    monkeypatch.delenv("NO_COLOR", raising=False)
    nice = status.text(found, Terminal())
    assert "\x1b[1;32mRUNNING\x1b[0m" in nice
    assert "\u2588\u2581\u2584" in nice
    plain = status.text(found, io.StringIO())
    assert plain.isascii()
    assert "############........ 600 of 1,000" in plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in status.text(found, Terminal())


def test_a_long_curve_is_shortened_to_means() -> None:
    values = [float(i) for i in range(100)]
    means = status._means(values, 40)
    assert len(means) == 40
    assert means == sorted(means)
    assert status._means([], 40) == []
    assert status.sparkline([2.0, 2.0]) == "\u2581\u2581"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (59.9, "59 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (86_399, "23 h 59 min"),
        (367_200, "4 d 06 h"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_command_prints_text_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run, 1000)
    assert cli.main(["status", str(run)]) == 0
    assert "FINISHED" in capsys.readouterr().out
    assert cli.main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


def test_a_trained_run_is_finished(tmp_path: Path, small: SimpleNamespace) -> None:
    from sssd_hpc.train.loop import train

    train(small.config(samples=24), small.store(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = status.examine(tmp_path, now=time.time())
    assert (found.state, found.samples, found.checkpoint_samples) == ("finished", 24, 24)
    assert len(found.losses) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_status_loads_no_torch() -> None:
    code = "import sys, sssd_hpc.train.status; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
