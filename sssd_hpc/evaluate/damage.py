"""Controlled damage to a set of records: what a measure must see, at any dose from 0 to 1.

Each is a pure function of signals and labels with a generator; dose 0 changes nothing. A damage of
a share of the records spoils the same ones, and more, at a higher dose with an equal generator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import CHEST, EIGHT, LEADS, take, to_twelve
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.comparison import Side
from sssd_hpc.evaluate.copies import PLANTS

Signals = NDArray[np.float32]
Labels = NDArray[np.int64]

NOISE_MV = 0.1
"""Standard deviation of the noise of dose 1, about half of what a lead itself has."""


@dataclass(frozen=True)
class Damage:
    """One way in which a generator may fail."""

    name: str
    title: str
    apply: Callable[[Side, Side, float, np.random.Generator], tuple[Signals, Labels]]
    """(candidate, training, dose, generator) -> damaged signals (n, 12, L) and labels (n, k)."""


def share(count: int, dose: float, generator: np.random.Generator) -> NDArray[Any]:
    """Return a `dose` of `count` rows."""
    return generator.permutation(count)[: round(dose * count)]


def noise(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Add white noise to the eight independent leads and compute the others from them."""
    eight = take(side.signals_mv, LEADS, EIGHT)
    added = generator.normal(0.0, 1.0, eight.shape) * (dose * NOISE_MV)
    return to_twelve((eight + added).astype(np.float32), EIGHT), side.labels


def mode_drop(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Put records of the commonest kind in place of others; labels stay as they were asked for."""
    _kinds, kind, counts = np.unique(side.labels, axis=0, return_inverse=True, return_counts=True)
    common = kind.reshape(-1) == int(counts.argmax())
    others = np.flatnonzero(~common)
    if not len(others):
        raise UserError("all records have the same labels: no kind of record can be dropped")
    dropped = others[share(len(others), dose, generator)]
    signals = side.signals_mv.copy()
    signals[dropped] = side.signals_mv[generator.choice(np.flatnonzero(common), len(dropped))]
    return signals, side.labels


def label_shuffle(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Deal the labels of a share of the records anew among them."""
    chosen = share(len(side), dose, generator)
    labels = side.labels.copy()
    labels[chosen] = side.labels[generator.permutation(chosen)]
    return side.signals_mv, labels


def lead_swap(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Reverse the arm electrodes and the row of chest electrodes in a share of the records."""
    chosen = share(len(side), dose, generator)
    arms = take(side.signals_mv[chosen], LEADS, ("I", "III", "II", "AVL", "AVR", "AVF"))
    arms[:, 0] *= -1
    chest = take(side.signals_mv[chosen], LEADS, CHEST[::-1])
    signals = side.signals_mv.copy()
    signals[chosen] = np.concatenate([arms, chest], axis=1)
    return signals, side.labels


def mean_collapse(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Draw every record towards the mean of all."""
    mean = side.signals_mv.mean(axis=0)
    return (side.signals_mv * (1 - dose) + mean * dose).astype(np.float32), side.labels


def time_reversal(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Play a share of the records backwards."""
    chosen = share(len(side), dose, generator)
    signals = side.signals_mv.copy()
    signals[chosen] = side.signals_mv[chosen, :, ::-1]
    return signals, side.labels


def double_speed(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Play a share of the records at twice the speed, and again to fill their time."""
    from scipy.signal import resample_poly

    chosen = share(len(side), dose, generator)
    length = side.signals_mv.shape[2]
    signals = side.signals_mv.copy()
    half = resample_poly(side.signals_mv[chosen], 1, 2, axis=2, padtype="line")
    signals[chosen] = np.concatenate([half, half], axis=2)[..., :length]
    return signals, side.labels


def foreign_lead(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Take lead I of a share of the records from the next of them: the leads' laws break."""
    chosen = share(len(side), dose, generator)
    lead = LEADS.index("I")
    signals = side.signals_mv.copy()
    signals[chosen, lead] = side.signals_mv[np.roll(chosen, 1), lead]
    return signals, side.labels


def flat_lead(
    side: Side, training: Side, dose: float, generator: np.random.Generator
) -> tuple[Signals, Labels]:
    """Lose lead II in a share of the records, as where an electrode came off."""
    signals = side.signals_mv.copy()
    signals[share(len(side), dose, generator), LEADS.index("II")] = 0.0
    return signals, side.labels


def planted_copies(
    side: Side, training: Side, dose: float, generator: np.random.Generator, *, kind: str
) -> tuple[Signals, Labels]:
    """Put copies of training records, labels too, in place of a share of the records.

    `kind`, of `PLANTS`, is how a copy differs from its original.
    """
    chosen = share(len(side), dose, generator)
    copied = generator.permutation(len(training))[np.arange(len(chosen)) % len(training)]
    signals, labels = side.signals_mv.copy(), side.labels.copy()
    signals[chosen] = PLANTS[kind](training.signals_mv[copied], training.rate_hz, generator)
    labels[chosen] = training.labels[copied]
    return signals, labels


COPIES = tuple(f"{kind}_copies" for kind in PLANTS)
"""Damages that copy training records: what measures of privacy must see."""
DAMAGES: dict[str, Damage] = {
    damage.name: damage
    for damage in (
        Damage("noise", f"white noise, {NOISE_MV} mV", noise),
        Damage("mode_drop", "rare kinds replaced by the commonest", mode_drop),
        Damage("label_shuffle", "labels shuffled", label_shuffle),
        Damage("lead_swap", "arm and chest leads reversed", lead_swap),
        Damage("mean_collapse", "drawn towards the mean record", mean_collapse),
        Damage("time_reversal", "played backwards", time_reversal),
        Damage("double_speed", "played at twice the speed", double_speed),
        Damage("foreign_lead", "lead I of another record", foreign_lead),
        Damage("flat_lead", "lead II flat", flat_lead),
        *(
            Damage(
                name,
                f"copies of training records, {kind}",
                functools.partial(planted_copies, kind=kind),
            )
            for name, kind in zip(COPIES, PLANTS, strict=True)
        ),
    )
}
FIDELITY = tuple(name for name in DAMAGES if name not in COPIES[1:])
"""Damages that tell whether a measure of fidelity is right: exact copies it must not see, while
disguised ones have faults of their own."""
