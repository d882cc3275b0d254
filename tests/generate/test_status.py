"""A synthetic set's state from its files alone, whatever lies there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.generate.beats import EVERY_S, Beat
from sssd_hpc.generate.names import MANIFEST_FILE, REQUEST_FILE, SHARDS, SUMS_FILE
from sssd_hpc.generate.status import SILENT_S, examine, text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / REQUEST_FILE).write_text("{}")
    (tmp_path / MANIFEST_FILE).write_text('{"format": 1, "records": 100}\n')
    return tmp_path


def tell(root: Path, shard: int, count: int = 4, *, age_s: float = 0.0, **facts: Any) -> None:
    told = {"shard": shard, "shards": count, "done": 5, "total": 25, "records_per_s": 2.0}
    told |= {"phase": "drawing", "host": f"node{shard}", "job_id": f"7_{shard}", **facts}
    path = root / SHARDS / f"{shard:05d}-of-{count:05d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(told))
    os.utime(path, (time.time() - age_s,) * 2)


def test_counts_rates_and_eta_are_the_shards_together(root: Path) -> None:
    assert examine(root).state == "new"
    tell(root, 0, done=25, phase="done", records_per_s=9.0)
    tell(root, 1)
    tell(root, 2)
    found = examine(root)
    assert (found.state, found.done, found.total, found.num_shards) == ("drawing", 35, 100, 4)
    assert found.records_per_s == 4.0
    assert found.eta_s == 65 / 4
    said = text(found, io.StringIO())
    assert "DRAWING" in said
    assert "35 of 100, 35.0%, 4.0/s, ETA 16 s" in said
    assert "4: 1 done, 2 drawing, 1 not heard of" in said


def test_failed_and_silent_shards_are_named(root: Path) -> None:
    tell(root, 1, phase="failed", error="No space left\x1b[2J on device")
    tell(root, 2, age_s=SILENT_S + 10)
    found = examine(root)
    assert found.state == "failed"
    said = text(found, io.StringIO())
    assert "shard 1 on node1, job 7_1: No space left[2J on device" in said
    assert "shard 2 on node2, job 7_2: silent for 2 min 10 s" in said
    assert "\x1b" not in said


def test_an_earlier_launch_of_another_number_of_shards_does_not_count(root: Path) -> None:
    tell(root, 0, 16, age_s=100)
    tell(root, 1, 4, age_s=1)
    found = examine(root)
    assert (found.num_shards, [shard.shard for shard in found.shards]) == (4, [1])


def test_what_cannot_be_read_counts_as_absent(root: Path) -> None:
    tell(root, 0, phase="stopped")
    tell(root, 1, done="many")
    (root / SHARDS / "00002-of-00004.json").write_text("{")
    (root / SHARDS / "00003-of-00004.json").write_text("[]")
    (root / SHARDS / ".tmp-00003-of-00004.json-1-ab").write_text("")
    (root / MANIFEST_FILE).write_text("{")
    found = examine(root)
    assert (found.state, found.total, len(found.shards)) == ("stopped", None, 1)
    assert "the same command goes on" in text(found, io.StringIO())
    with pytest.raises(UserError, match="not a folder that sample made"):
        examine(root / SHARDS)


def test_jobs_that_were_submitted_and_have_not_begun_are_a_new_set(tmp_path: Path) -> None:
    (tmp_path / ".submitit").mkdir()
    found = examine(tmp_path)
    assert (found.state, found.done, found.total) == ("new", 0, None)
    assert "NEW; no shard has begun" in text(found, io.StringIO())


def test_a_finished_root_is_finished(root: Path) -> None:
    (root / SUMS_FILE).write_text("")
    found = examine(root)
    assert (found.state, found.done) == ("finished", 100)


def test_a_shard_tells_seldom_and_how_it_ended(root: Path) -> None:
    now = [0.0]

    def said() -> tuple[str, int, float]:
        (shard,) = examine(root).shards
        return shard.phase, shard.done, shard.records_per_s

    with Beat(root, 3, 4, total=25, done=5, clock=lambda: now[0]) as beat:
        assert said() == ("drawing", 5, 0.0)
        now[0] = EVERY_S - 0.1
        beat.beat(6)
        assert said()[1] == 5
        now[0] = EVERY_S
        beat.beat(15)
        assert said() == ("drawing", 15, 2.0)
    assert said()[0] == "done"
    for error, phase in ((ValueError("two\nlines"), "failed"), (KeyboardInterrupt(), "stopped")):
        with pytest.raises(type(error)), Beat(root, 3, 4, total=25):
            raise error
        assert said()[0] == phase
    with pytest.raises(ValueError, match="two"), Beat(root, 3, 4, total=25):
        raise ValueError("two\nlines")
    assert examine(root).shards[0].error == "two lines"


def test_a_shard_that_cannot_tell_goes_on(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / SHARDS).write_text("")
    with Beat(root, 0, 1, total=1, clock=iter(range(0, 1000, 10)).__next__) as beat:
        beat.beat(1)
    assert caplog.text.count("no progress file") == 1


def test_status_loads_nothing_heavy(root: Path) -> None:
    code = (
        "import sys; from sssd_hpc import cli; "
        f"cli.main(['status', {str(root)!r}]); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sssd_hpc.generate.status" in loaded
    assert not {"torch", "numpy", "wfdb", "scipy"} & loaded
