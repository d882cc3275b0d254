"""Do synthetic hearts beat as real ones do: rates, intervals and amplitudes of sets of records.

Every quantity of `delineate` is compared as a distribution, in its own unit, and by label: does an
AFIB record lose its P waves, is a block's QRS wide? Records that cannot be measured are counted,
not hidden: their share is a measure of its own. A stated number of records is measured, the first
of each draw, which `comparison.compare` has put in random order.
"""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.evaluate.comparison import Measure, Side, Undefined
from sssd_hpc.evaluate.delineate import QUANTITIES, Unmeasurable, measure_record
from sssd_hpc.evaluate.metrics import Metric
from sssd_hpc.files import sha256_bytes

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

SAMPLE = 300
"""Records measured of a side in each comparison, at 15 ms each."""
REPORTED = 1000
"""Records measured of a side for the report's tables and pictures."""
MIN_MEASURED = 8
"""Records with a value, on each side, below which a distribution says nothing."""
WORTH_A_POOL = 64
"""Records from which starting processes, 3 s, pays."""

TITLES: dict[str, tuple[str, str]] = {
    "heart_rate": ("heart rate", "1/min"),
    "rr_sd": ("spread of RR intervals", "ms"),
    "pr": ("PR interval", "ms"),
    "qrs": ("QRS duration", "ms"),
    "qt": ("QT interval", "ms"),
    "qtc": ("QT interval corrected for rate (Fridericia)", "ms"),
    "axis": ("QRS axis in the frontal plane", "degrees"),
    "p_repeat": ("how alike beats are before the QRS", "correlation"),
    "p_wave": ("records with P waves", "share"),
    "r_transition": ("chest lead where R outgrows S", "leads"),
    "low_limb": ("low voltage in the limb leads", "share"),
    "low_chest": ("low voltage in the chest leads", "share"),
    "lead_residual": ("break of Einthoven's and Goldberger's laws", "uV"),
    **{f"r_{name}": (f"R amplitude in {name}", "mV") for name in LEADS},
}
"""Each quantity's name for people, and its unit."""
SHARES = ("p_wave", "low_limb", "low_chest")
"""Quantities that are 0 or 1 for a record."""
CYCLE_DEGREES = 360.0


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured of n records."""

    values: Array
    """(n, len(QUANTITIES)); NaN where a record failed or lacks the quantity."""
    failures: tuple[str, ...]
    """Why each record failed, empty where it did not."""

    def column(self, name: str) -> Array:
        """Return one quantity of the records that have it."""
        column = self.values[:, QUANTITIES.index(name)]
        return column[~np.isnan(column)]

    @property
    def failure_rate(self) -> float:
        """Share of records that could not be measured."""
        return float(np.mean([bool(reason) for reason in self.failures]))

    def summary(self) -> dict[str, Any]:
        """Return what a report needs: counts, reasons, and each quantity's median and quartiles."""
        quantities = {}
        for name in QUANTITIES:
            column = self.column(name)
            middle = np.percentile(column, [25, 50, 75]) if len(column) else [None] * 3
            title, unit = TITLES[name]
            quantities[name] = {
                "title": title,
                "unit": unit,
                "records": len(column),
                "mean": float(column.mean()) if len(column) else None,
                "quartiles": [None if cell is None else float(cell) for cell in middle],
            }
        return {
            "records": len(self.failures),
            "failed": sum(map(bool, self.failures)),
            "reasons": dict(Counter(filter(None, self.failures)).most_common()),
            "quantities": quantities,
        }


def measure(signals_mv: NDArray[np.floating[Any]], rate_hz: int) -> Table:
    """Measure every record of (n, 12, L) in mV, on as many processes as there are cores.

    A record whose samples were measured before, in whatever set, is not measured again.
    """
    keys = [
        sha256_bytes(rate_hz.to_bytes(4, "big") + np.ascontiguousarray(record).tobytes())
        for record in signals_mv
    ]
    new = {key: row for row, key in enumerate(keys) if key not in _known}
    found = _measured(signals_mv[list(new.values())], rate_hz)
    _known.update(zip(new, found, strict=True))
    rows = [_known[key] for key in keys]
    return Table(
        np.array([values for values, _ in rows]).reshape(len(rows), len(QUANTITIES)),
        tuple(reason for _, reason in rows),
    )


