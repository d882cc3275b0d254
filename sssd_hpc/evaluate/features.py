"""Measures on a classifier's features: how far two clouds of records lie, how they overlap.

Features are what the last layer of a classifier of labels reads, so these see what matters for
labels and may overlook the rest; `relations` looks at the signals themselves. What each declares to
see is what it sees with a hundred records a side; more records let it see more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.evaluate.comparison import MIN_RECORDS, Measure, Side, Undefined, remembered

Array = NDArray[np.floating[Any]]

NEIGHBOURS = 5
"""k of precision, recall, density and coverage (Naeem et al., section 3.3)."""
MAX_RECORDS = 2500
"""First records of a side of which every pair is looked at; `compare` draws in random order."""


def frechet_distance(first: Array, second: Array) -> float:
    """Return the squared Frechet distance of Gaussians fitted to (n, d) and (m, d).

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), zero for equal sets. With C = A^T A for the
    centred records over sqrt(n - 1), the trace of the root is the nuclear norm of A_1 A_2^T: that
    needs no root of a singular matrix, so fewer records than features do no harm but bias.

    Source: Heusel et al. (arXiv 1706.08500), equation 6; Dowson and Landau (1982).
    """
    gap = first.mean(axis=0) - second.mean(axis=0)
    roots = [_root_of_covariance(side) for side in (first, second)]
    spread = sum(float(np.square(root).sum()) for root in roots)
    shared = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    return max(float(gap @ gap) + spread - 2 * shared, 0.0)


def _root_of_covariance(features: Array) -> NDArray[np.float64]:
    """Return A (min(n, d), d) with A^T A the covariance of (n, d)."""
    centred = np.asarray(features - features.mean(axis=0), dtype=np.float64)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(centred) - 1), mode="r"))


def frechet_by_label(candidate: Side, reference: Side) -> float:
    """Return the mean Frechet distance within a label, weighted by the label's real records.

    It sees a candidate whose records do not fit their labels, which no comparison of whole sets
    can. Weights keep the bias of rare labels from drowning that. A label with fewer than
    `MIN_RECORDS` records on a side is left out.

    Raises:
        Undefined: every label is.
    """
    distances, weights = [], []
    for column in range(reference.labels.shape[1]):
        ours, theirs = (
            side.features[side.labels[:, column] == 1] for side in (candidate, reference)
        )
        if min(len(ours), len(theirs)) >= MIN_RECORDS:
            distances.append(frechet_distance(ours, theirs))
            weights.append(len(theirs))
    if not distances:
        raise Undefined(f"no label has {MIN_RECORDS} records on both sides")
    return float(np.average(distances, weights=weights))


def kernel_distance(first: Array, second: Array) -> float:
    """Return KID: the unbiased squared MMD of (n, d) and (m, d), kernel (x . y / d + 1)^3.

    Unbiased at any number of records, unlike the Frechet distance, and therefore also negative.

    Source: Binkowski et al. (arXiv 1801.01401), section 3.
    """
    first, second = first[:MAX_RECORDS], second[:MAX_RECORDS]
    dimension = first.shape[1]

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / dimension + 1) ** 3)

    def within(a: Array) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def overlap(candidate: Side, reference: Side) -> dict[str, float]:
    """Return precision, recall, density and coverage of the candidate's features.

    A ball round a record reaches its k-th nearest neighbour on its own side. Precision: share of
    candidates in some real ball. Recall: share of real records in some candidate's ball. Density:
    mean number of real balls round a candidate, over k. Coverage: share of real balls that hold a
    candidate. The first two fall for outliers, the last two bear them.

    Source: Kynkaanniemi et al. (arXiv 1904.06991); Naeem et al. (arXiv 2002.09797), equations 3-5.

    Raises:
        Undefined: a side has no k-th neighbour.
    """
    fewest = min(len(candidate), len(reference))
    if fewest <= NEIGHBOURS:
        raise Undefined(f"more than {NEIGHBOURS} records are needed on each side, {fewest} given")
    between = _distances(candidate, reference)
    in_real = between <= _reach(reference)
    in_candidate = between <= _reach(candidate)[:, None]
    return {
        "precision": float(in_real.any(axis=1).mean()),
        "recall": float(in_candidate.any(axis=0).mean()),
        "density": float(in_real.sum(axis=1).mean() / NEIGHBOURS),
        "coverage": float(in_real.any(axis=0).mean()),
    }


@remembered
def _distances(first: Side, second: Side) -> NDArray[np.float64]:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(first.features[:MAX_RECORDS], second.features[:MAX_RECORDS]))


def _reach(side: Side) -> NDArray[np.float64]:
    """Return how far each record's k-th neighbour on its side is; a record itself is the 0-th."""
    return np.asarray(np.partition(_distances(side, side), NEIGHBOURS, axis=1)[:, NEIGHBOURS])


def _measure_overlap(name: str, title: str, sees: tuple[str, ...]) -> Measure:
    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        return overlap(candidate, reference)[name]

    return Measure(name, title, "", "higher", sees, compute)


FEATURES = (
    Measure(
        "frechet",
        "Frechet distance of features",
        "",
        "lower",
        ("lead_swap", "mean_collapse", "time_reversal", "double_speed"),
        lambda candidate, reference, _: frechet_distance(candidate.features, reference.features),
    ),
    Measure(
        "frechet_by_label",
        "Frechet distance of features within a label",
        "",
        "lower",
        ("label_shuffle", "lead_swap", "mean_collapse"),
        lambda candidate, reference, _: frechet_by_label(candidate, reference),
    ),
    Measure(
        "kid",
        "kernel distance of features (KID)",
        "",
        "lower",
        ("lead_swap", "mean_collapse"),
        lambda candidate, reference, _: kernel_distance(candidate.features, reference.features),
    ),
    _measure_overlap(
        "precision",
        "precision: synthetic records near a real one",
        ("mean_collapse", "double_speed"),
    ),
    _measure_overlap(
        "recall",
        "recall: real records near a synthetic one",
        ("noise", "mode_drop", "lead_swap", "mean_collapse", "time_reversal", "double_speed"),
    ),
    _measure_overlap(
        "density",
        "density of real records round a synthetic one",
        ("lead_swap", "mean_collapse", "double_speed"),
    ),
    _measure_overlap(
        "coverage",
        "coverage: real neighbourhoods that a synthetic one meets",
        ("noise", "mode_drop", "lead_swap", "mean_collapse", "time_reversal", "double_speed"),
    ),
)
