"""What drawing costs: the page says what the results do, and the measurement runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import sampling
from tests.generate.conftest import make_run


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads((sampling.RESULTS / "sampling.json").read_text())
    text = sampling.PAGE.read_text()
    assert sampling.page(text, results) == text
    assert sampling.section(results) in text
    assert set(results["networks"]) == set(sampling.NETWORKS)
    assert results["networks"]["sssd_ecg"]["drawn"]["steps"] == 20


def test_a_quick_measurement_times_calls_and_a_drawing(tmp_path: Path) -> None:
    out = tmp_path / "sampling.json"
    assert sampling.main(["--quick", "--out", str(out)]) == 0
    (network,) = json.loads(out.read_text())["networks"].values()
    assert [row["batch"] for row in network["calls"]] == [1, 2]
    drawn = network["drawn"]
    assert drawn["record_s"] == pytest.approx(drawn["seconds"] / drawn["batch"])
    assert drawn["steps"] == 20


def test_what_bfloat16_does_is_measured_on_a_trained_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ("NORM",), length=64)
    found = sampling.rounding(tmp_path / "run")
    assert 0.0 < found["rms_uv"] < found["most_uv"]
    assert found["rms_uv"] < 0.1 * found["signal_rms_uv"]


def test_times_are_told_in_units_that_people_use() -> None:
    assert [sampling.hours(s) for s in (5, 90, 5400, 172_800)] == ["5 s", "1.5 min", "1.5 h", "2 d"]
