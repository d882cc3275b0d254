"""The doctor tries things, names reasons, and exits by what the main job needs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from sssd_hpc import cli, doctor


def test_this_machine_can_run_the_main_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    for name in ("torch", "wfdb", "deepspeed", "disk", "op nplr [torch] on cpu"):
        assert findings[name]["usable"], findings[name]
    assert all(row["detail"] for row in findings.values())


def test_a_missing_library_is_named_and_stops_the_main_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def broken(name: str) -> object:
        if name == "wfdb":
            raise ImportError("No module named 'wfdb'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(doctor, "_deepspeed", lambda: doctor.Finding("deepspeed", True, "", True))
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "NO  wfdb" in capsys.readouterr().out


def test_a_broken_torch_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # None makes an import fail, as a torch without its libraries does.
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("sssd_hpc.ops")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(doctor, "_deepspeed", lambda: doctor.Finding("deepspeed", True, "", True))
    findings = {finding.name: finding for finding in doctor.examine(tmp_path)}
    for name in ("torch", "gpu", "ops"):
        assert not findings[name].usable
        assert "torch" in findings[name].detail
    assert not doctor.can_run([findings["ops"]])


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 1e12)
    assert not doctor.can_run([doctor._disk(tmp_path)])
