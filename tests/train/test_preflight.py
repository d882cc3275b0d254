"""What a node must have before training starts, and the one line that it says for each lack."""

from __future__ import annotations

import time
from collections import namedtuple
from pathlib import Path

import pytest

from sssd_hpc.train import preflight

Usage = namedtuple("Usage", "total used free")


def found(run: Path, *, skew: float = 0.0, min_free_gb: float = 0.0) -> list[str]:
    return list(preflight.problems(run, sent=100.0, now=100.0 + skew, min_free_gb=min_free_gb))


def test_a_sound_node_says_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert found(run) == []
    assert list(run.iterdir()) == []
    assert preflight.main(["--run", str(run), "--time", str(time.time())]) == 0


def test_a_full_disk_and_full_shared_memory_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(9, 9, 1_000_000))
    disk, shared = found(tmp_path, min_free_gb=2)
    assert "has 0.00 GB left, 2 GB are needed" in disk
    assert "has 1 MB left, 64 MB are needed" in shared


@pytest.mark.parametrize(("skew", "said"), [(31.0, "+31 s"), (-31.0, "-31 s")])
def test_a_wrong_clock_is_named(tmp_path: Path, skew: float, said: str) -> None:
    (problem,) = found(tmp_path, skew=skew)
    assert said in problem


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    assert preflight.main(["--run", str(run), "--time", str(time.time())]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(run) in err


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "NEEDED", ("sssd_hpc", "no_such_library"))
    (problem,) = found(tmp_path)
    assert "has no no_such_library" in problem
