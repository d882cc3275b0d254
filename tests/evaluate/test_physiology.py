"""Sets of records compared by what is measured in them; failures counted, labels followed."""

from __future__ import annotations

import csv
import functools
import json
import math
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from sssd_hpc.ecg import simulate
from sssd_hpc.ecg.wfdb_io import read_record
from sssd_hpc.evaluate import physiology
from sssd_hpc.evaluate.comparison import Side, Undefined, measured
from sssd_hpc.evaluate.damage import DAMAGES
from sssd_hpc.evaluate.delineate import QUANTITIES

KINDS = tuple(simulate.KINDS)
MEASURES = {measure.name: measure for measure in physiology.MEASURES}


@pytest.fixture(scope="module")
def side(simulated) -> Side:
    kind = np.array([KINDS.index(name) for name in simulated.kinds])
    return Side(
        simulated.signals_mv,
        np.eye(len(KINDS), dtype=np.int64)[kind],
        np.zeros((len(kind), 1)),
        100,
        KINDS,
    )


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch) -> None:
    monkeypatch.setattr(physiology, "WORTH_A_POOL", 10_000)


def compute(name: str, candidate: Side, reference: Side) -> float:
    measure = MEASURES[f"physiology_{name}"]
    return measure.compute(candidate, reference, np.random.default_rng(0))


def test_processes_measure_what_one_process_measures(simulated, side, monkeypatch) -> None:
    monkeypatch.setattr(physiology, "WORTH_A_POOL", 8)
    one = physiology.table_of(side.take(np.arange(24)))
    monkeypatch.setattr(physiology, "_known", {})
    monkeypatch.setattr(physiology.os, "sched_getaffinity", lambda pid: {0, 1})
    many = physiology.measure(simulated.signals_mv[:24], 100)
    np.testing.assert_array_equal(many.values, one.values)
    assert many.failures == one.failures


