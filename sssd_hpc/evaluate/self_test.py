"""Do the measures move when they should? Every damage at rising doses against every measure.

The candidate is real itself, so before damage nothing is wrong with it: whatever a measure says of
it then is noise, and what it says after is due to the damage. A measure that misses a damage it
declares is a failure; one that sees more than it declares is told, not blamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.simulate import DECIMATION, KINDS, RATE_HZ, place, simulate_record
from sssd_hpc.ecg.store import GAIN_PER_MV
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.classify import Recipe, fit
from sssd_hpc.evaluate.comparison import Measure, Side, halves, measured
from sssd_hpc.evaluate.damage import DAMAGES, Damage
from sssd_hpc.progress import Progress

Features = Callable[[NDArray[np.float32]], NDArray[np.float64]]

DOSES = (0.25, 0.5, 1.0)
REPEATS = 5
BEYOND = 3.0
"""Standard deviations of the undamaged repeats by which a seen damage shifts the mean, at least."""
ONLY_DECLARED = ("exact_copies",)
"""Damages that no other measure may see: copies of real records are faithful; disguises are not."""

SIMULATED_RATE_HZ = RATE_HZ // DECIMATION
FEATURE_RECORDS, TRAINING_RECORDS, HELDOUT_RECORDS = 200, 100, 200
FEATURE_RECIPE = Recipe(epochs=6, batch_size=16, num_blocks=(1, 1), width=8)
"""Two seconds of training; random weights do as well but for shuffled labels, which they miss."""

Status = Literal["seen", "missed", "also seen", "not seen", "called better", "forbidden"]


@dataclass(frozen=True)
class Cell:
    """What one measure says of one damage."""

    measure: str
    damage: str
    status: Status
    least_dose: float | None
    """Smallest dose from which on it is seen."""
    shifts: tuple[float, ...]
    """At dose 0, then at each dose: how much worse the mean is, in undamaged deviations."""
    detail: str
    """Why it is a failure; empty where it is none."""


@dataclass(frozen=True)
class SelfTest:
    """The matrix of measures and damages."""

    measures: tuple[str, ...]
    damages: tuple[str, ...]
    doses: tuple[float, ...]
    repeats: int
    num_records: int
    """Of the candidate, and about as many of the reference."""
    cells: tuple[Cell, ...]

    @property
    def failures(self) -> list[str]:
        """One line for each declared damage that is missed and each forbidden one that is seen."""
        return [cell.detail for cell in self.cells if cell.detail]

    def cell(self, measure: str, damage: str) -> Cell:
        """Return one place of the matrix."""
        return self.cells[
            self.measures.index(measure) * len(self.damages) + self.damages.index(damage)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: None for what is not finite."""
        cells = [
            {**asdict(cell), "shifts": [s if math.isfinite(s) else None for s in cell.shifts]}
            for cell in self.cells
        ]
        return {**asdict(self), "cells": cells, "failures": self.failures}


