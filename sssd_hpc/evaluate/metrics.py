"""Binary classification metrics with bootstrap intervals, and the choice of a threshold.

A metric that the data cannot define is NaN with a reason: never a crash, never a made-up number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]
Counts = NDArray[np.integer[Any]]

MIN_PER_CLASS = 2
NUM_BOOTSTRAPS = 1000
Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


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


def roc_auc(labels: Labels, scores: Scores, counts: Counts | None = None) -> Any:
    """Return the area under the ROC curve: the chance that a positive outranks a negative.

    Labels (n,) are 0 or 1; a tie counts half; NaN for a single class. Counts (..., n) say how often
    each record was drawn, once by default; the result is of shape (...).
    Source: the Mann-Whitney statistic U / (n_pos n_neg).
    """
    order = np.argsort(scores, kind="stable")
    ranked = np.asarray(scores)[order]
    if not ranked.size:
        return math.nan
    ties = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    drawn = (np.ones(ranked.size, dtype=np.int64) if counts is None else counts)[..., order]
    true = np.asarray(labels)[order] == 1
    pos = np.add.reduceat(drawn * true, ties, axis=-1)
    neg = np.add.reduceat(drawn * ~true, ties, axis=-1)
    below = neg.cumsum(axis=-1) - neg
    return _ratio((pos * (below + neg / 2)).sum(-1), pos.sum(-1) * neg.sum(-1))


def _confusion(
    labels: Labels, scores: Scores, threshold: float, counts: Counts | None
) -> tuple[Any, Any, Any, Any]:
    """Return TP, FP, TN, FN where a score at or above the threshold is called positive."""
    called = np.asarray(scores) >= threshold
    true = np.asarray(labels) == 1
    drawn = np.ones(true.size, dtype=np.int64) if counts is None else counts
    return (
        drawn @ (called & true),
        drawn @ (called & ~true),
        drawn @ (~called & ~true),
        (drawn @ (~called & true)),
    )


def _ratio(numerator: Any, denominator: Any) -> Any:
    """Return the ratio of numbers or of arrays, NaN where the denominator is 0."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator)
    ratio = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=ratio, where=bottom != 0)
    return ratio if ratio.ndim else float(ratio)


def sensitivity(
    labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None
) -> Any:
    """Return TP / (TP + FN)."""
    tp, _, _, fn = _confusion(labels, scores, threshold, counts)
    return _ratio(tp, tp + fn)


def specificity(
    labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None
) -> Any:
    """Return TN / (TN + FP)."""
    _, fp, tn, _ = _confusion(labels, scores, threshold, counts)
    return _ratio(tn, tn + fp)


def precision(
    labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None
) -> Any:
    """Return TP / (TP + FP), NaN if nothing is called positive."""
    tp, fp, _, _ = _confusion(labels, scores, threshold, counts)
    return _ratio(tp, tp + fp)


def f1(labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None) -> Any:
    """Return 2 TP / (2 TP + FP + FN)."""
    tp, fp, _, fn = _confusion(labels, scores, threshold, counts)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def g_mean(labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None) -> Any:
    """Return the geometric mean of sensitivity and specificity.

    Source: SSSD-ECG-nle (arXiv 2407.11108), section IV-E.
    """
    given = (labels, scores, threshold, counts)
    mean = np.sqrt(np.multiply(sensitivity(*given), specificity(*given)))
    return mean if mean.ndim else float(mean)


def _roc_auc_at(
    labels: Labels, scores: Scores, threshold: float, counts: Counts | None = None
) -> Any:
    return roc_auc(labels, scores, counts)