def test_a_killed_process_costs_no_result(simulated, monkeypatch, caplog) -> None:
    class Broken:
        def map(self, *arguments: object, **options: object) -> None:
            raise BrokenProcessPool

    monkeypatch.setattr(physiology, "WORTH_A_POOL", 2)
    monkeypatch.setattr(physiology, "_known", {})
    monkeypatch.setattr(physiology.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(physiology, "_pool", functools.cache(lambda cores: Broken()))
    assert physiology.measure(simulated.signals_mv[:2], 100).failure_rate == 0
    assert "was killed" in caplog.text


def test_failures_are_counted_with_reasons_and_the_rest_goes_on(simulated) -> None:
    signals = simulated.signals_mv[:6].copy()
    signals[1, 4] = np.nan
    signals[2] = 0
    signals[3, 7] = 0
    table = physiology.measure(signals, 100)
    assert [bool(reason) for reason in table.failures] == [False, True, True, True, False, False]
    assert table.failure_rate == 0.5
    assert len(table.column("heart_rate")) == 3
    summary = table.summary()
    assert summary["reasons"] == {"a flat lead": 2, "samples that are not finite": 1}
    assert (summary["records"], summary["failed"]) == (6, 3)
    assert summary["quantities"]["heart_rate"]["records"] == 3
    json.dumps(summary, allow_nan=False)


def test_a_record_is_measured_once_in_whatever_set(simulated, monkeypatch) -> None:
    first = physiology.measure(simulated.signals_mv[:4], 100)
    monkeypatch.setattr(physiology, "measure_record", lambda *given: pytest.fail("measured again"))
    again = physiology.measure(simulated.signals_mv[[3, 1, 1]], 100)
    np.testing.assert_array_equal(again.values, first.values[[3, 1, 1]])
    monkeypatch.undo()
    other_rate = physiology.measure(simulated.signals_mv[:1], 200)
    assert other_rate.values[0, 0] == pytest.approx(2 * first.values[0, 0], rel=0.2)


@pytest.mark.parametrize("length", [0, 100, 999])
def test_no_records_and_short_ones_make_a_table(length: int) -> None:
    assert physiology.measure(np.zeros((0, 12, length)), 100).values.shape == (0, len(QUANTITIES))
    table = physiology.measure(np.zeros((2, 12, length)), 100)
    assert table.failure_rate == 1
    json.dumps(table.summary(), allow_nan=False)


def test_equal_sets_lie_at_distance_zero(side) -> None:
    again = side.take(np.arange(len(side))[::-1])
    for name in physiology.TITLES:
        assert compute(name, again, side) == pytest.approx(0, abs=1e-9), name
    assert compute("failures", again, side) == 0


def test_a_distance_is_the_mean_gap_of_sorted_values(side) -> None:
    first, second = side.take(np.arange(60)), side.take(np.arange(60, 120))
    sorted_rates = [np.sort(physiology.table_of(half).column("heart_rate"))
                    for half in (first, second)]  # fmt: skip
    expected = np.abs(sorted_rates[0] - sorted_rates[1]).mean()
    assert compute("heart_rate", first, second) == pytest.approx(expected)


def test_half_the_gain_shows_in_amplitudes_alone(side) -> None:
    low = replace(side, signals_mv=0.5 * side.signals_mv)
    heights = physiology.table_of(side).column("r_V5")
    assert compute("r_V5", low, side) == pytest.approx(heights.mean() / 2, rel=1e-3)
    assert compute("heart_rate", low, side) < 0.5
    assert compute("qrs", low, side) < 1


def test_lost_p_waves_show_as_a_difference_of_shares(side) -> None:
    kinds = side.labels.argmax(axis=1)
    fibrillating = side.take(np.flatnonzero(kinds == KINDS.index("fibrillation")))
    normal = side.take(np.flatnonzero(kinds == KINDS.index("normal")))
    assert compute("p_wave", fibrillating, normal) > 0.9
    with pytest.raises(Undefined, match=r"PR interval could be measured in \d records of one side"):
        compute("pr", fibrillating, normal)


def test_labels_that_say_nothing_of_the_signal_show(side, monkeypatch) -> None:
    candidate, reference = side.take(np.arange(0, 120, 2)), side.take(np.arange(1, 120, 2))
    blind = replace(candidate, labels=np.random.default_rng(0).permutation(candidate.labels))
    monkeypatch.setattr(physiology, "MIN_MEASURED", 3)
    assert compute("by_label", reference, reference) == 0
    assert compute("by_label", blind, reference) > 1.5 * compute("by_label", candidate, reference)
    with pytest.raises(Undefined, match="no label has 3 measured records"):
        compute("by_label", candidate.take(np.arange(4)), reference)


def test_sets_that_cannot_be_measured_differ_by_their_failures(side) -> None:
    flat = replace(side, signals_mv=np.zeros_like(side.signals_mv))
    assert compute("failures", flat, side) == 1
    with pytest.raises(Undefined, match="heart rate could be measured in 0 records"):
        compute("heart_rate", flat, side)


def test_every_measure_sees_the_damages_it_declares_to_see(side) -> None:
    candidate, reference = side.take(np.arange(40)), side.take(np.arange(40, 120))
    declared = {name for measure in physiology.MEASURES for name in measure.sees}
    generator = np.random.default_rng(0)
    for name in sorted(declared):
        signals, labels = DAMAGES[name].apply(candidate, reference, 0.9, generator)
        damaged = replace(candidate, signals_mv=signals, labels=labels)
        for measure in physiology.MEASURES:
            if name not in measure.sees or measure.name == "physiology_by_label":
                continue
            before, _ = measured(measure, candidate, reference, [0])
            after, reason = measured(measure, damaged, reference, [0])
            # Where damage leaves nothing to measure, the report says so: that is seen too.
            assert after > 1.3 * before or "could be measured in" in reason, (measure.name, name)


@pytest.mark.parametrize("shift", [0.0, 25.0, 170.0, 300.0])
def test_the_axis_distance_is_the_cheapest_transport_round_the_circle(shift: float) -> None:
    generator = np.random.default_rng(int(shift))
    first = generator.vonmises(0.5, 1.0, 40) * 180 / np.pi + shift
    second = generator.vonmises(-0.5, 4.0, 40) * 180 / np.pi
    gap = np.abs(first[:, None] - second[None]) % 360
    cost = np.minimum(gap, 360 - gap)
    rows, columns = linear_sum_assignment(cost)
    expected = cost[rows, columns].mean()
    assert physiology.axis_distance(first, second) == pytest.approx(expected)
    assert physiology.axis_distance(second, first) == pytest.approx(expected)


def test_axes_on_both_sides_of_180_degrees_are_near() -> None:
    assert physiology.axis_distance(np.full(5, 179.0), np.full(8, -179.0)) == pytest.approx(2)


@pytest.fixture(scope="module")
def effects(side) -> dict[tuple[str, str], physiology.LabelEffect]:
    found = physiology.label_effects(side, side, min_records=5, seed=1)
    return {(effect.label, effect.quantity): effect for effect in found}


@pytest.mark.parametrize(
    ("label", "quantity", "least", "most"),
    [
        ("fibrillation", "p_wave", -1.0, -0.7),
        ("right bundle branch block", "qrs", 45, 75),
        ("left bundle branch block", "qrs", 45, 80),
        ("first degree block", "pr", 70, 150),
        ("bradycardia", "heart_rate", -35, -15),
        ("tachycardia", "heart_rate", 30, 55),
        ("right bundle branch block", "r_transition", -2.5, -1.5),
    ],
)
def test_each_label_has_the_effect_that_cardiology_gives_it(
    effects, label: str, quantity: str, least: float, most: float
) -> None:
    effect = effects[label, quantity]
    assert effect.real_is_seen
    assert least < effect.real.value < most
    assert effect.real.low <= effect.real.value <= effect.real.high
    assert effect.kept == pytest.approx(1, abs=0.1)


def test_a_generator_blind_to_labels_keeps_no_effect(side) -> None:
    shuffled = side.labels[np.random.default_rng(3).permutation(len(side))]
    blind = replace(side, labels=shuffled)
    found = physiology.label_effects(side, blind, min_records=5, quantities=("qrs", "p_wave"))
    kept = [effect.kept for effect in found if effect.real_is_seen]
    assert len(kept) >= 3
    assert np.median(np.abs(kept)) < 0.4


def test_rare_labels_and_missing_quantities_are_left_out_with_a_reason(side) -> None:
    found = physiology.label_effects(side, side, min_records=8, quantities=("pr",))
    labels = {effect.label for effect in found}
    assert {"normal", "fibrillation"} <= labels
    counts = side.labels.sum(axis=0)
    assert labels == {name for name, count in zip(KINDS, counts, strict=True) if count >= 8}
    lost = next(effect for effect in found if effect.label == "fibrillation")
    assert math.isnan(lost.real.value)
    assert "with the label" in lost.real.reason
    assert lost.to_json()["kept"] is None
    json.dumps([effect.to_json() for effect in found], allow_nan=False)


def test_real_records_have_the_medians_of_adults(ptbxl_root: Path) -> None:
    with open(ptbxl_root / "ptbxl_database.csv", newline="") as stream:
        rows = [row for row, _ in zip(csv.DictReader(stream), range(80), strict=False)]
    signals = np.stack([read_record(ptbxl_root, row["filename_lr"]).adc / 1000 for row in rows])
    table = physiology.measure(signals, 100)
    assert table.failure_rate < 0.05
    for name, low, high in (
        ("heart_rate", 60, 80), ("pr", 140, 180), ("qrs", 65, 105), ("qtc", 380, 440),
        ("axis", 0, 60), ("r_transition", 2.5, 4), ("r_V5", 0.8, 2),
    ):  # fmt: skip
        assert low < np.median(table.column(name)) < high, name
    assert np.median(table.column("lead_residual")) < 2
    normal = ["NORM" in row["scp_codes"] for row in rows]
    assert table.values[normal, QUANTITIES.index("p_wave")].mean() > 0.9
