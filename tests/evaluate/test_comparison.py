"""Every measure stands beside a floor of as many records, on the same reference."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.comparison import (
    Measure,
    Side,
    Undefined,
    compare,
    halves,
    remembered,
)


def side(count: int = 40, *, mean: float = 0.0, seed: int = 0, patients=None) -> Side:
    generator = np.random.default_rng(seed)
    return Side(
        signals_mv=generator.normal(mean, 1, (count, 12, 20)).astype(np.float32),
        labels=generator.integers(0, 2, (count, 2)),
        features=generator.normal(mean, 1, (count, 3)),
        rate_hz=100,
        patients=patients,
    )


def measure(compute, name: str = "gap") -> Measure:
    return Measure(name, "difference of means", "mV", "lower", ("noise",), compute)


def mean_gap(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    return abs(float(candidate.signals_mv.mean() - reference.signals_mv.mean()))


def test_value_and_floor_rest_on_as_many_records_and_the_same_choices():
    seen = []

    def note(candidate, reference, generator):
        seen.append((len(candidate), len(reference), reference.signals_mv[0, 0, 0], generator))
        return generator.random()

    result = compare([measure(note)], side(41), side(100, seed=1), repeats=3)["gap"]
    assert [(ours, theirs) for ours, theirs, _, _ in seen] == [(21, 20)] * 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first[2] == second[2]
    assert len({first[2] for first in seen}) == 3
    assert result.value == result.floor
    assert result.low < result.high
    assert result.interval == "least to greatest of 3 repeats"


def test_a_shifted_set_lies_above_its_floor():
    result = compare([measure(mean_gap)], side(), side(seed=1, mean=0.5))["gap"]
    assert result.value == pytest.approx(0.5, abs=0.05)
    assert result.floor_high < result.low <= result.value <= result.high
    assert (result.unit, result.better, result.reason) == ("mV", "lower", "")


def test_fewer_synthetic_records_make_the_floor_smaller_too():
    counts = []

    def note(candidate, reference, generator):
        counts.append(len(candidate))
        return 0.0

    compare([measure(note)], side(40), side(7), repeats=1)
    assert counts == [7, 7]


def test_many_repeats_give_percentiles_and_every_repeat_another_halving():
    result = compare([measure(mean_gap)], side(), side(seed=1), repeats=40)["gap"]
    assert result.interval == "2.5 to 97.5 percentile of 40 repeats"
    again = compare([measure(mean_gap)], side(), side(seed=1), repeats=40)["gap"]
    other = compare([measure(mean_gap)], side(), side(seed=1), repeats=40, seed=1)["gap"]
    assert result == again
    assert result.floor != other.floor


def test_another_measure_beside_it_moves_no_number():
    def drawn(candidate, reference, generator):
        return generator.random()

    alone = compare([measure(drawn)], side(), side(seed=1))["gap"]
    both = compare([measure(drawn, "other"), measure(drawn)], side(), side(seed=1))
    assert both["gap"] == alone
    assert both["other"] != alone


def test_halves_part_patients_not_records():
    patients = np.array([f"patient {row % 7}" for row in range(30)])
    for seed in range(20):
        first, second = halves(side(30, patients=patients), np.random.default_rng(seed))
        assert sorted([*first, *second]) == list(range(30))
        assert not set(patients[first]) & set(patients[second])
        assert abs(len(first) - len(second)) <= 10


def test_an_undefined_measure_is_nan_with_its_reason():
    def undefined(candidate, reference, generator):
        raise Undefined("no AFIB in 20 records")

    result = compare([measure(undefined), measure(mean_gap, "fine")], side(), side(seed=1))
    assert math.isnan(result["gap"].value)
    assert result["gap"].reason == "no AFIB in 20 records"
    assert result["gap"].to_json()["floor"] is None
    assert result["fine"].reason == ""


def test_a_measure_undefined_in_some_repeats_says_in_how_many():
    calls = iter([1.0, 2.0, math.nan, 9.0, 3.0, 4.0])
    result = compare([measure(lambda *_: next(calls))], side(), side(seed=1), repeats=3)["gap"]
    assert (result.value, result.floor) == (2.0, 3.0)
    assert result.reason == "undefined in 1 of 3 repeats: the measure gave no finite number"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_records_are_a_reason_and_no_crash(count):
    for heldout, synthetic in ((side(count), side(40)), (side(40), side(min(count, 1)))):
        result = compare([measure(mean_gap)], heldout, synthetic)["gap"]
        assert math.isnan(result.value)
        assert "at least 2 records" in result.reason


def test_a_record_is_measured_once_whatever_draw_it_is_in():
    whole, calls = side(10), []

    def first_sample(signals_mv, rate_hz):
        calls.append(len(signals_mv))
        return signals_mv[:, 0, 0]

    drawn = whole.take(np.array([7, 3])).take(np.array([1, 0]))
    assert (
        drawn.per_record("first", first_sample).tolist() == whole.signals_mv[[3, 7], 0, 0].tolist()
    )
    np.testing.assert_array_equal(
        whole.per_record("first", first_sample), whole.signals_mv[:, 0, 0]
    )
    assert calls == [2, 8]


def test_bad_records_are_refused_in_one_line():
    good = side(300)
    signals = good.signals_mv.copy()
    signals[270, 3, 5] = np.nan
    with pytest.raises(UserError, match="record 270 of 300 holds samples that are not finite"):
        replace(good, signals_mv=signals)
    with pytest.raises(UserError, match="features are not finite"):
        replace(good, features=np.full((300, 3), np.inf))
    with pytest.raises(UserError, match="features of shape"):
        replace(good, features=np.zeros((3, 3)))
    with pytest.raises(UserError, match="patients of shape"):
        replace(good, patients=np.zeros(2))
    with pytest.raises(UserError, match="are not \\(records, 12, samples\\)"):
        replace(good, signals_mv=np.zeros((300, 8, 20), np.float32))


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="sampling rates in Hz differ: 100"):
        compare([], side(), replace(side(), rate_hz=500))
    with pytest.raises(UserError, match="numbers of features differ"):
        compare([], side(), replace(side(), features=np.zeros((40, 4))))
    with pytest.raises(UserError, match="repeats is 0"):
        compare([], side(), side(), repeats=0)
    with pytest.raises(UserError, match="2 measures share 1 names"):
        compare([measure(mean_gap)] * 2, side(), side())


def test_a_side_is_read_from_a_store(make_store):
    store = make_store("real", num_records=30)
    rows = store.indices((9, 10))
    features = store.signals_mv(rows, LEADS)[:, :, 0].astype(np.float64)
    real = Side.of_store(store, rows, features)
    assert len(real) == 6
    assert real.features.shape == (6, 12)
    assert real.label_names == ("MI", "NORM")
    np.testing.assert_array_equal(real.patients, store.patient_id[rows])
    np.testing.assert_array_equal(real.signals_mv[:, 1], store.signals_mv(rows, ("II",))[:, 0])


def test_what_two_sides_have_in_common_is_remembered_while_both_live():
    calls = []

    @remembered
    def gap(first, second):
        calls.append(1)
        return mean_gap(first, second, np.random.default_rng(0))

    one, other = side(10), side(10, seed=1)
    watched = weakref.ref(other)
    assert gap(one, other) == gap(one, other)
    assert len(calls) == 1
    assert gap(other, one) == gap(one, other)
    assert len(calls) == 2
    del other
    assert watched() is None
    assert gap(one, side(10, seed=1)) > 0
    assert len(calls) == 3
