"""Binary classification metrics with bootstrap intervals, and the choice of a threshold.

A metric that the data cannot define is NaN with a reason: never a crash, never a made-up number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]

MIN_PER_CLASS = 2
NUM_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval; `reason` says why it is NaN."""

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Return what JSON can hold: None for NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        cells = {name: None if math.isnan(v) else v for name, v in numbers.items()}
        return {**cells, "reason": self.reason or None}


def roc_auc(labels: Labels, scores: Scores) -> float:
    """Return the area under the ROC curve: the chance that a positive outranks a negative.

    Labels (n,) are 0 or 1; a tie counts half; NaN for a single class.
    Source: the Mann-Whitney statistic U / (n_pos n_neg) with mid-ranks.
    """
    num_pos = int(np.count_nonzero(labels == 1))
    num_neg = labels.size - num_pos
    if num_pos == 0 or num_neg == 0:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mid_ranks[inverse.reshape(-1)][labels == 1].sum())
    return (rank_sum - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg)


def _confusion(labels: Labels, scores: Scores, threshold: float) -> tuple[int, int, int, int]:
    """Return TP, FP, TN, FN where a score at or above the threshold is called positive."""
    called = scores >= threshold
    true = labels == 1
    return (
        int(np.count_nonzero(called & true)),
        int(np.count_nonzero(called & ~true)),
        int(np.count_nonzero(~called & ~true)),
        int(np.count_nonzero(~called & true)),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def sensitivity(labels: Labels, scores: Scores, threshold: float) -> float:
    """Return TP / (TP + FN)."""
    tp, _, _, fn = _confusion(labels, scores, threshold)
    return _ratio(tp, tp + fn)


def specificity(labels: Labels, scores: Scores, threshold: float) -> float:
    """Return TN / (TN + FP)."""
    _, fp, tn, _ = _confusion(labels, scores, threshold)
    return _ratio(tn, tn + fp)


def precision(labels: Labels, scores: Scores, threshold: float) -> float:
    """Return TP / (TP + FP), NaN if nothing is called positive."""
    tp, fp, _, _ = _confusion(labels, scores, threshold)
    return _ratio(tp, tp + fp)


def f1(labels: Labels, scores: Scores, threshold: float) -> float:
    """Return 2 TP / (2 TP + FP + FN)."""
    tp, fp, _, fn = _confusion(labels, scores, threshold)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def g_mean(labels: Labels, scores: Scores, threshold: float) -> float:
    """Return the geometric mean of sensitivity and specificity.

    Source: SSSD-ECG-nle (arXiv 2407.11108), section IV-E.
    """
    both = sensitivity(labels, scores, threshold) * specificity(labels, scores, threshold)
    return math.sqrt(both) if both >= 0 else math.nan


def _roc_auc_at(labels: Labels, scores: Scores, threshold: float) -> float:
    return roc_auc(labels, scores)


METRICS: dict[str, Callable[[Labels, Scores, float], float]] = {
    "roc_auc": _roc_auc_at,
    "g_mean": g_mean,
    "f1": f1,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "precision": precision,
}
"""Every metric by name, best known first; `roc_auc` alone needs no threshold."""


def why_undefined(labels: Labels, scores: Scores) -> str:
    """Return why no metric can be computed for these records, or an empty text."""
    num_pos = int(np.count_nonzero(labels == 1))
    num_neg = labels.size - num_pos
    if min(num_pos, num_neg) < MIN_PER_CLASS:
        return (
            f"{num_pos} positive and {num_neg} negative records: "
            f"at least {MIN_PER_CLASS} of each are needed"
        )
    if not np.isfinite(scores).all():
        return "the classifier gave scores that are not finite"
    if np.ptp(scores) == 0:
        return "the classifier gave every record the same score"
    return ""


def choose_threshold(labels: Labels, scores: Scores) -> tuple[float, str]:
    """Return the threshold of greatest G-mean on validation records, and why it is NaN if it is.

    The paper names no criterion; it reports the G-mean first, so that is maximised. Candidates lie
    half-way between neighbouring distinct scores; of equals the middle one is taken.
    """
    reason = why_undefined(labels, scores)
    if reason:
        return math.nan, reason
    distinct = np.unique(np.asarray(scores, dtype=np.float64))
    candidates = (distinct[1:] + distinct[:-1]) / 2
    # Counting from sorted scores keeps this O(n log n) for large validation folds.
    pos, neg = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    sens = 1 - np.searchsorted(pos, candidates) / pos.size
    spec = np.searchsorted(neg, candidates) / neg.size
    product = sens * spec
    best = np.flatnonzero(product == product.max())
    return float(candidates[best[len(best) // 2]]), ""


def score(
    labels: Labels,
    scores: Scores,
    threshold: float,
    *,
    threshold_reason: str = "",
    num_bootstraps: int = NUM_BOOTSTRAPS,
    seed: int = 0,
) -> dict[str, Metric]:
    """Return every metric of (n,) labels 0/1 and (n,) scores with its 95 % bootstrap interval.

    Records are drawn with replacement and a draw counts only if it keeps a positive and a negative
    (Strodthoff et al., arXiv 2004.13701: each class keeps a positive); the interval spans the 2.5
    and 97.5 percentiles. It covers the choice of test records, not of training records or seed.

    Args:
        labels: 1 for positive, 0 for negative.
        scores: greater means more likely positive.
        threshold: from validation records; NaN leaves all but ROC-AUC undefined.
        threshold_reason: why the threshold is NaN.
        num_bootstraps: resamples behind an interval.
        seed: of the resampling.
    """
    reason = why_undefined(labels, scores)
    if reason:
        return {name: Metric(math.nan, reason=reason) for name in METRICS}
    draws = _bootstrap(labels, num_bootstraps, seed)
    results = {}
    for name, metric in METRICS.items():
        if name != "roc_auc" and math.isnan(threshold):
            results[name] = Metric(math.nan, reason=f"no threshold: {threshold_reason}")
            continue
        value = metric(labels, scores, threshold)
        if math.isnan(value):
            results[name] = Metric(math.nan, reason="nothing was called positive")
            continue
        sample = np.array([metric(labels[draw], scores[draw], threshold) for draw in draws])
        sample = sample[~np.isnan(sample)]
        low, high = np.percentile(sample, [2.5, 97.5]) if sample.size else (math.nan, math.nan)
        results[name] = Metric(value, float(low), float(high))
    return results


def roc_auc_gap(
    labels: Labels,
    first: Scores,
    second: Scores,
    *,
    num_bootstraps: int = NUM_BOOTSTRAPS,
    seed: int = 0,
) -> Metric:
    """Return the ROC-AUC of `first` minus that of `second`, with its 95 % bootstrap interval.

    Both score the same records, so every draw takes the same ones for both: what makes a record
    hard for both cancels, and the interval is that of the difference itself.
    """
    reason = why_undefined(labels, first) or why_undefined(labels, second)
    if reason:
        return Metric(math.nan, reason=reason)
    gaps = [
        roc_auc(labels[draw], first[draw]) - roc_auc(labels[draw], second[draw])
        for draw in _bootstrap(labels, num_bootstraps, seed)
    ]
    low, high = np.percentile(gaps, [2.5, 97.5])
    return Metric(roc_auc(labels, first) - roc_auc(labels, second), float(low), float(high))


def _bootstrap(labels: Labels, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Draw `count` index sets with replacement, each holding both classes."""
    generator = np.random.default_rng(seed)
    draws: list[NDArray[np.int64]] = []
    while len(draws) < count:
        draw = generator.integers(0, labels.size, labels.size)
        if 0 < int(np.count_nonzero(labels[draw] == 1)) < labels.size:
            draws.append(draw)
    return draws