def self_test(
    measures: Sequence[Measure],
    heldout: Side,
    training: Side,
    features: Features,
    *,
    damages: Sequence[str] = tuple(DAMAGES),
    doses: Sequence[float] = DOSES,
    repeats: int = REPEATS,
    seed: int = 0,
) -> SelfTest:
    """Damage real records at rising doses and see which measures grow worse.

    Each repeat halves the held-out patients into candidate and reference, as `compare` does. A dose
    is seen where every damaged repeat is worse than every undamaged one and the mean is worse by
    `BEYOND` undamaged deviations. A damage is seen where the highest dose is and no higher dose has
    a better mean than a lower one, beyond what the repeats scatter.

    Args:
        measures: what is tested; `sees` is what each one promises. A measure with three sides is
            given as one that holds the training records itself.
        heldout: real records, damaged as the candidate and whole as the reference.
        training: real records that copies are planted of; none of their patients is held out.
        features: maps signals (n, 12, L) in mV to features (n, d), as those of the sides.
        damages: names of `DAMAGES`; what a measure declares of others is not asked.
        doses: rising, of 0 to 1.
        repeats: at least 3, or an undamaged deviation says little.
        seed: of halvings, damages and the measures' own choices.

    Raises:
        UserError: doses that do not rise, too few repeats or records, or an unknown damage.
    """
    doses = tuple(doses)
    if not doses or list(doses) != sorted(set(doses)) or not 0 < doses[0] <= doses[-1] <= 1:
        raise UserError(f"doses are {doses}; they must rise within 0 to 1, 0 not among them")
    if repeats < 3:
        raise UserError(f"repeats is {repeats}; at least 3 are needed")
    for measure in measures:
        if unknown := sorted(set(measure.sees) - set(DAMAGES)):
            raise UserError(
                f"measure {measure.name} declares {unknown[0]!r}; use {', '.join(DAMAGES)}"
            )
    damages = tuple(damages)
    values, count = _values(measures, heldout, training, features, damages, doses, repeats, seed)
    cells = [
        judge(measure, damage, values[measure.name, ""], values[measure.name, damage], doses)
        for measure in measures
        for damage in damages
    ]
    names = tuple(measure.name for measure in measures)
    return SelfTest(names, damages, doses, repeats, count, tuple(cells))


def _values(
    measures: Sequence[Measure],
    heldout: Side,
    training: Side,
    features: Features,
    damages: tuple[str, ...],
    doses: tuple[float, ...],
    repeats: int,
    seed: int,
) -> tuple[dict[tuple[str, str], NDArray[np.float64]], int]:
    """Return values (repeats, doses) of each measure and damage, and how many records they rest on.

    An undamaged candidate's stand under damage "", (repeats, 1).
    """
    values = {
        (measure.name, damage): np.full((repeats, len(doses) if damage else 1), math.nan)
        for measure in measures
        for damage in ("", *damages)
    }
    fewest = len(heldout)
    title, total = "metric self-test", repeats * (1 + len(damages) * len(doses))
    with Progress(title, total=total, unit="damaged sets") as progress:
        for repeat in range(repeats):
            generator = np.random.default_rng([seed, repeat])
            candidate, reference = (heldout.take(rows) for rows in halves(heldout, generator))
            fewest = min(fewest, len(candidate), len(reference))
            sides = [("", 0, candidate)]
            for number, damage in enumerate(DAMAGES.values()):
                if damage.name not in damages:
                    continue
                for at, dose in enumerate(doses):
                    # Equal at all doses: a higher one spoils the same records, and more.
                    own = np.random.default_rng([seed, repeat, number])
                    sides.append(
                        (damage.name, at, spoiled(damage, candidate, training, dose, own, features))
                    )
            for name, at, side in sides:
                for measure in measures:
                    value, _ = measured(measure, side, reference, [seed, repeat])
                    values[measure.name, name][repeat, at] = value
                progress.advance(1)
    return values, fewest


def spoiled(
    damage: Damage,
    candidate: Side,
    training: Side,
    dose: float,
    generator: np.random.Generator,
    features: Features,
) -> Side:
    """Return a damaged candidate, its features taken anew where its signals changed."""
    signals, labels = damage.apply(candidate, training, dose, generator)
    changed = np.flatnonzero((signals != candidate.signals_mv).any(axis=(1, 2)))
    if not len(changed):
        return replace(candidate, labels=labels)
    taken = candidate.features.copy()
    taken[changed] = features(signals[changed])
    return Side(
        signals_mv=signals,
        labels=labels,
        features=taken,
        rate_hz=candidate.rate_hz,
        label_names=candidate.label_names,
        patients=candidate.patients,
    )