METRICS: dict[str, Callable[..., Any]] = {
    "roc_auc": _roc_auc_at,
    "g_mean": g_mean,
    "f1": f1,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "precision": precision,
}
"""Every metric by name, best known first; `roc_auc` alone needs no threshold.

Each takes labels (n,), scores (n,), a threshold, and counts (..., n) of how often a record is
drawn; without counts it returns a number, else an array of shape (...)."""


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
    scores: Sequence[Scores],
    thresholds: Sequence[float],
    *,
    threshold_reason: str = "",
    num_bootstraps: int = NUM_BOOTSTRAPS,
    seed: int = 0,
) -> dict[str, Metric]:
    """Return every metric, the mean over classifiers, with its 95 % bootstrap interval.

    Records are drawn with replacement and a draw counts only if it keeps a positive and a negative
    (Strodthoff et al., arXiv 2004.13701: each class keeps a positive); so are classifiers where
    there are several. The interval spans the 2.5 and 97.5 percentiles. It covers the choice of test
    records and, with several classifiers, of their seeds; never that of training records.

    Args:
        labels: (n,) 1 for positive, 0 for negative.
        scores: of each classifier (n,); greater means more likely positive.
        thresholds: of each classifier, from validation records; NaN leaves all but ROC-AUC
            undefined.
        threshold_reason: why a threshold is NaN.
        num_bootstraps: resamples behind an interval.
        seed: of the resampling.
    """
    reason = next(filter(None, (why_undefined(labels, each) for each in scores)), "")
    if reason:
        return {name: Metric(math.nan, reason=reason) for name in METRICS}
    draws = bootstrap(labels, num_bootstraps, seed)
    chosen = picks(len(scores), num_bootstraps, seed)
    results = {}
    for name, metric in METRICS.items():
        if name != "roc_auc" and any(map(math.isnan, thresholds)):
            results[name] = Metric(math.nan, reason=f"no threshold: {threshold_reason}")
            continue
        pairs = list(zip(scores, thresholds, strict=True))
        values = [metric(labels, each, threshold) for each, threshold in pairs]
        if any(map(math.isnan, values)):
            results[name] = Metric(math.nan, reason="nothing was called positive")
            continue
        drawn = np.stack([metric(labels, each, threshold, draws) for each, threshold in pairs])
        results[name] = with_interval(values, drawn, chosen)
    return results


def roc_auc_gap(
    labels: Labels,
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    num_bootstraps: int = NUM_BOOTSTRAPS,
    seed: int = 0,
) -> Metric:
    """Return the ROC-AUC of `first` minus that of `second`, with its 95 % bootstrap interval.

    Both are lists of classifiers' scores (n,) of the same records, seed by seed: every draw takes
    the same ones for both, so that what makes a record hard for both cancels, and the interval is
    that of the difference itself.
    """
    reason = next(filter(None, (why_undefined(labels, each) for each in (*first, *second))), "")
    if reason:
        return Metric(math.nan, reason=reason)
    pairs = list(zip(first, second, strict=True))
    draws = bootstrap(labels, num_bootstraps, seed)
    values = [roc_auc(labels, one) - roc_auc(labels, two) for one, two in pairs]
    drawn = np.stack(
        [roc_auc(labels, one, draws) - roc_auc(labels, two, draws) for one, two in pairs]
    )
    return with_interval(values, drawn, picks(len(pairs), num_bootstraps, seed))


def bootstrap(labels: Labels, count: int, seed: int) -> Counts:
    """Draw records with replacement `count` times, each time keeping both classes.

    Returns how often each record is in each draw, (count, n).
    """
    generator = np.random.default_rng(seed)
    draws: list[Counts] = []
    while len(draws) < count:
        draw = generator.integers(0, labels.size, labels.size)
        if 0 < int(np.count_nonzero(labels[draw] == 1)) < labels.size:
            draws.append(np.bincount(draw, minlength=labels.size))
    return np.stack(draws)


def draw_any(num_records: int, count: int, seed: int) -> Counts:
    """Draw records with replacement `count` times, (count, n), whatever their labels."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_records, np.full(num_records, 1 / num_records), count)


def picks(num_classifiers: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw classifiers with replacement: (classifiers, count)."""
    return np.random.default_rng([seed, 1]).integers(0, num_classifiers, (num_classifiers, count))


def with_interval(
    values: Sequence[float] | Scores, drawn: Scores, chosen: NDArray[np.int64]
) -> Metric:
    """Return the mean of classifiers' values with the interval of their draws.

    `drawn` (S, count) are values by classifier and draw, `chosen` those of `picks`.
    """
    means = np.take_along_axis(drawn, chosen, axis=0).mean(axis=0)
    means = means[~np.isnan(means)]
    low, high = np.percentile(means, [2.5, 97.5]) if means.size else (math.nan, math.nan)
    return Metric(float(np.mean(values)), float(low), float(high))


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion without continuity correction.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); NaN for n = 0.
    Source: Wilson, JASA 1927; Newcombe, Statistics in Medicine 1998, method 3.
    """
    if n == 0:
        return math.nan, math.nan
    p, z2 = count / n, Z_95**2
    middle = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n one end is exact, which rounding would miss.
    low = 0.0 if count == 0 else (middle - half) / (1 + z2 / n)
    high = 1.0 if count == n else (middle + half) / (1 + z2 / n)
    return low, high
