"""Measures on signals against independent implementations, and at the edges of their domain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dtaidistance import dtw_ndim
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel

from sssd_hpc.ecg.leads import EIGHT, LEADS, take
from sssd_hpc.evaluate import relations
from sssd_hpc.evaluate.comparison import Side, Undefined, compare, measured
from sssd_hpc.evaluate.relations import RELATIONS, dtw, wasserstein

RATE_HZ = 100


def side(signals: np.ndarray, features: np.ndarray | None = None) -> Side:
    count = len(signals)
    return Side(
        signals_mv=np.asarray(signals, np.float32),
        labels=np.zeros((count, 1), int),
        features=np.zeros((count, 2)) if features is None else features,
        rate_hz=RATE_HZ,
    )


def waves(count: int = 60, *, seed: int, length: int = 400, height: float = 1.0) -> np.ndarray:
    """Smooth noise whose leads are mixed: correlated in time and between leads."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(12, 12)) / 4
    white = generator.normal(size=(count, 12, length + 20))
    smooth = np.apply_along_axis(np.convolve, 2, white, np.hanning(21) / 5, mode="valid")
    return (height * np.einsum("ij,njt->nit", mixing, smooth)).astype(np.float32)


def constant(levels: np.ndarray, length: int = 20) -> np.ndarray:
    return np.broadcast_to(levels[:, None, None], (len(levels), 12, length))


@pytest.mark.parametrize("sizes", [(30, 30), (30, 41), (7, 300), (2, 3), (1, 4)])
def test_wasserstein_of_each_column_matches_scipy(sizes):
    generator = np.random.default_rng(0)
    first = generator.normal(size=(sizes[0], 4)).round(1)
    second = generator.normal(0.3, 1.5, size=(sizes[1], 4)).round(1)
    expected = [stats.wasserstein_distance(a, b) for a, b in zip(first.T, second.T, strict=True)]
    np.testing.assert_allclose(wasserstein(first, second), expected, rtol=1e-12)


def test_energy_distance_matches_scipy_where_records_are_numbers():
    generator = np.random.default_rng(0)
    u, v = generator.normal(size=40).astype(np.float32), generator.normal(1, 2, 50)
    v = v.astype(np.float32)
    found = relations.energy_euclid(side(constant(u)), side(constant(v)))
    # float32 products of a difference of squares: 1e-7 of u^2, under a root.
    assert found == pytest.approx(stats.energy_distance(u, v) ** 2, rel=1e-4)


def test_energy_distance_and_mmd_match_all_pairs_by_hand():
    first, second = waves(30, seed=0), waves(35, seed=1, height=1.3)
    one, two = (
        take(x, LEADS, EIGHT).reshape(len(x), -1).astype(np.float64) for x in (first, second)
    )
    found = relations.energy_euclid(side(first), side(second))
    rms = [
        np.sqrt(np.square(a[:, None] - b).mean(axis=2))
        for a, b in ((one, two), (one, one), (two, two))
    ]
    expected = 2 * rms[0].mean() - rms[1].mean() - rms[2].mean()
    assert found == pytest.approx(expected, rel=1e-5)
    width = np.median(rms[2][np.triu_indices(len(two), 1)])
    gamma = 1 / (2 * width**2 * one.shape[1])
    kernels = [rbf_kernel(a, b, gamma).mean() for a, b in ((one, one), (two, two), (one, two))]
    expected = math.sqrt(kernels[0] + kernels[1] - 2 * kernels[2])
    assert relations.mmd(side(first), side(second)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("length", "band"), [(40, 4), (40, 40), (41, 1), (30, 0), (1, 3), (2, 1)])