def judge(
    measure: Measure,
    damage: str,
    undamaged: NDArray[np.float64],
    damaged: NDArray[np.float64],
    doses: Sequence[float],
) -> Cell:
    """Say what values undamaged, (repeats, 1), and damaged, (repeats, doses), make of a damage."""
    sign = 1.0 if measure.better == "lower" else -1.0
    worse = sign * np.hstack([undamaged, damaged])
    base, means = worse[:, 0], worse.mean(axis=0)
    deviations = worse.std(axis=0, ddof=1)
    # A measure that says the same of every undamaged set has no spread of its own.
    unit = max(float(deviations[0]), 1e-9 * max(1.0, abs(float(means[0]))))
    shifts = (means - means[0]) / unit
    seen = (worse.min(axis=0) > base.max()) & (shifts >= BEYOND)
    better = (worse.max(axis=0) < base.min()) & (shifts <= -BEYOND)
    noise = np.maximum(deviations[1:], deviations[:-1])
    falls = np.flatnonzero(np.diff(means) < -noise)
    declared = damage in measure.sees
    least = None
    status: Status = "called better" if better[-1] else "not seen"
    detail = ""
    if seen[-1]:
        status = "also seen"
        blind = np.flatnonzero(~seen[1:])
        least = doses[int(blind[-1]) + 1 if len(blind) else 0]
    if declared:
        status = "missed"
        if not np.isfinite(worse).all():
            detail = f"{measure.name} is undefined for {damage}, which it must see"
        elif not seen[-1]:
            overlap = "" if worse[:, -1].min() > base.max() else ", and not every repeat is worse"
            detail = (
                f"{measure.name} must see {damage}: at dose {doses[-1]:g} it is worse by "
                f"{shifts[-1]:.1f} undamaged deviations, {BEYOND:g} are needed{overlap}"
            )
        elif len(falls):
            detail = (
                f"{measure.name} must grow worse with {damage}: at dose {doses[falls[-1]]:g} it is "
                f"better again than at the one before"
            )
        else:
            status = "seen"
    elif status == "also seen" and damage in ONLY_DECLARED:
        status = "forbidden"
        detail = (
            f"{measure.name} sees {damage}, which are faithful: it is worse by {shifts[-1]:.1f} "
            f"undamaged deviations at dose {doses[-1]:g}"
        )
    return Cell(measure.name, damage, status, least, tuple(map(float, shifts)), detail)


def simulated_sides(
    seed: int = 0,
    *,
    num_features: int = FEATURE_RECORDS,
    num_training: int = TRAINING_RECORDS,
    num_heldout: int = HELDOUT_RECORDS,
    recipe: Recipe = FEATURE_RECIPE,
) -> tuple[Side, Side, Features]:
    """Return held-out and training records, simulated, and features of a classifier of neither.

    The classifier learns the eight simulated kinds from further records: one that had learned from
    the training records would know their copies again.
    """
    count = num_features + num_training + num_heldout
    kinds = tuple(KINDS)
    places = [place(seed, index) for index in range(count)]
    signals = np.empty((count, 12, 10 * SIMULATED_RATE_HZ), dtype=np.float32)
    with Progress("simulate", total=count, unit="records") as progress:
        for row, where in enumerate(places):
            signals[row] = simulate_record(seed, where)[1] / np.float32(GAIN_PER_MV)
            progress.advance(1)
    labels = np.array([[where.kind == kind for kind in kinds] for where in places], dtype=np.int64)
    patients = np.array([where.patient for where in places])
    parts = np.split(np.arange(count), [num_features, num_features + num_training])
    classifier = fit(
        signals[parts[0]],
        labels[parts[0]],
        SIMULATED_RATE_HZ,
        recipe=recipe,
        seed=seed,
        title="feature classifier",
    )
    heldout, training = (
        Side(
            signals_mv=signals[rows],
            labels=labels[rows],
            features=classifier.features(signals[rows]),
            rate_hz=SIMULATED_RATE_HZ,
            label_names=kinds,
            patients=patients[rows],
        )
        for rows in (parts[2], parts[1])
    )
    return heldout, training, classifier.features
