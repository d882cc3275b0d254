from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_program(*arguments: str) -> list[str | int]:
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_writer.py")), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    answer: list[str | int] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_a_kill_at_any_write_of_a_save_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    found = run_program("save", str(tmp_path / "killed-run"))
    assert len(found) > 15
    assert found == sorted(found)
    assert set(found) == {8, 12}


def test_a_training_killed_anywhere_and_resumed_ends_as_if_never_killed(tmp_path: Path) -> None:
    outcomes = run_program("train", str(tmp_path / "killed-run"), "6")
    assert len(outcomes) > 6
    assert set(outcomes) == {outcomes[0]}
