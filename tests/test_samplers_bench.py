"""What samplers are worth: the page says what the results do, and the measurement runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import samplers
from bench.scaling_page import between
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from tests.generate.conftest import make_run

RESULTS = json.loads((samplers.RESULTS / "samplers.json").read_text())


def test_the_page_is_what_the_results_say() -> None:
    text = samplers.PAGE.read_text()
    assert between(text, samplers.MARK, samplers.section(RESULTS)) == text
    sets = {(row["seed"], row["method"]) for row in RESULTS["sets"]}
    assert sets >= {(seed, name) for seed in range(3) for name in samplers.METHODS}


def test_twenty_steps_are_a_tenth_of_two_hundred() -> None:
    times = RESULTS["draw_s"]
    for name in ("dpmpp, 20", "dpmpp, 20, eta 1", "distilled, 8"):
        assert times[samplers.BASELINE] / times[name] >= 9


def test_sets_are_drawn_once_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(tmp_path / "root", num_records=60, seed=0)
    store = prepare(tmp_path / "root", tmp_path / "store", labels="NORM")
    make_run(tmp_path / "run", ("NORM",), length=store.length)
    methods = {"ddpm, 200": {"sampler": "ddpm"}, "dpmpp, 2": {"sampler": "dpmpp", "steps": 2}}
    monkeypatch.setattr(samplers, "METHODS", methods)
    monkeypatch.setattr(samplers, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(f"a\n{samplers.MARK}\n{samplers.MARK}\nb\n")
    arguments = ["--data", str(store.path), "--run", str(tmp_path / "run"), "--seeds", "1"]
    arguments += ["--student", "none", "--work", str(tmp_path / "work"), "--epochs", "1"]
    arguments += ["--out", str(tmp_path / "found.json")]
    assert samplers.main(arguments) == 0
    assert "ddpm-200-0: 60 records" in capsys.readouterr().err
    first = json.loads((tmp_path / "found.json").read_text())
    assert samplers.main(arguments) == 0
    assert "60 records" not in capsys.readouterr().err
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["sets"] == first["sets"]
    assert [row["method"] for row in first["sets"]] == ["real", *methods]
    assert "| dpmpp, 2 |" in (tmp_path / "page.md").read_text()