_known: dict[str, tuple[Array, str]] = {}
"""What was measured, by hash of rate and samples: half a kilobyte a record."""


def table_of(side: Side, sample: int = SAMPLE) -> Table:
    """Measure the first `sample` records of a side."""
    return measure(side.signals_mv[:sample], side.rate_hz)


def drawn_table(side: Side, seed: int) -> Table:
    """Measure `REPORTED` records of a side, drawn by the seed."""
    rows = np.random.default_rng(seed).permutation(len(side))[:REPORTED]
    return table_of(side.take(rows), sample=REPORTED)


def _measured(signals_mv: NDArray[np.floating[Any]], rate_hz: int) -> list[tuple[Array, str]]:
    one = functools.partial(_one, rate_hz=rate_hz)
    cores = len(os.sched_getaffinity(0))
    if cores > 1 and len(signals_mv) >= WORTH_A_POOL:
        try:
            return list(_pool(cores).map(one, signals_mv, chunksize=16))
        except BrokenProcessPool:
            # Killed from outside, as for want of memory: one process needs less.
            logger.warning("a measuring process was killed; going on in this one")
            _pool.cache_clear()
    return [one(record) for record in signals_mv]


@functools.cache
def _pool(cores: int) -> ProcessPoolExecutor:
    """Start the processes once; a fork of a process with torch's threads could hang."""
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))


def _one(record: NDArray[np.floating[Any]], rate_hz: int) -> tuple[Array, str]:
    try:
        found = measure_record(record, rate_hz)
    except Unmeasurable as reason:
        return np.full(len(QUANTITIES), math.nan), str(reason)
    return np.array([found[name] for name in QUANTITIES]), ""


def axis_distance(first: Array, second: Array) -> float:
    """Return the 1-Wasserstein distance of angles in degrees, along the circle.

    On a circle the cumulative distributions differ by a constant that depends on where counting
    begins; their difference's median is the one that costs least.
    Source: Rabin, Delon and Gousseau, "Transportation distances on the circle" (2011), section 3.
    """
    first, second = np.sort(first % CYCLE_DEGREES), np.sort(second % CYCLE_DEGREES)
    cuts = np.sort(np.concatenate([first, second]))
    widths = np.diff(cuts, append=cuts[0] + CYCLE_DEGREES)
    gap = np.searchsorted(first, cuts, side="right") / len(first) - np.searchsorted(
        second, cuts, side="right"
    ) / len(second)
    order = np.argsort(gap, kind="stable")
    half = np.searchsorted(np.cumsum(widths[order]), CYCLE_DEGREES / 2)
    middle = gap[order][min(int(half), len(gap) - 1)]
    return float((np.abs(gap - middle) * widths).sum())


def _distance(name: str) -> Callable[[Side, Side, np.random.Generator], float]:
    """Return the computation of one quantity's distance between two sides."""

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        columns = [table_of(side).column(name) for side in (candidate, reference)]
        fewest = min(map(len, columns))
        if fewest < MIN_MEASURED:
            raise Undefined(
                f"{TITLES[name][0]} could be measured in {fewest} records of one side, "
                f"{MIN_MEASURED} are needed"
            )
        if name == "axis":
            return axis_distance(*columns)
        # Of zeros and ones this is the difference of the shares.
        return float(wasserstein_distance(*columns))

    return compute


