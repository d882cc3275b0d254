"""Every privacy measure sees planted copies; the distance to the closest misses moved ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score, roc_curve

from sssd_hpc.ecg import simulate
from sssd_hpc.ecg.leads import EIGHT, LEADS, positions, to_twelve
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import copies, privacy, self_test
from sssd_hpc.evaluate.comparison import Side
from sssd_hpc.evaluate.damage import COPIES, DAMAGES

MEMBERSHIP = ("membership_signal", "membership_features")


def features(signals: np.ndarray) -> np.ndarray:
    """Describe records as a classifier would: by their spectra, coarsely."""
    leads = signals[:, positions(LEADS, EIGHT)]
    magnitudes = np.abs(np.fft.rfft(leads, axis=2))[:, :, 5:200].reshape(len(leads), 8, 15, 13)
    return np.log(magnitudes.mean(axis=3) + 1e-3).reshape(len(leads), -1).astype(np.float64)


def side(seed: int, count: int) -> Side:
    adc = [simulate.simulate_record(seed, simulate.place(seed, k))[1] for k in range(count)]
    signals = (np.stack(adc) / 1000).astype(np.float32)
    patients = np.array([simulate.place(seed, k).patient for k in range(count)])
    return Side(signals, np.zeros((count, 1), np.int64), features(signals), 100, patients=patients)


@pytest.fixture(scope="module")
def sides() -> tuple[Side, Side, Side]:
    """Synthetic, training and held-out records, all simulated: a generator that copies nothing."""
    return side(21, 100), side(22, 100), side(23, 100)


@pytest.fixture(scope="module")
def tested(sides) -> self_test.SelfTest:
    """What the self-test says of measures of privacy, a hundred records a side."""
    synthetic, training, heldout = sides
    both = Side(
        np.concatenate([synthetic.signals_mv, heldout.signals_mv]),
        (np.arange(200)[:, None] % 3 == 0).astype(np.int64),
        np.concatenate([synthetic.features, heldout.features]),
        100,
    )
    training = replace(training, labels=both.labels[:100])
    measures = privacy.as_measures(training)
    return self_test.self_test(
        measures, both, training, features, damages=COPIES, doses=(0.2, 0.6), repeats=3, seed=1
    )


def test_every_measure_sees_the_copies_it_declares_to_see(tested) -> None:
    assert tested.failures == []
    assert len(tested.measures) == 5
    json.dumps(tested.to_json(), allow_nan=False)


@pytest.mark.parametrize("kind", list(copies.PLANTS))
@pytest.mark.parametrize("name", ["membership_signal", "copies", "distance_ratio"])
def test_aligned_measures_rise_with_the_dose_of_any_disguise(tested, name: str, kind: str) -> None:
    cell = tested.cell(f"privacy_{name}", f"{kind}_copies")
    assert cell.status == "seen"
    assert 0 == cell.shifts[0] < cell.shifts[1] < cell.shifts[2]


def test_the_distance_to_the_closest_record_alone_misses_shifted_copies(tested) -> None:
    assert tested.cell("privacy_closest_record", "shifted_copies").least_dose is None
    assert tested.cell("privacy_closest_record", "exact_copies").status == "seen"
    assert tested.cell("privacy_copies", "shifted_copies").status == "seen"


@pytest.mark.parametrize("kind", list(copies.PLANTS))
@pytest.mark.parametrize("dose", [0.0, 0.2, 0.6])
def test_copies_are_counted_at_their_dose(sides, kind: str, dose: float) -> None:
    synthetic, training, heldout = sides
    planted, _ = DAMAGES[f"{kind}_copies"].apply(
        synthetic, training, dose, np.random.default_rng(1)
    )
    audit = privacy.Audit(replace(synthetic, signals_mv=planted), training, heldout)
    (counted,) = [one.compute(audit) for one in privacy.MEASURES if one.name == "copies"]
    assert counted.value == pytest.approx(dose, abs=0.05)
    assert counted.exposed == (dose > 0)


def test_a_generator_that_copies_everything_is_exposed(sides) -> None:
    _, training, heldout = sides
    found = privacy.audit(training, training, heldout)
    for name in MEMBERSHIP:
        assert found.leaks[name].value > 0.97
        assert found.leaks[name].exposed
    assert found.leaks["copies"].value == 1
    assert found.leaks["closest_record"].value == 1


def test_an_honest_generator_is_not_exposed(sides) -> None:
    found = privacy.audit(*sides)
    for name in (*MEMBERSHIP, "copies", "distance_ratio", "closest_record"):
        assert not found.leaks[name].exposed, name
        assert found.leaks[name].low <= found.leaks[name].high
    assert found.recall > 0.9
    assert found.num_planted == 100
    assert found.counts == {"synthetic": 100, "training": 100, "heldout": 100}


def test_the_worst_pairs_are_named_with_shift_and_gain(sides) -> None:
    synthetic, training, heldout = sides
    signals = synthetic.signals_mv.copy()
    signals[7] = 0.5 * np.roll(training.signals_mv[31], 120, axis=1)
    planted = replace(synthetic, signals_mv=signals)
    ids = 1000 + np.arange(100), 5000 + np.arange(100)
    found = privacy.audit(planted, training, heldout, synthetic_ids=ids[0], training_ids=ids[1])
    worst = found.pairs[0]
    assert (worst.synthetic, worst.training, worst.copy) == (1007, 5031, True)
    assert worst.shift_s == pytest.approx(1.2, abs=0.011)
    assert worst.gain == pytest.approx(0.5, abs=0.01)
    assert [pair.similarity for pair in found.pairs] == sorted(
        (pair.similarity for pair in found.pairs), reverse=True
    )
    cells = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert cells["pairs"][0]["synthetic"] == 1007
    assert cells["measures"]["copies"]["title"]


def test_the_same_seed_finds_the_same(sides) -> None:
    small = [one.take(np.arange(40)) for one in sides]
    assert privacy.audit(*small, seed=3).to_json() == privacy.audit(*small, seed=3).to_json()


def test_features_of_the_tried_members_alone_say_the_same(sides) -> None:
    synthetic, training, heldout = sides
    tried = training.features[privacy.members(100, 0)]
    bare = replace(training, features=np.empty((100, 0)))
    whole = privacy.audit(*sides)
    assert privacy.audit(synthetic, bare, heldout, member_features=tried) == whole
    with pytest.raises(UserError, match="numbers of features"):
        privacy.audit(synthetic, bare, heldout)


@pytest.mark.parametrize("emptied", ["synthetic", "training", "heldout"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_small_sets_are_undefined_with_a_reason(sides, emptied: str, count: int) -> None:
    given = dict(zip(("synthetic", "training", "heldout"), sides, strict=True))
    given = {name: one.take(np.arange(20)) for name, one in given.items()}
    given[emptied] = given[emptied].take(np.arange(count))
    found = privacy.audit(**given)
    leak = found.leaks["membership_signal"]
    assert math.isnan(leak.value)
    assert "at least" in leak.reason
    assert not leak.exposed
    json.dumps(found.to_json(), allow_nan=False)


def test_too_few_for_one_percent_says_so(sides) -> None:
    leak = privacy.audit(*sides).leaks["membership_signal_tpr"]
    assert leak.reason == "100 heldout records, at least 200 are needed"


def test_flat_and_identical_records_crash_nothing(sides) -> None:
    synthetic, training, heldout = sides
    flat = replace(synthetic, signals_mv=np.zeros_like(synthetic.signals_mv))
    assert privacy.audit(flat, training, heldout).leaks["copies"].value == 0
    same = np.repeat(synthetic.signals_mv[:1], 100, axis=0)
    collapsed = replace(synthetic, signals_mv=same, features=features(same))
    assert not privacy.audit(collapsed, training, heldout).leaks["copies"].exposed


def test_sides_that_do_not_fit_are_refused(sides) -> None:
    synthetic, training, heldout = sides
    with pytest.raises(UserError, match="sampling rates"):
        privacy.audit(replace(synthetic, rate_hz=500), training, heldout)


@pytest.mark.parametrize("kind", list(copies.PLANTS))
def test_planted_copies_keep_the_laws_of_the_leads(sides, kind: str) -> None:
    records = sides[1].signals_mv[:8]
    planted = copies.PLANTS[kind](records, 100, np.random.default_rng(0))
    assert planted.shape == records.shape
    assert planted.dtype == np.float32
    np.testing.assert_allclose(
        to_twelve(planted[:, positions(LEADS, EIGHT)], EIGHT), planted, atol=4e-3
    )


def test_attack_scores_equal_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    members, outsiders = (
        generator.normal(0.5, 1, 300).round(1),
        generator.normal(0, 1, 250).round(1),
    )
    labels = np.repeat([1, 0], [300, 250])
    scores = np.concatenate([members, outsiders])
    assert privacy.attack_auc(members, outsiders) == pytest.approx(roc_auc_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert privacy.attack_tpr(members, outsiders) == pytest.approx(true[false <= 0.01].max())


@pytest.mark.parametrize("count", [100, 200, 1100])
def test_of_exchangeable_values_the_ideal_lies_beyond_a_quantile(count: int) -> None:
    generator = np.random.default_rng(0)
    values, others = generator.normal(size=(2, 4000, count))
    beyond = (others[:, :10] > np.quantile(values, 0.99, axis=1, keepdims=True)).mean()
    # 4,000 quantiles: three standard errors are 0.001 at 100 values, where 0.01 would be 0.010 off.
    assert beyond == pytest.approx(privacy.tail(0.01, count), abs=0.0015)


def test_closest_equals_scipy() -> None:
    generator = np.random.default_rng(0)
    queries, base = generator.normal(size=(30, 7)), generator.normal(size=(1100, 7))
    distance, row = privacy.closest(queries, base)
    every = cdist(queries, base)
    np.testing.assert_allclose(distance, every.min(axis=1))
    np.testing.assert_array_equal(row, every.argmin(axis=1))