def test_dtw_matches_dtaidistance(length, band):
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5, 3, length))
    expected = [
        dtw_ndim.distance(a.T, b.T, window=band + 1) for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(dtw(first, second, band), expected, rtol=1e-12)


def test_dtw_forgives_a_shift_and_a_stretch_within_its_band():
    t = np.arange(200)
    bump = np.exp(-(((t - 100) / 8) ** 2))[None, None]
    assert dtw(bump, np.roll(bump, 15, axis=2), 20) < 1e-6
    assert dtw(bump, np.roll(bump, 15, axis=2), 5) > 0.5
    assert dtw(bump, bump, 5) == 0


def test_energy_distance_of_warped_records_is_small_when_only_time_moves():
    generator = np.random.default_rng(1)
    t = np.arange(400)
    # Less apart than the band of a second: warping can undo all of it.
    starts = generator.uniform(160, 240, (2, 80))
    sets = [np.exp(-(((t - s[:, None]) / 8) ** 2))[:, None] * np.ones((12, 1)) for s in starts]
    same = relations.energy_dtw(side(sets[0]), side(sets[1]), np.random.default_rng(0))
    taller = relations.energy_dtw(side(2 * sets[0]), side(sets[1]), np.random.default_rng(0))
    assert abs(same) < taller / 20


def test_sliced_wasserstein_matches_scipy_over_other_directions():
    first, second = waves(50, seed=0, length=RATE_HZ), waves(60, seed=1, length=RATE_HZ, height=1.4)
    found = relations.sliced_wasserstein(side(first), side(second), np.random.default_rng(0))
    one, two = (take(x, LEADS, EIGHT).reshape(len(x), -1) for x in (first, second))
    directions = np.random.default_rng(1).normal(size=(1000, one.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    slices = [stats.wasserstein_distance(one @ d, two @ d) for d in directions]
    # Two means over random directions; three standard errors of the coarser one.
    assert found == pytest.approx(np.mean(slices), abs=3 * np.std(slices) / math.sqrt(200))


def test_spectrum_counts_decibels():
    quiet = np.random.default_rng(0).normal(0, 0.1, (20, 12, 400))
    loud = 2 * quiet
    result, _ = measured(named("spectrum"), side(loud), side(quiet), [0])
    assert result == pytest.approx(20 * math.log10(2), rel=1e-3)


def test_power_of_a_sine_stands_at_its_frequency():
    t = np.arange(1000) / RATE_HZ
    record = np.broadcast_to(0.2 * np.sin(2 * np.pi * 7 * t), (1, 12, 1000)).astype(np.float32)
    power = relations.power_db(record, RATE_HZ).reshape(len(EIGHT), -1)
    hertz = np.arange(1, 91) / 2
    assert power.shape[1] == len(hertz)
    assert set(hertz[power.argmax(axis=1)]) == {7.0}
    # Welch's Hann window spreads a line over 1.5 bins of half a hertz.
    assert power.max() == pytest.approx(10 * math.log10(0.2**2 / 2 / 0.75), abs=0.01)


def test_autocorrelation_matches_its_sum():
    x = waves(3, seed=0)
    found = relations.autocorrelation(x, RATE_HZ).reshape(3, len(EIGHT), -1)
    lead = take(x, LEADS, EIGHT)[1, 2].astype(np.float64)
    lead -= lead.mean()
    expected = [lead[lag:] @ lead[:-lag] / (lead @ lead) for lag in range(4, 201, 4)]
    np.testing.assert_allclose(found[1, 2], expected, atol=1e-5)


def test_lead_correlation_matches_numpy():
    x = waves(4, seed=0)
    found = relations.lead_correlation(x, RATE_HZ)
    for record, numbers in zip(take(x, LEADS, EIGHT), found, strict=True):
        expected = np.corrcoef(record.astype(np.float64))[np.triu_indices(8, 1)]
        np.testing.assert_allclose(numbers, expected, atol=1e-6)


def test_amplitude_and_slope_are_in_millivolts_and_seconds():
    t = np.arange(500) / RATE_HZ
    ramps = np.broadcast_to(0.3 * t, (20, 12, 500))
    steeper = np.broadcast_to(0.5 * t, (20, 12, 500))
    slope, _ = measured(named("slope"), side(steeper), side(ramps), [0])
    assert slope == pytest.approx(0.2, rel=1e-3)
    amplitude, _ = measured(
        named("amplitude"), side(constant(np.full(20, 0.7))), side(constant(np.full(20, 0.5))), [0]
    )
    assert amplitude == pytest.approx(0.2, rel=1e-6)


def test_a_linear_classifier_tells_noise_from_records_and_not_records_from_records():
    real, more = side(waves(seed=0)), side(waves(seed=1))
    noisy = side(waves(seed=2) + np.random.default_rng(0).normal(0, 0.3, (60, 12, 400)))
    generator = np.random.default_rng(0)
    assert relations.discriminative_score(noisy, real, generator) > 0.45
    assert relations.discriminative_score(more, real, generator) < 0.2


@pytest.mark.parametrize("shape", [(40, 10), (10, 40)])
def test_ridge_matches_scikit_learn_in_both_forms(shape):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=shape), generator.normal(size=shape[0])
    expected = Ridge(relations.RIDGE, fit_intercept=False).fit(x, y).coef_
    np.testing.assert_allclose(relations._ridge(x, y), expected, rtol=1e-9)


def named(name: str):
    return next(measure for measure in RELATIONS if measure.name == name)


# Two measures look at randomly drawn samples or pairs, one at classification by chance.
DRAWN = {"energy_dtw", "sliced_wasserstein", "amplitude", "slope", "discriminative"}


@pytest.mark.parametrize("measure", RELATIONS, ids=lambda measure: measure.name)
def test_a_set_is_at_no_distance_from_itself(measure):
    x = side(waves(seed=0))
    value, reason = measured(measure, x, side(waves(seed=0)), [0])
    far, _ = measured(measure, side(waves(seed=1) * 3), x, [0])
    assert reason == ""
    assert abs(value) < (0.5 * far if measure.name in DRAWN else 1e-3 * far)


@pytest.mark.parametrize("measure", RELATIONS, ids=lambda measure: measure.name)
@pytest.mark.parametrize("which", ["candidate", "reference", "both", "one lead"])
def test_constant_records_give_a_number_or_a_reason(measure, which):
    flat, alive = side(np.zeros((20, 12, 400))), side(waves(20, seed=0))
    lead = waves(20, seed=1)
    lead[:, LEADS.index("V3")] = 0
    pair = {
        "candidate": (flat, alive),
        "reference": (alive, flat),
        "both": (flat, side(np.zeros((20, 12, 400)))),
        "one lead": (side(lead), alive),
    }[which]
    value, reason = measured(measure, *pair, [0])
    assert math.isfinite(value) or reason
    if which == "both" and measure.name != "mmd":
        assert value == 0


def test_constant_records_are_worse_than_real_ones():
    flat, alive = side(np.zeros((60, 12, 400))), side(waves(seed=0))
    results = compare(RELATIONS, alive, flat, repeats=3)
    for name, result in results.items():
        assert result.low > result.floor_high, name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_records_give_a_number_or_a_reason(count):
    few, many = side(waves(count, seed=0)), side(waves(seed=1))
    for measure in RELATIONS:
        for pair in ((few, many), (many, few)):
            value, reason = measured(measure, *pair, [0])
            assert math.isfinite(value) != bool(reason)


def test_real_records_that_equal_one_another_give_a_kernel_no_width():
    with pytest.raises(Undefined, match="no width"):
        relations.mmd(side(waves(seed=0)), side(np.zeros((20, 12, 400))))


def test_short_records_and_other_rates_are_measured():
    for length, rate_hz in ((60, 100), (5000, 500)):
        pair = [
            Side(
                waves(8, seed=seed, length=length), np.zeros((8, 1), int), np.zeros((8, 1)), rate_hz
            )
            for seed in (0, 1)
        ]
        for measure in RELATIONS:
            value, reason = measured(measure, *pair, [0])
            assert math.isfinite(value), (measure.name, reason)
