"""Measures on features against independent implementations, and at the edges of their domain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel

from sssd_hpc.evaluate.classify import FEATURE_BOUND, Classifier, window_starts
from sssd_hpc.evaluate.comparison import Side, Undefined, compare, measured
from sssd_hpc.evaluate.features import (
    FEATURES,
    frechet_by_label,
    frechet_distance,
    kernel_distance,
    overlap,
)
from sssd_hpc.evaluate.xresnet1d import XResNet1d

OVERLAP = ("precision", "recall", "density", "coverage")


def cloud(count: int = 200, width: int = 6, *, mean: float = 0.0, spread: float = 1.0, seed: int):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return mean + spread * generator.normal(size=(count, width)) @ mixing


def side(features: np.ndarray, labels: np.ndarray | None = None) -> Side:
    count = len(features)
    return Side(
        signals_mv=np.zeros((count, 12, 4), np.float32),
        labels=np.zeros((count, 1), int) if labels is None else labels,
        features=features,
        rate_hz=100,
    )


def frechet_by_square_root(first: np.ndarray, second: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1])
    gap = first.mean(axis=0) - second.mean(axis=0)
    return float(gap @ gap + np.trace(sum(covariances) - 2 * root.real))


def test_frechet_distance_matches_the_matrix_square_root():
    first, second = cloud(seed=0), cloud(300, mean=0.3, spread=1.4, seed=1)
    expected = frechet_by_square_root(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_fewer_records_than_features_is_that_of_their_subspace():
    first, second = cloud(30, seed=0), cloud(30, mean=0.3, seed=1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(100, 100)))
    expected = frechet_by_square_root(first, second)
    found = frechet_distance(first @ turn[:6], second @ turn[:6])
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_two_normals_is_the_closed_form():
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=(50, 1)) for _ in range(2))
    first = 2 * (first - first.mean()) / first.std(ddof=1)
    second = 5 * (second - second.mean()) / second.std(ddof=1) + 1
    assert frechet_distance(first, second) == pytest.approx((5 - 2) ** 2 + 1)


@pytest.mark.parametrize("count", [2, 5, 200])
def test_equal_sets_are_at_no_frechet_distance(count):
    features = cloud(count, width=20, seed=0)
    # Rounding of sums of size tr(C), nothing more.
    assert frechet_distance(features, features[::-1]) <= 1e-12 * np.square(features).sum()
    assert frechet_distance(np.ones((5, 3)), np.ones((5, 3))) == 0


def test_kid_matches_scikit_learn_and_is_unbiased():
    first, second = cloud(40, seed=0), cloud(55, mean=0.2, seed=1)
    ours, theirs = (polynomial_kernel(x, degree=3) for x in (first, second))
    expected = (ours.sum() - np.trace(ours)) / (40 * 39) + (theirs.sum() - np.trace(theirs)) / (
        55 * 54
    )
    expected -= 2 * polynomial_kernel(first, second, degree=3).mean()
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-10)
    many = [
        kernel_distance(cloud(20, seed=2 * seed), cloud(20, seed=2 * seed + 1))
        for seed in range(200)
    ]
    assert abs(np.mean(many)) < 3 * np.std(many) / math.sqrt(len(many))


def test_precision_recall_density_coverage_match_prdc(capsys):
    real, fake = cloud(150, seed=0), cloud(120, mean=0.8, spread=0.7, seed=1)
    expected = compute_prdc(real, fake, nearest_k=5)
    found = overlap(side(fake), side(real))
    for name in OVERLAP:
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
        assert 0 < found[name] < 1


def test_equal_sets_overlap_wholly_and_distant_ones_not_at_all():
    here, far = side(cloud(seed=0)), side(cloud(seed=0) + 1000)
    same = overlap(side(cloud(seed=0)), here)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert overlap(far, here) == dict.fromkeys(OVERLAP, 0.0)
    constant = side(np.ones((20, 3)))
    assert overlap(constant, side(np.ones((20, 3))))["precision"] == 1


def test_collapse_costs_recall_and_coverage_and_not_precision():
    features = cloud(seed=0)
    collapsed = np.repeat(features[:4], 50, axis=0) + 1e-3 * cloud(seed=1)
    found = overlap(side(collapsed), side(features))
    assert found["precision"] == 1
    assert found["recall"] < 0.1
    assert found["coverage"] < 0.3


def test_labels_that_do_not_fit_show_within_labels_alone():
    labels = np.repeat([[1, 0], [0, 1]], 100, axis=0)
    first, second = (cloud(seed=seed) + 3 * labels[:, :1] for seed in (0, 1))
    reference = side(first, labels)
    right, wrong = side(second, labels), side(second, labels[::-1])
    assert frechet_by_label(wrong, reference) > 10 * frechet_by_label(right, reference)
    assert frechet_distance(wrong.features, first) == frechet_distance(right.features, first)


def test_too_few_records_are_a_reason():
    few = side(cloud(5, seed=0), np.ones((5, 1), int))
    with pytest.raises(Undefined, match="more than 5 records"):
        overlap(few, side(cloud(seed=1)))
    with pytest.raises(Undefined, match="no label has 2 records on both sides"):
        frechet_by_label(few.take(np.array([0])), few)
    with pytest.raises(Undefined, match="no label has 2 records"):
        frechet_by_label(side(cloud(seed=0)), side(cloud(seed=1)))
    for measure in FEATURES:
        value, reason = measured(measure, few.take(np.array([0])), few, [0])
        assert math.isnan(value)
        assert "1 given" in reason


def test_every_measure_finds_its_floor_when_nothing_is_wrong():
    labels = np.ones((120, 1), int)
    real, synthetic = side(cloud(120, seed=0), labels), side(cloud(120, seed=1), labels)
    for name, result in compare(FEATURES, real, synthetic).items():
        assert result.reason == "", name
        assert result.low <= result.floor_high, name
        assert result.high >= result.floor_low, name


def test_features_are_what_the_last_layer_reads():
    signals = np.random.default_rng(0).normal(0, 0.1, (70, 12, 400)).astype(np.float32)
    network = XResNet1d(num_outputs=3, num_blocks=(1, 1), width=8)
    classifier = Classifier(network, 0.0, 0.1, 250)
    features = classifier.features(signals)
    assert features.shape == (70, 128)
    last = classifier.network.head[-1]
    starts = window_starts(400, classifier.window, classifier.window)
    with torch.no_grad():
        windows = torch.stack(
            [classifier.standardise(signals)[..., s : s + classifier.window] for s in starts]
        )
        logits = torch.stack([classifier.network(window) for window in windows]).mean(dim=0)
        # The last layer is linear: the mean over windows may be taken before or after it.
        unbounded = FEATURE_BOUND * np.arctanh(features / FEATURE_BOUND)
        again = last(torch.from_numpy(unbounded).float())
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


def test_one_record_far_out_does_not_rule_the_features():
    signals = np.random.default_rng(0).normal(0, 0.1, (20, 12, 400)).astype(np.float32)
    classifier = Classifier(XResNet1d(num_outputs=1, num_blocks=(1, 1), width=8), 0.0, 0.1, 250)
    signals[3] *= 1000
    assert np.abs(classifier.features(signals)).max() <= FEATURE_BOUND
