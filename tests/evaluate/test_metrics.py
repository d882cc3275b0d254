from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as oracle

from sssd_hpc.evaluate import metrics

RECORDS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6).map(lambda value: value / 6)),
    min_size=4,
    max_size=60,
).filter(lambda rows: 2 <= sum(label for label, _ in rows) <= len(rows) - 2)

STEADY = settings(deadline=None, derandomize=True, max_examples=60)


def _arrays(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


@STEADY
@given(RECORDS)
def test_roc_auc_equals_scikit_learn_with_ties(rows: list[tuple[int, float]]) -> None:
    labels, scores = _arrays(rows)
    assert metrics.roc_auc(labels, scores) == pytest.approx(oracle.roc_auc_score(labels, scores))


@STEADY
@given(RECORDS, st.floats(0.01, 0.99))
def test_threshold_metrics_equal_scikit_learn(
    rows: list[tuple[int, float]], threshold: float
) -> None:
    labels, scores = _arrays(rows)
    called = scores >= threshold
    sensitivity = oracle.recall_score(labels, called)
    specificity = oracle.recall_score(labels, called, pos_label=0)
    found = {name: metric(labels, scores, threshold) for name, metric in metrics.METRICS.items()}
    assert found["sensitivity"] == pytest.approx(sensitivity)
    assert found["specificity"] == pytest.approx(specificity)
    assert found["g_mean"] == pytest.approx(math.sqrt(sensitivity * specificity))
    assert found["f1"] == pytest.approx(oracle.f1_score(labels, called))
    if called.any():
        assert found["precision"] == pytest.approx(oracle.precision_score(labels, called))
    else:
        assert math.isnan(found["precision"])


@STEADY
@given(RECORDS)
def test_no_threshold_has_a_greater_g_mean_than_the_chosen_one(
    rows: list[tuple[int, float]],
) -> None:
    labels, scores = _arrays(rows)
    threshold, reason = metrics.choose_threshold(labels, scores)
    if reason:
        assert np.ptp(scores) == 0
        return
    best = max(metrics.g_mean(labels, scores, t) for t in np.linspace(-0.1, 1.1, 200))
    assert metrics.g_mean(labels, scores, threshold) == pytest.approx(best)


def test_the_threshold_lies_between_the_classes_of_a_perfect_ranking() -> None:
    labels = np.array([0, 0, 1, 1])
    assert metrics.choose_threshold(labels, np.array([0.1, 0.2, 0.6, 0.9]))[0] == pytest.approx(0.4)


def _records(num_records: int = 400, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, num_records)
    return labels, generator.normal(labels * 2.0, 1.0)


def _score(
    labels: np.ndarray, scores: np.ndarray, threshold: float, **options: Any
) -> dict[str, metrics.Metric]:
    """Score one classifier."""
    return metrics.score(labels, [scores], [threshold], **options)


def test_flipped_scores_mirror_roc_auc() -> None:
    labels, scores = _records()
    assert metrics.roc_auc(labels, -scores) == pytest.approx(1 - metrics.roc_auc(labels, scores))
    assert metrics.roc_auc(labels, scores) > 0.85


def test_every_metric_falls_when_labels_are_shuffled() -> None:
    labels, scores = _records()
    shuffled = np.random.default_rng(0).permutation(labels)
    for name, metric in metrics.METRICS.items():
        assert metric(shuffled, scores, 1.0) < metric(labels, scores, 1.0) - 0.2, name
    assert abs(metrics.roc_auc(shuffled, scores) - 0.5) < 0.08


def test_every_metric_falls_when_calls_are_flipped() -> None:
    labels, scores = _records()
    for name, metric in metrics.METRICS.items():
        assert metric(labels, -scores, -1.0) < metric(labels, scores, 1.0) - 0.5, name


@pytest.mark.parametrize(
    ("labels", "scores", "reason"),
    [
        ([], [], "0 positive and 0 negative"),
        ([1], [0.3], "1 positive and 0 negative"),
        ([0] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], "0 positive and 5 negative"),
        ([1] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], "5 positive and 0 negative"),
        ([1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], "1 positive and 3 negative"),
        ([1, 1, 0, 0], [0.5] * 4, "the same score"),
        ([1, 1, 0, 0], [0.5, math.nan, 0.1, 0.2], "not finite"),
    ],
)
def test_what_cannot_be_computed_is_nan_with_a_reason(
    labels: list[int], scores: list[float], reason: str
) -> None:
    arrays = np.array(labels, dtype=int), np.array(scores, dtype=float)
    found = _score(*arrays, 0.3)
    assert set(found) == set(metrics.METRICS)
    for metric in found.values():
        assert math.isnan(metric.value)
        assert reason in metric.reason
        assert metric.to_json()["value"] is None
    threshold, why = metrics.choose_threshold(*arrays)
    assert math.isnan(threshold)
    assert reason in why


