"""Proportions with their intervals, and how far raters agree beyond chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.evaluate.metrics import wilson


@dataclass(frozen=True)
class Proportion:
    """`count` of `n`, with its 95 % Wilson interval; NaN, with `reason`, of none."""

    count: int
    n: int
    reason: str = ""

    @property
    def value(self) -> float:
        """count / n."""
        return self.count / self.n if self.n else math.nan

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return what JSON can hold: None for NaN."""
        low, high = wilson(self.count, self.n)
        numbers = {"value": self.value, "low": low, "high": high}
        cells = {name: None if math.isnan(v) else v for name, v in numbers.items()}
        reason = self.reason or ("" if self.n else "no answers")
        return {"count": self.count, "n": self.n, **cells, "reason": reason or None}


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[float, str]:
    """Return Cohen's kappa of two raters over the same items, or NaN and why.

    (p_o - p_e) / (1 - p_e), p_e from each rater's own shares.
    Source: Cohen, Educational and Psychological Measurement 1960.
    """
    if not first:
        return math.nan, "no record was answered by both"
    first_row, second_row = _coded(first, second)
    observed = float(np.mean(first_row == second_row))
    size = int(max(first_row.max(), second_row.max())) + 1
    shares = [np.bincount(row, minlength=size) / len(row) for row in (first_row, second_row)]
    return _beyond_chance(observed, float(shares[0] @ shares[1]))


def fleiss_kappa(answers: Sequence[Sequence[Hashable]]) -> tuple[float, str]:
    """Return Fleiss' kappa of several raters, or NaN and why; `answers` has a row a rater.

    Source: Fleiss, Psychological Bulletin 1971.
    """
    if len(answers) < 2 or not answers[0]:
        return math.nan, "no record was answered by all"
    coded = np.stack(_coded(*answers))
    size, (raters, items) = int(coded.max()) + 1, coded.shape
    counts = np.stack([np.bincount(coded[:, item], minlength=size) for item in range(items)])
    observed = float(((counts**2).sum(axis=1) - raters).mean() / (raters * (raters - 1)))
    shares = counts.sum(axis=0) / (raters * items)
    return _beyond_chance(observed, float(shares @ shares))


def _beyond_chance(observed: float, expected: float) -> tuple[float, str]:
    if math.isclose(expected, 1.0):
        return math.nan, "all gave one and the same answer throughout"
    return (observed - expected) / (1 - expected), ""


def _coded(*rows: Sequence[Hashable]) -> list[NDArray[Any]]:
    """Return rows of answers as numbers from 0."""
    numbers: dict[Hashable, int] = {}
    for row in rows:
        for answer in row:
            numbers.setdefault(answer, len(numbers))
    return [np.array([numbers[answer] for answer in row], dtype=np.int64) for row in rows]
