from __future__ import annotations

from pathlib import Path

import pytest

from sssd_hpc.train import metrics


def test_lines_beyond_the_resumed_count_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for samples in (4, 8, 12):
        metrics.append(path, {"samples": samples, "loss": 0.5})
    metrics.truncate(path, 8)
    assert path.read_text() == ('{"samples": 4, "loss": 0.5}\n{"samples": 8, "loss": 0.5}\n')


@pytest.mark.parametrize("tail", ['{"samples": 8, "lo', "\0\0\0\n", "[1]\n", '{"loss": 1}\n'])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 4}\n' + tail)
    metrics.truncate(path, 8)
    assert path.read_text() == '{"samples": 4}\n'


def test_truncating_an_absent_file_makes_none(tmp_path: Path) -> None:
    metrics.truncate(tmp_path / "metrics.jsonl", 8)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"absent/metrics\.jsonl"):
        metrics.append(tmp_path / "absent" / "metrics.jsonl", {"samples": 4})
