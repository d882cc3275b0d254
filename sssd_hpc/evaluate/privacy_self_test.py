"""Do the privacy measures see what they should? Copies planted in a clean set, at rising doses.

Each kind of copy hides its original in another way; `PrivacyMeasure.sees` says which ones a measure
must see. The distance to the closest record must not be relied on: it misses shifted copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.evaluate.comparison import Side
from sssd_hpc.evaluate.copies import PLANTS, Signals
from sssd_hpc.evaluate.privacy import MEASURES, Audit, Leak, measured


@dataclass(frozen=True)
class SelfTest:
    """Every measure at every dose of every kind of planted copy."""

    doses: tuple[float, ...]
    leaks: dict[str, dict[str, tuple[Leak, ...]]]
    """By measure, then by kind of copy: one for each dose."""

    def faults(self) -> list[str]:
        """Say where the highest dose does not stand out from the lowest, though it should."""
        found = []
        for measure in MEASURES:
            for kind, row in self.leaks[measure.name].items():
                defined = not math.isnan(row[-1].value)
                if kind in measure.sees and defined and row[-1].value <= row[0].high:
                    values = ", ".join(f"{leak.value:.3f}" for leak in row)
                    found.append(f"{measure.name} does not see {kind} copies: {values}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "doses": list(self.doses),
            "measures": {
                name: {kind: [leak.to_json() for leak in row] for kind, row in rows.items()}
                for name, rows in self.leaks.items()
            },
            "faults": self.faults(),
        }


def self_test(
    synthetic: Side,
    training: Side,
    heldout: Side,
    features: Callable[[Signals], NDArray[np.float64]],
    *,
    doses: Sequence[float] = (0.0, 0.05, 0.2, 0.5),
    kinds: Sequence[str] = tuple(PLANTS),
    seed: int = 0,
) -> SelfTest:
    """Plant copies of training records in a clean set and see which measures notice.

    Args:
        synthetic: records that copy nothing, as other simulated ones.
        training: what is copied.
        heldout: other real records.
        features: maps signals (n, 12, L) in mV to the features that the sides hold.
        doses: shares of the synthetic records replaced, rising.
        kinds: names of `PLANTS`.
        seed: of the choice of records and of the disguise.
    """
    clean: dict[str, Leak] = {}
    leaks: dict[str, dict[str, tuple[Leak, ...]]] = {measure.name: {} for measure in MEASURES}
    for kind in kinds:
        for dose in doses:
            found = clean
            planted = plant(synthetic, training, features, kind, dose, seed)
            if planted is not synthetic or not clean:
                whole = Audit(planted, training, heldout, seed)
                found = {measure.name: measured(measure, whole) for measure in MEASURES}
            if planted is synthetic:
                clean = found
            for name, leak in found.items():
                leaks[name][kind] = (*leaks[name].get(kind, ()), leak)
    return SelfTest(tuple(doses), leaks)


def plant(
    synthetic: Side,
    training: Side,
    features: Callable[[Signals], NDArray[np.float64]],
    kind: str,
    dose: float,
    seed: int = 0,
) -> Side:
    """Return the synthetic side with a share `dose` of records replaced by copies of a kind.

    A higher dose with the same seed replaces the same records and more.
    """
    generator = np.random.default_rng([seed, *kind.encode()])
    rows = generator.permutation(len(synthetic))[: round(dose * len(synthetic))]
    if not len(rows):
        return synthetic
    copied = generator.permutation(len(training))[np.arange(len(rows)) % len(training)]
    planted = PLANTS[kind](training.signals_mv[copied], training.rate_hz, generator)
    signals, values = synthetic.signals_mv.copy(), synthetic.features.copy()
    signals[rows], values[rows] = planted, features(planted)
    labels = synthetic.labels.copy()
    labels[rows] = training.labels[copied]
    return replace(
        synthetic, signals_mv=signals, features=values, labels=labels, _rows=None, _known={}
    )
