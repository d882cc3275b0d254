"""Restart or stop: the decision as a table, the record of it, and what Slurm is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.train import restart
from sssd_hpc.train.restart import Attempt, decide

CRASH, KILLED, STOPPED_EARLY = 1, 137, 75


def attempt(exit_code: int, samples: int, job_id: str = "7") -> Attempt:
    return Attempt(
        job_id=job_id,
        restart=0,
        time=0.0,
        exit_code=exit_code,
        samples=samples,
        requeue=True,
        reason="",
    )


# exit code, samples saved, earlier (exit code, samples) -> requeue, words of the reason
DECISIONS = {
    "finished": (0, 100, [], False, "finished"),
    "the user's mistake": (2, 100, [], False, "mend"),
    "a mistake after progress": (2, 100, [(75, 50)], False, "mend"),
    "preempted": (75, 100, [], True, "exit code 75: stopped early"),
    "preempted before the first checkpoint": (75, 0, [], True, "exit code 75: stopped early"),
    "preempted for the 50th time": (
        75,
        51,
        [(75, n) for n in range(1, 51)],
        True,
        "exit code 75: stopped early",
    ),
    "told to stop while Python starts": (143, 0, [(143, 0), (138, 0)], True, "while it started"),
    "preempted, nine idle": (75, 8, [(75, 8)] * 9, True, "exit code 75: stopped early"),
    "preempted, ten idle": (75, 8, [(75, 8)] * 10, False, "10 attempts in a row"),
    "preempted, never anything": (75, 0, [(75, 0)] * 9, False, "10 attempts in a row"),
    "first crash, with progress": (1, 8, [], True, "restart 1 of 10"),
    "first crash, before any checkpoint": (1, 0, [], True, "restart 1 of 10"),
    "killed": (137, 8, [(1, 4)], True, "exit code 137, restart 2 of 10"),
    "second crash without progress": (1, 8, [(75, 8), (1, 8)], False, "2 crashes in a row"),
    "second crash before any checkpoint": (1, 0, [(1, 0)], False, "2 crashes in a row"),
    "second crash, after progress": (1, 9, [(1, 8), (1, 8)], True, "restart 3 of 10"),
    "crash amid idle preemptions": (1, 8, [(75, 8)] * 5, True, "restart 1 of 10"),
    "newest checkpoint was damaged": (1, 6, [(1, 4), (1, 8), (1, 6)], False, "2 crashes"),
    "tenth crash": (1, 10, [(1, n) for n in range(1, 10)], True, "restart 10 of 10"),
    "eleventh crash": (1, 11, [(1, n) for n in range(1, 11)], False, "budget of 10"),
    "preempted after ten crashes": (
        75,
        11,
        [(1, n) for n in range(1, 11)],
        True,
        "exit code 75: stopped early",
    ),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_a_job_is_requeued_or_stopped(case: str) -> None:
    code, samples, past, expected, said = DECISIONS[case]
    again, reason = decide(code, samples, [attempt(*one) for one in past])
    assert again is expected
    assert said in reason


def test_a_budget_of_zero_lets_no_crash_come_back_but_every_preemption() -> None:
    assert decide(CRASH, 8, [], budget=0)[0] is False
    assert decide(75, 8, [], budget=0)[0] is True
    assert decide(143, 0, [attempt(75, 0)], budget=1)[0] is True


def test_a_job_that_always_crashes_stops_after_its_budget() -> None:
    history: list[Attempt] = []
    while decide(CRASH, len(history) + 1, history)[0]:
        history.append(attempt(CRASH, len(history) + 1))
    assert len(history) == restart.BUDGET


def test_only_finished_checkpoints_count(tmp_path: Path) -> None:
    assert restart.newest_samples(tmp_path) == 0
    folder = tmp_path / "checkpoints"
    for name in ("samples-000000008", "samples-000000016", ".tmp-samples-000000032-1-ab", "x"):
        (folder / name).mkdir(parents=True)
    for name in ("samples-000000008", ".tmp-samples-000000032-1-ab", "x"):
        (folder / name / "MANIFEST.json").write_text("{}")
    assert restart.newest_samples(tmp_path) == 8


def test_the_history_is_that_of_one_job_and_survives_a_torn_line(tmp_path: Path) -> None:
    assert restart.read_history(tmp_path, "7") == []
    first, other, last = attempt(75, 4), attempt(1, 6, job_id="6"), attempt(137, 8)
    restart.record(tmp_path, first)
    restart.record(tmp_path, other)
    path = tmp_path / restart.HISTORY
    with open(path, "a") as stream:
        stream.write('[]\n{"job_id": "7"}\nnull\n{"job_id": "7", "restart"')
    restart.record(tmp_path, last)
    assert restart.read_history(tmp_path, "7") == [first, last]
    assert json.loads(path.read_text().splitlines()[-1])["samples"] == 8


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for squeue and scontrol: they answer from files, and note what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, answer in (("squeue", "RUNNING             3"), ("scontrol", "")):
        tool = folder / name
        tool.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{folder}/asked\n'
            f"[ ! -s {folder}/refusal ] || {{ cat {folder}/refusal >&2; exit 1; }}\n"
            f"cat {folder}/{name}.answer\n"
        )
        tool.chmod(0o755)
        (folder / f"{name}.answer").write_text(answer)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    return folder


def ended(run: Path, exit_code: int) -> int:
    return restart.main(["--run", str(run), "--exit-code", str(exit_code)])


def test_a_requeue_is_recorded_said_and_done(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(tmp_path, STOPPED_EARLY) == restart.REQUEUED
    assert (slurm / "asked").read_text().endswith("scontrol requeue 7\n")
    (line,) = restart.read_history(tmp_path, "7")
    assert (line.restart, line.exit_code, line.requeue) == (3, 75, True)
    assert "job 7, 0 samples saved: requeue: exit code 75" in capsys.readouterr().out


def test_a_stop_asks_slurm_nothing(slurm: Path, tmp_path: Path) -> None:
    assert ended(tmp_path, 2) == restart.STOPPED
    assert not (slurm / "asked").exists()
    (line,) = restart.read_history(tmp_path, "7")
    assert line.requeue is False


def test_a_cancelled_job_does_not_come_back(slurm: Path, tmp_path: Path) -> None:
    (slurm / "squeue.answer").write_text("COMPLETING          3")
    assert ended(tmp_path, STOPPED_EARLY) == restart.STOPPED
    assert "requeue 7" not in (slurm / "asked").read_text()
    (line,) = restart.read_history(tmp_path, "7")
    assert "it is COMPLETING" in line.reason


def test_an_attempt_that_slurm_gave_up_leaves_the_next_alone(slurm: Path, tmp_path: Path) -> None:
    (slurm / "squeue.answer").write_text("RUNNING             4")
    assert ended(tmp_path, KILLED) == restart.STOPPED
    assert "requeue 7" not in (slurm / "asked").read_text()
    (line,) = restart.read_history(tmp_path, "7")
    assert "attempt 4 is under way, this was 3" in line.reason


def test_a_refusal_is_one_line(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "refusal").write_text("Requested operation is presently disabled for job 7\n")
    assert ended(tmp_path, KILLED) == restart.STOPPED
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "presently disabled for job 7; submit it again" in err


def test_a_controller_that_is_away_is_asked_again(slurm: Path) -> None:
    (slurm / "refusal").write_text("Unable to contact slurm controller (connect failure)\n")
    waits: list[float] = []

    def back_after_three(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            (slurm / "refusal").unlink()

    assert restart.ask(["squeue"], sleep=back_after_three).startswith("RUNNING")
    assert len(waits) == 3


def test_a_controller_that_stays_away_is_given_up(slurm: Path) -> None:
    (slurm / "refusal").write_text("Unable to contact slurm controller (connect failure)\n")
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(UserError, match="Unable to contact"):
        restart.ask(["squeue"], sleep=sleep, clock=lambda: now[0])
    assert now[0] == restart.ASK_FOR_S


def test_without_a_record_nothing_is_requeued(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(tmp_path / "absent", CRASH) == restart.STOPPED
    assert "requeue 7" not in (slurm / "asked").read_text()
    assert "absent" in capsys.readouterr().err


def test_outside_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_ID"):
        ended(tmp_path, CRASH)


def test_a_shard_of_a_set_is_asked_about_by_its_records(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job of an array has a name of its own: its number alone may be the whole array's."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "15")
    shards = tmp_path / restart.SHARDS
    shards.mkdir()
    command = ["--out", str(tmp_path), "--shard", "15/16", "--exit-code", str(KILLED)]
    told = shards / "00015-of-00016.json"
    for done in (None, 4, 4, 4):
        if done is not None:
            told.write_text(json.dumps({"done": done}))
        restart.main(command)
    history = restart.read_history(shards, "7_15")
    assert [line.samples for line in history] == [0, 4, 4, 4]
    assert [line.requeue for line in history] == [True, True, True, False]
    assert (slurm / "asked").read_text().count("scontrol requeue 7_15\n") == 3
    for torn in ("{", "[]", '{"done": "x"}'):
        told.write_text(torn)
        assert restart.newest_records(tmp_path, "15/16") == 0
