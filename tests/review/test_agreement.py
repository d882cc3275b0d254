"""Intervals and kappas against published values, scipy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from sssd_hpc.review.agreement import Proportion, cohen_kappa, fleiss_kappa


def test_a_proportion_of_none_is_no_number() -> None:
    cell = Proportion(0, 0).to_json()
    assert (cell["value"], cell["low"], cell["high"]) == (None, None, None)
    assert cell["reason"] == "no answers"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("categories", [2, 4])
def test_cohens_kappa_equals_scikit_learn(seed: int, categories: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, categories, 60)
    second = np.where(rng.random(60) < 0.6, first, rng.integers(0, categories, 60))
    kappa, reason = cohen_kappa(first.tolist(), second.tolist())
    assert kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert reason == ""


# Fourteen raters put ten subjects into five categories: Fleiss' kappa is 0.210.
# Source: the worked example of Fleiss' kappa on Wikipedia.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_fleiss_kappa_is_the_published_example() -> None:
    answers = np.array([np.repeat(np.arange(5), counts) for counts in FLEISS])
    kappa, _ = fleiss_kappa(answers.T.tolist())
    assert kappa == pytest.approx(0.210, abs=5e-4)


def test_full_agreement_and_full_disagreement() -> None:
    assert cohen_kappa([True, False], [True, False])[0] == pytest.approx(1)
    assert cohen_kappa([True, False], [False, True])[0] == pytest.approx(-1)
    assert fleiss_kappa([["a", "b"]] * 3)[0] == pytest.approx(1)


def test_kappa_without_choice_or_answers_is_no_number_but_a_reason() -> None:
    for kappa, reason in (
        cohen_kappa([True] * 4, [True] * 4),
        fleiss_kappa([[True] * 4] * 3),
        cohen_kappa([], []),
        fleiss_kappa([[], [], []]),
    ):
        assert math.isnan(kappa)
        assert reason