def test_without_a_threshold_roc_auc_alone_is_known() -> None:
    found = _score(*_records(), math.nan, threshold_reason="no fold 9")
    assert found["roc_auc"].value > 0.85
    assert found["g_mean"].reason == "no threshold: no fold 9"
    assert math.isnan(found["g_mean"].value)


def test_a_threshold_above_all_scores_leaves_only_precision_undefined() -> None:
    labels, scores = _records()
    found = _score(labels, scores, 99.0, num_bootstraps=20)
    assert found["precision"].reason == "nothing was called positive"
    assert found["sensitivity"].value == found["f1"].value == found["g_mean"].value == 0
    assert found["specificity"].value == 1


def test_the_interval_matches_the_binomial_error_of_a_share() -> None:
    labels, scores = _records(1000)
    metric = _score(labels, scores, 1.0)["sensitivity"]
    error = 1.96 * math.sqrt(metric.value * (1 - metric.value) / labels.sum())
    assert metric.high - metric.low == pytest.approx(2 * error, rel=0.15)
    assert metric.low < metric.value < metric.high


def test_every_bootstrap_draw_keeps_both_classes() -> None:
    labels = np.array([1, 1] + [0] * 60)
    scores = np.arange(62.0)[::-1]
    metric = _score(labels, scores, 60.0)["roc_auc"]
    assert metric.value == metric.low == metric.high == 1


def test_a_gap_of_paired_scores_is_known_better_than_each_of_them() -> None:
    labels, scores = _records(200)
    worse = scores + np.random.default_rng(5).normal(0, 0.5, 200)
    gap = metrics.roc_auc_gap(labels, [scores], [worse])
    alone = [_score(labels, each, 1.0)["roc_auc"] for each in (scores, worse)]
    assert gap.value == pytest.approx(alone[0].value - alone[1].value)
    assert 0 < gap.low < gap.value < gap.high
    assert gap.high - gap.low < 0.8 * min(each.high - each.low for each in alone)
    assert metrics.roc_auc_gap(labels, [scores], [scores]) == metrics.Metric(0.0, 0.0, 0.0)
    assert "same score" in metrics.roc_auc_gap(labels, [scores], [np.zeros(200)]).reason


def test_the_same_seed_gives_the_same_interval() -> None:
    one, again, other = (_score(*_records(), 1.0, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one["roc_auc"].low != other["roc_auc"].low


def test_counts_stand_for_records_drawn_several_times() -> None:
    labels, scores = _records(60)
    scores = scores.round(1)
    draws = metrics.bootstrap(labels, 5, seed=0)
    assert draws.shape == (5, 60)
    assert (draws.sum(axis=1) == 60).all()
    for name, metric in metrics.METRICS.items():
        expected = [metric(np.repeat(labels, draw), np.repeat(scores, draw), 1.0) for draw in draws]
        assert metric(labels, scores, 1.0, draws) == pytest.approx(expected), name


def test_several_classifiers_give_their_mean_and_a_wider_interval() -> None:
    labels, good = _records(200)
    bad = np.random.default_rng(2).permutation(good)
    alone = [_score(labels, each, 1.0)["roc_auc"] for each in (good, bad)]
    both = metrics.score(labels, [good, bad], [1.0, 1.0])["roc_auc"]
    assert both.value == pytest.approx((alone[0].value + alone[1].value) / 2)
    assert both.low < alone[0].low
    assert both.low < both.value < both.high
    assert both.high - both.low > max(each.high - each.low for each in alone)
    gap = metrics.roc_auc_gap(labels, [good, bad], [bad, bad])
    assert gap.value == pytest.approx(both.value - alone[1].value)


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_newcombes_published_table(count: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 1998, Table I, method 3, to its four places."""
    assert metrics.wilson(count, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 20, 380])
def test_wilson_equals_scipy(n: int) -> None:
    for count in {0, 1, n // 2, n - 1, n}:
        theirs = binomtest(count, n).proportion_ci(method="wilson")
        assert metrics.wilson(count, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
