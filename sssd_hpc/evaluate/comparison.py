"""What a measure of fidelity sees, and how each one is put beside its real-against-real floor.

A number alone says nothing: a distance of real records to other real records is not zero, and an
average of many records has a smaller error than any real one. So every measure compares a candidate
set with a reference set twice, once with synthetic and once with real records as the candidate.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.progress import Progress

Better = Literal["lower", "higher"]
Result = TypeVar("Result")

CHUNK = 256
MIN_RECORDS = 2
MIN_FOR_PERCENTILES = 40
"""Repeats from which 2.5 and 97.5 percentiles say more than the extremes."""


class Undefined(ValueError):  # noqa: N818 - no error: the data cannot define the measure
    """A measure that these records cannot define; the message is the reason, for the report."""


@dataclass(frozen=True, eq=False)
class Side:
    """A set of n records as measures see it.

    Raises:
        UserError: arrays that do not fit together, or values that are not finite.
    """

    signals_mv: NDArray[np.float32]
    """(n, 12, L) in mV, leads in `LEADS` order."""
    labels: NDArray[np.int64]
    """(n, k): 1 present, 0 absent."""
    features: NDArray[np.float64]
    """(n, d) of a classifier; d is 0 where no measure asks."""
    rate_hz: int
    label_names: tuple[str, ...] = ()
    """The k columns of `labels`; may be left out where no measure needs a name."""
    patients: NDArray[Any] | None = None
    """(n,) who each record is of; None where every record is another patient's."""
    _rows: NDArray[np.integer[Any]] | None = field(default=None, repr=False)
    _known: dict[str, dict[int, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        count = len(self.signals_mv)
        if self.signals_mv.ndim != 3 or self.signals_mv.shape[1] != len(LEADS):
            raise UserError(
                f"signals of shape {self.signals_mv.shape} are not (records, {len(LEADS)}, samples)"
            )
        for name, array in (("labels", self.labels), ("features", self.features)):
            if array.ndim != 2 or len(array) != count:
                raise UserError(f"{name} of shape {array.shape} do not fit {count} records")
        if self.patients is not None and self.patients.shape != (count,):
            raise UserError(f"patients of shape {self.patients.shape} do not fit {count} records")
        for begin in range(0, count, CHUNK):
            finite = np.isfinite(self.signals_mv[begin : begin + CHUNK]).all(axis=(1, 2))
            if not finite.all():
                row = begin + int(np.flatnonzero(~finite)[0])
                raise UserError(
                    f"record {row} of {count} holds samples that are not finite; prepare the set "
                    f"again or leave the record out"
                )
        if not np.isfinite(self.features).all():
            raise UserError("features are not finite; train the feature classifier again")

    def __len__(self) -> int:
        return len(self.signals_mv)

    @classmethod
    def of_store(
        cls, store: Store, rows: NDArray[np.int64], features: NDArray[np.float64] | None = None
    ) -> Side:
        """Return the records at `rows` of a store, with all of its labels and their features."""
        if features is None:
            features = np.empty((len(rows), 0))
        return cls(
            signals_mv=store.signals_mv(rows, LEADS),
            labels=store.labels_of(rows),
            features=features,
            rate_hz=store.rate_hz,
            label_names=store.label_names,
            patients=store.patient_id[rows],
        )

    def take(self, rows: NDArray[np.integer[Any]]) -> Side:
        """Return the records at `rows`; what was measured per record is not measured again."""
        rows = np.asarray(rows, dtype=np.int64)
        return Side(
            signals_mv=self.signals_mv[rows],
            labels=self.labels[rows],
            features=self.features[rows],
            rate_hz=self.rate_hz,
            label_names=self.label_names,
            patients=None if self.patients is None else self.patients[rows],
            _rows=rows if self._rows is None else self._rows[rows],
            _known=self._known,
        )

    def per_record(
        self, name: str, measure: Callable[[NDArray[np.float32], int], NDArray[Any]]
    ) -> NDArray[Any]:
        """Return what `measure(signals_mv, rate_hz)` says of each record, (n, ...).

        A record is measured once under a name, whichever draws of its set it is in.
        """
        rows = np.arange(len(self)) if self._rows is None else self._rows
        known = self._known.setdefault(name, {})
        missing = np.array([at for at, row in enumerate(rows) if int(row) not in known], dtype=int)
        for begin in range(0, len(missing), CHUNK):
            at = missing[begin : begin + CHUNK]
            for row, value in zip(
                rows[at], measure(self.signals_mv[at], self.rate_hz), strict=True
            ):
                known[int(row)] = value
        return np.array([known[int(row)] for row in rows])


def remembered(compute: Callable[[Side, Side], Result]) -> Callable[[Side, Side], Result]:
    """Let a function of two sides keep what it found, which several measures ask, while both live.

    Not functools.lru_cache: that would keep the sides, too, and a side may be a gigabyte.
    """
    known: WeakKeyDictionary[Side, WeakKeyDictionary[Side, Result]] = WeakKeyDictionary()

    @functools.wraps(compute)
    def look_up(first: Side, second: Side) -> Result:
        of_first = known.setdefault(first, WeakKeyDictionary())
        if second not in of_first:
            of_first[second] = compute(first, second)
        return of_first[second]

    return look_up


@dataclass(frozen=True)
class Measure:
    """One number about how far a candidate set is from a reference set."""

    name: str
    title: str
    """What it is, in a few plain words."""
    unit: str
    """Of the number; empty for a bare one."""
    better: Better
    sees: tuple[str, ...]
    """Damages (names of `damage.DAMAGES`) that must make it worse; the self-test holds it to it."""
    compute: Callable[[Side, Side, np.random.Generator], float]
    """(candidate, reference, generator) -> value; raises `Undefined` where there is none."""


@dataclass(frozen=True)
class Compared:
    """A measure of synthetic records beside its floor; NaN with a reason where undefined."""

    unit: str
    better: Better
    value: float = math.nan
    """Of synthetic records against real ones, mean over repeats."""
    low: float = math.nan
    high: float = math.nan
    floor: float = math.nan
    """Of other real records, as many, against the same real ones."""
    floor_low: float = math.nan
    floor_high: float = math.nan
    reason: str = ""
    interval: str = ""
    """What `low` and `high` are."""

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: None for NaN."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


def compare(
    measures: Sequence[Measure],
    heldout: Side,
    synthetic: Side,
    *,
    repeats: int = 5,
    seed: int = 0,
) -> dict[str, Compared]:
    """Measure synthetic records against held-out real ones, each measure beside its floor.

    Every repeat halves the held-out patients: one half's records are the reference, the other's the
    floor's candidate, and as many synthetic records are drawn. So value and floor rest on as many
    records, on the same reference and on the same random choices, and on patients that neither the
    generator nor the feature classifier has seen.

    Args:
        measures: what to compute.
        heldout: real records of folds that nothing was trained on.
        synthetic: generated records.
        repeats: halvings. An interval spans them: it covers how held-out records fall into halves
            and which synthetic ones are drawn, not which records were held out or the model.
        seed: of the halvings, of the draws and of the measures' own choices.

    Raises:
        UserError: sides of another length or rate, two measures of one name, or no repeat.
    """
    if repeats < 1:
        raise UserError(f"repeats is {repeats}; at least 1 is needed")
    same_form(heldout, synthetic)
    draws: dict[str, list[tuple[float, float]]] = {measure.name: [] for measure in measures}
    if len(draws) < len(measures):
        raise UserError(f"{len(measures)} measures share {len(draws)} names; rename one")
    reasons: dict[str, str] = {}
    with Progress("measures", total=repeats * len(measures), unit="measures") as progress:
        for repeat in range(repeats):
            generator = np.random.default_rng([seed, repeat])
            reference, floor = (heldout.take(rows) for rows in halves(heldout, generator))
            count = min(len(floor), len(synthetic))
            floor = floor.take(np.arange(count))
            candidate = synthetic.take(generator.permutation(len(synthetic))[:count])
            for measure in measures:
                pair = []
                for side in (candidate, floor):
                    value, reason = measured(measure, side, reference, [seed, repeat])
                    pair.append(value)
                    if reason:
                        reasons[measure.name] = reason
                draws[measure.name].append((pair[0], pair[1]))
                progress.advance(1)
    return {
        measure.name: _summary(measure, draws[measure.name], reasons.get(measure.name, ""))
        for measure in measures
    }


def same_form(real: Side, other: Side, *, features: bool = True) -> None:
    """Refuse two sides whose records differ in length, rate, labels or, if asked, features.

    Raises:
        UserError: they do.
    """
    forms = [
        ("sampling rates in Hz", real.rate_hz, other.rate_hz),
        ("samples a record", real.signals_mv.shape[2], other.signals_mv.shape[2]),
        ("numbers of labels", real.labels.shape[1], other.labels.shape[1]),
    ]
    if features:
        forms.append(("numbers of features", real.features.shape[1], other.features.shape[1]))
    for what, ours, theirs in forms:
        if ours != theirs:
            raise UserError(f"the {what} differ: {ours} in the real set, {theirs} in the other")


def halves(
    side: Side, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows of two halves in random order, no patient in both.

    Two records of one patient are alike, which would make the floor too low.
    """
    patients = np.arange(len(side)) if side.patients is None else side.patients
    _, number = np.unique(patients, return_inverse=True)
    rank = generator.permutation(number.max(initial=-1) + 1)[number]
    rows = np.argsort(rank, kind="stable")
    # The cut moves on to where the next patient begins.
    cut = int(np.searchsorted(rank[rows], rank[rows[len(rows) // 2]])) if len(rows) else 0
    return generator.permutation(rows[:cut]), generator.permutation(rows[cut:])


def measured(
    measure: Measure, candidate: Side, reference: Side, seed: Sequence[int]
) -> tuple[float, str]:
    """Return a measure's value and, where that is NaN, the reason.

    The measure's random choices depend on the seed and its name alone: they are the same for
    synthetic and real candidates, and do not move when another measure is added.
    """
    fewest = min(len(candidate), len(reference))
    if fewest < MIN_RECORDS:
        return math.nan, f"at least {MIN_RECORDS} records are needed on each side, {fewest} given"
    generator = np.random.default_rng([*seed, zlib.crc32(measure.name.encode())])
    try:
        value = float(measure.compute(candidate, reference, generator))
    except Undefined as reason:
        return math.nan, str(reason)
    return value, "" if math.isfinite(value) else "the measure gave no finite number"


def _summary(measure: Measure, draws: Sequence[tuple[float, float]], reason: str) -> Compared:
    pairs = np.array(draws)
    # A repeat that one of the two lacks would leave the other without its pair.
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return Compared(measure.unit, measure.better, reason=reason)
    if len(pairs) < len(draws):
        reason = f"undefined in {len(draws) - len(pairs)} of {len(draws)} repeats: {reason}"
    percentiles = len(pairs) >= MIN_FOR_PERCENTILES
    ends = np.percentile(pairs, [2.5, 97.5] if percentiles else [0, 100], axis=0)
    kind = "2.5 to 97.5 percentile" if percentiles else "least to greatest"
    value, floor = pairs.mean(axis=0)
    return Compared(
        measure.unit,
        measure.better,
        value=float(value),
        low=float(ends[0, 0]),
        high=float(ends[1, 0]),
        floor=float(floor),
        floor_low=float(ends[0, 1]),
        floor_high=float(ends[1, 1]),
        reason=reason,
        interval=f"{kind} of {len(pairs)} repeats",
    )