def _failure_gap(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    return abs(table_of(candidate).failure_rate - table_of(reference).failure_rate)


BY_LABEL = ("heart_rate", "rr_sd", "pr", "qrs", "qtc", "axis", "p_repeat", "p_wave", "r_transition")
"""Quantities whose dependence on each label is compared."""


def _label_gap(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    """Return how far the labels' effects differ, in interquartile ranges, mean over both.

    Over every label that enough measured records of both sides have and lack, and every quantity of
    `BY_LABEL` but the axis, which has no order.
    """
    sides = [(table_of(side), side.labels[:SAMPLE] == 1) for side in (candidate, reference)]
    gaps = []
    for name in BY_LABEL:
        column = sides[1][0].column(name)
        if name == "axis" or not len(column):
            continue
        # Shares and correlations have a scale of their own.
        bounded = TITLES[name][1] in ("share", "correlation")
        spread = 1.0 if bounded else float(np.subtract(*np.percentile(column, [75, 25])))
        if not spread > 0:
            continue
        for label in range(candidate.labels.shape[1]):
            found = [_plain_effect(table, name, having[:, label]) for table, having in sides]
            gaps.append(abs(found[0] - found[1]) / spread)
    known = np.array(gaps)[~np.isnan(gaps)] if gaps else np.zeros(0)
    if not len(known):
        raise Undefined(
            f"no label has {MIN_MEASURED} measured records with it and without it on both sides"
        )
    return float(known.mean())


def _plain_effect(table: Table, name: str, having: NDArray[np.bool_]) -> float:
    column = table.values[:, QUANTITIES.index(name)]
    groups = [column[mask & ~np.isnan(column)] for mask in (having, ~having)]
    if min(map(len, groups)) < MIN_MEASURED:
        return math.nan
    centre = np.mean if name in SHARES else np.median
    return float(centre(groups[0]) - centre(groups[1]))


SEES: dict[str, tuple[str, ...]] = {
    "heart_rate": ("double_speed", "mode_drop"),
    "rr_sd": ("double_speed", "mode_drop"),
    "pr": ("double_speed", "time_reversal"),
    "qrs": ("double_speed", "noise"),
    "qt": ("double_speed", "mode_drop", "noise"),
    "qtc": ("double_speed", "mode_drop", "noise", "time_reversal"),
    "axis": ("lead_swap",),
    "p_repeat": ("double_speed", "mode_drop", "noise"),
    "p_wave": ("mode_drop",),
    "r_transition": ("lead_swap",),
    "lead_residual": ("foreign_lead",),
    "low_limb": ("mean_collapse",),
    "low_chest": ("mean_collapse",),
    **{f"r_{name}": ("mean_collapse", "lead_swap") for name in LEADS},
    # Reversed arm electrodes leave AVF as it was.
    "r_AVF": ("mean_collapse",),
}
"""Damages that each quantity must see."""

MEASURES: tuple[Measure, ...] = (
    *(
        Measure(
            name=f"physiology_{name}",
            title=f"Difference in {title}",
            unit=unit,
            better="lower",
            sees=SEES[name],
            compute=_distance(name),
        )
        for name, (title, unit) in TITLES.items()
    ),
    Measure(
        name="physiology_failures",
        title="Difference in records that cannot be measured",
        unit="share",
        better="lower",
        sees=("flat_lead",),
        compute=_failure_gap,
    ),
    Measure(
        name="physiology_by_label",
        title="Difference in what the labels do to rates and intervals",
        unit="interquartile ranges",
        better="lower",
        sees=("label_shuffle",),
        compute=_label_gap,
    ),
)
"""One measure a quantity (1-Wasserstein distance in its unit); failures; effects of labels."""


@dataclass(frozen=True)
class LabelEffect:
    """What a label does to a quantity, in real and in synthetic records.

    An effect is the median (of a share: the mean) of records with the label less that without it.
    """

    label: str
    quantity: str
    unit: str
    real: Metric
    synthetic: Metric
    num_real: int
    """Real records with the label in which the quantity was measured."""
    num_synthetic: int

    @property
    def real_is_seen(self) -> bool:
        """Whether the real effect can be told from none."""
        return self.real.low > 0 or self.real.high < 0

    @property
    def kept(self) -> float:
        """Share of the real effect that the synthetic one has; NaN where there is none to keep."""
        if not self.real_is_seen:
            return math.nan
        return self.synthetic.value / self.real.value

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: None for NaN."""
        kept = self.kept
        return {
            **asdict(self),
            "real": self.real.to_json(),
            "synthetic": self.synthetic.to_json(),
            "kept": None if math.isnan(kept) else kept,
        }


def label_effects(
    real: Side,
    synthetic: Side,
    *,
    quantities: Sequence[str] = BY_LABEL,
    min_records: int = 10,
    per_label: int = 60,
    others: int = 300,
    num_bootstraps: int = 200,
    seed: int = 0,
) -> list[LabelEffect]:
    """Compare what each label does to each quantity, with 95 % bootstrap intervals over records.

    Args:
        real: real records with their labels and `label_names`.
        synthetic: synthetic records, of the same labels.
        quantities: names of `QUANTITIES`.
        min_records: a label that fewer records of either side have is left out.
        per_label: records measured of each label, at most.
        others: records measured as they come; those without a label are what it is held against.
        num_bootstraps: resamples behind an interval.
        seed: of the choice of records and of the resampling.
    """
    samples = {
        name: _LabelSample.draw(side, min_records, per_label, others, seed)
        for name, side in (("real", real), ("synthetic", synthetic))
    }
    labels = [k for k in samples["real"].present if k in samples["synthetic"].present]
    effects = []
    for label in labels:
        name = real.label_names[label] if real.label_names else str(label)
        for quantity in quantities:
            generator = np.random.default_rng([seed, label, QUANTITIES.index(quantity)])
            found = {
                side: sample.effect(label, quantity, min_records, num_bootstraps, generator)
                for side, sample in samples.items()
            }
            effects.append(
                LabelEffect(
                    label=name,
                    quantity=quantity,
                    unit=TITLES[quantity][1],
                    real=found["real"][0],
                    synthetic=found["synthetic"][0],
                    num_real=found["real"][1],
                    num_synthetic=found["synthetic"][1],
                )
            )
    return effects


@dataclass(frozen=True, eq=False)
class _LabelSample:
    """Measured records of one side: some as they come, and some of each label."""

    values: Array
    labels: NDArray[np.int64]
    random: NDArray[np.int64]
    present: dict[int, NDArray[np.int64]]
    """By label: places in `values` of records with it."""

    @classmethod
    def draw(
        cls, side: Side, min_records: int, per_label: int, others: int, seed: int
    ) -> _LabelSample:
        generator = np.random.default_rng(seed)
        random = generator.permutation(len(side))[:others]
        chosen = {}
        for label in range(side.labels.shape[1]):
            having = np.flatnonzero(side.labels[:, label] == 1)
            if min_records <= len(having) < len(side):
                chosen[label] = generator.permutation(having)[:per_label]
        rows = np.unique(np.concatenate([random, *chosen.values()]))
        table = table_of(side.take(rows), sample=len(rows))
        at = {label: np.searchsorted(rows, having) for label, having in chosen.items()}
        return cls(table.values, side.labels[rows], np.searchsorted(rows, random), at)

    def effect(
        self,
        label: int,
        quantity: str,
        min_records: int,
        count: int,
        generator: np.random.Generator,
    ) -> tuple[Metric, int]:
        column = self.values[:, QUANTITIES.index(quantity)]
        having = column[self.present[label]]
        lacking = column[self.random[self.labels[self.random, label] == 0]]
        having, lacking = having[~np.isnan(having)], lacking[~np.isnan(lacking)]
        if min(len(having), len(lacking)) < min_records:
            reason = (
                f"measured in {len(having)} records with the label and {len(lacking)} without it, "
                f"{min_records} of each are needed"
            )
            return Metric(math.nan, reason=reason), len(having)
        centre = np.mean if quantity in SHARES else np.median
        reference = _mean_angle(lacking) if quantity == "axis" else 0.0
        if quantity == "axis":
            # Angles as deviations from the common direction, so that no cut of the circle shows.
            having, lacking = _turned(having, reference), _turned(lacking, reference)
        draws = [
            centre(group[generator.integers(0, len(group), (count, len(group)))], axis=1)
            for group in (having, lacking)
        ]
        low, high = np.percentile(draws[0] - draws[1], [2.5, 97.5])
        value = float(centre(having) - centre(lacking))
        return Metric(value, float(low), float(high)), len(having)


def _mean_angle(degrees: Array) -> float:
    return float(np.degrees(np.angle(np.exp(1j * np.radians(degrees)).mean())))


def _turned(degrees: Array, reference: float) -> Array:
    """Return angles from a reference direction, in -180..180 degrees."""
    return np.asarray((degrees - reference + 180) % CYCLE_DEGREES - 180, dtype=np.float64)
