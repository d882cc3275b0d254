"""Does a synthetic set give away the records that its generator was trained on?

Membership inference comes first; distances to the closest record do not follow that risk ("The DCR
Delusion", arXiv 2505.01524) and miss a copy that begins elsewhere, as the self-test shows. Every
measure has an ideal, what it would be if nothing were given away, and compares training records
with held-out ones of other patients. PTB-XL's folds 9 and 10 were read with more care than 1 to 8:
a value just past its ideal may tell of that. Patients in two folds and exact copies are `checks`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.evaluate import copies, damage
from sssd_hpc.evaluate.comparison import Measure, Side, Undefined, halves, same_form
from sssd_hpc.evaluate.copies import Matches, Prepared
from sssd_hpc.evaluate.metrics import roc_auc, wilson

Array = NDArray[np.float64]

TARGETS = 1500
"""Members, and non-members, that the inference is tried on."""
CLOSEST_SAMPLE = 3000
"""Synthetic records whose closest real one is looked for, among all."""
MIN_RECORDS = 16
FALSE_POSITIVE_RATE = 0.01
COPY_SIMILARITY = (0.9, 0.98)
COPY_PERCENTILE = 99.5
"""A copy is more like a training record than this percentile of held-out records are; the
similarity of that is kept between the two above, as real sets hold twins of their own."""
RATIO_PERCENTILE = 5.0
NUM_BOOTSTRAPS = 200
NUM_PAIRS = 20
NUM_PLANTED = 100
CHUNK = 512


@dataclass(frozen=True)
class Leak:
    """A measure's value with its 95 % interval and its ideal; NaN with a reason where undefined."""

    value: float
    low: float
    high: float
    ideal: float
    reason: str = ""

    @property
    def exposed(self) -> bool:
        """Whether the whole interval lies on the leaking side of the ideal."""
        return self.low > self.ideal

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: None for NaN."""
        cells = {name: None if cell != cell else cell for name, cell in asdict(self).items()}
        return {**cells, "exposed": self.exposed}


@dataclass(frozen=True)
class PrivacyMeasure:
    """One number that grows with what a synthetic set gives away."""

    name: str
    title: str
    sees: tuple[str, ...]
    """Copies (names of `damage.COPIES`) that must raise it; the self-test holds it to them."""
    compute: Callable[[Audit], Leak]


@dataclass(frozen=True)
class Pair:
    """A synthetic record and the training record most like it."""

    synthetic: int
    training: int
    similarity: float
    shift_s: float
    """By how much the synthetic record lies later."""
    gain: float
    copy: bool
    """Whether it is more alike than held-out records ever are."""


@dataclass(frozen=True, eq=False)
class Audit:
    """The three sets and what is found once and used by several measures.

    Raises:
        UserError: records that differ in length, rate, labels or features.
    """

    synthetic: Side
    training: Side
    heldout: Side
    """Real records that the generator has not seen, of other patients."""
    seed: int = 0
    member_features: Array | None = None
    """(k, d) of the training records at `members`, where `training` has no features of its own."""

    def __post_init__(self) -> None:
        same_form(self.heldout, self.synthetic)
        same_form(self.heldout, self.training, features=self.member_features is None)

    def generator(self, use: int) -> np.random.Generator:
        """Return random numbers of their own for each use."""
        return np.random.default_rng([self.seed, use])

    def need(self, **counts: int) -> None:
        """Refuse sets that are too small.

        Raises:
            Undefined: one has fewer records than `MIN_RECORDS`, or than given by its name.
        """
        for name in ("synthetic", "training", "heldout"):
            fewest, given = counts.get(name, MIN_RECORDS), len(getattr(self, name))
            if given < fewest:
                raise Undefined(f"{given} {name} records, at least {fewest} are needed")

    @functools.cached_property
    def prepared(self) -> dict[str, Prepared]:
        """The three sets, ready for `copies.search`."""
        return {
            name: copies.prepare(side.signals_mv, side.rate_hz)
            for name, side in vars(self).items()
            if isinstance(side, Side)
        }

    @functools.cached_property
    def from_synthetic(self) -> Matches:
        """The training record most like each synthetic one."""
        return copies.search(self.prepared["synthetic"], self.prepared["training"])

    @functools.cached_property
    def from_heldout(self) -> Matches:
        """The training record most like each held-out one: what chance and anatomy give."""
        return copies.search(self.prepared["heldout"], self.prepared["training"])

    @functools.cached_property
    def targets(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows of members (training), of non-members and of the reference (held-out)."""
        outsiders, reference = halves(self.heldout, self.generator(0))
        return members(len(self.training), self.seed), outsiders[:TARGETS], reference

    @functools.cached_property
    def threshold(self) -> float:
        """The similarity from which a synthetic record is called a copy."""
        among = self.from_heldout.similarity
        return float(np.clip(np.percentile(among, COPY_PERCENTILE), *COPY_SIMILARITY))

    @functools.cached_property
    def signal_scores(self) -> tuple[Array, Array]:
        """Scores of members and of non-members by signals, aligned; greater means a member."""
        tried, outsiders, reference = self.targets
        real, generated = self.prepared["heldout"], self.prepared["synthetic"]
        calibration = real.take(reference)
        scores = []
        for targets in (self.prepared["training"].take(tried), real.take(outsiders)):
            near = copies.search(targets, generated).distance
            far = copies.search(targets, calibration).distance
            scores.append(far / np.maximum(near, 1e-6))
        return scores[0], scores[1]

    @functools.cached_property
    def feature_scores(self) -> tuple[Array, Array]:
        """The same by a classifier's features, each in units of its spread."""
        tried, outsiders, reference = self.targets
        trained = self.member_features
        if trained is None:
            trained = self.training.features[tried]
        spread = self.heldout.features.std(axis=0)
        scale = np.where(spread > 0, spread, 1.0)
        generated = self.synthetic.features / scale
        calibration = self.heldout.features[reference] / scale
        scores = []
        for real in (trained, self.heldout.features[outsiders]):
            near, _ = closest(real / scale, generated)
            far, _ = closest(real / scale, calibration)
            scores.append(far / np.maximum(near, 1e-6))
        return scores[0], scores[1]


def members(num_training: int, seed: int) -> NDArray[np.int64]:
    """Return rows of the training records that the inference is tried on."""
    return np.random.default_rng([seed, 6]).permutation(num_training)[:TARGETS]


def tail(share: float, count: int) -> float:
    """Return the chance that a further value lies beyond the `share` quantile of `count` values.

    It is more than `share`: a sample's quantile lies within the sample. Of exchangeable values
    (share count + 1 - share) / (count + 1), but for the skew between two of them.
    """
    return (share * count + 1 - share) / (count + 1)


def _membership(
    scores: Literal["signal_scores", "feature_scores"],
    statistic: Callable[[Array, Array], float],
    ideal: Callable[[int], float],
    fewest: int,
) -> Callable[[Audit], Leak]:
    """Return a measure: how well the attack's scores tell members from others.

    The score of a real record is its distance to the nearest of other held-out records over that to
    the nearest synthetic one: near a synthetic record, and more so than its kind is anyway.
    Source: the density ratio of DOMIAS (van Breugel et al. 2023, arXiv 2302.12580), by distances.
    """

    def compute(audit: Audit) -> Leak:
        audit.need(heldout=2 * fewest)
        inside, outside = getattr(audit, scores)
        found = _interval(statistic, inside, outside, audit.generator(1))
        return Leak(*found, ideal(len(outside)))

    return compute


def attack_auc(members: Array, outsiders: Array) -> float:
    """Return the chance that a member scores above a non-member."""
    labels = np.repeat([1, 0], [len(members), len(outsiders)])
    return float(roc_auc(labels, np.concatenate([members, outsiders])))


def attack_tpr(members: Array, outsiders: Array) -> float:
    """Return the share of members found where 1 % of the others are taken for members.

    Source: Carlini et al. 2022, "Membership inference attacks from first principles".
    """
    return float(np.mean(members > np.quantile(outsiders, 1 - FALSE_POSITIVE_RATE)))


def _resampled(values: Array, generator: np.random.Generator) -> Array:
    return values[generator.integers(0, len(values), len(values))]


def _interval(
    statistic: Callable[[Array, Array], float],
    first: Array,
    second: Array,
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """Return a statistic of two groups with its 95 % bootstrap interval over both."""
    draws = [
        statistic(_resampled(first, generator), _resampled(second, generator))
        for _ in range(NUM_BOOTSTRAPS)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return statistic(first, second), float(low), float(high)


def closest(queries: NDArray[Any], base: NDArray[Any] | _Rows) -> tuple[Array, NDArray[np.int64]]:
    """Return the Euclidean distance of each query (n, d) to the nearest of `base` (m, d), and it.

    Raises:
        ValueError: the base is empty.
    """
    if not len(base):
        raise ValueError("there is no record to compare with")
    nearest = np.full(len(queries), math.inf)
    row = np.zeros(len(queries), dtype=np.int64)
    for begin in range(0, len(base), CHUNK):
        part = base[begin : begin + CHUNK]
        squares = _squares(part) - 2.0 * (queries @ part.T)
        best = squares.argmin(axis=1)
        least = squares[np.arange(len(queries)), best]
        row = np.where(least < nearest, begin + best, row)
        nearest = np.minimum(nearest, least)
    return np.sqrt(np.maximum(nearest + _squares(queries), 0)), row


def _squares(rows: NDArray[Any]) -> Array:
    lengths: Array = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return lengths


def _closest_share(audit: Audit) -> Leak:
    """Share of synthetic records whose closest real record was trained on.

    The usual "distance to closest record", sample by sample and unaligned, of records of amplitude
    1: in mV the lowest record of all is the closest of most. If nothing was learned by heart, it is
    a training one as often as training records are. Some records still are the closest of very
    many, so the bootstrap is over real records, with the synthetic ones that chose them.
    """
    audit.need()
    chosen = audit.generator(2).permutation(len(audit.synthetic))[:CLOSEST_SAMPLE]
    queries = _Rows(audit.prepared["synthetic"])[chosen]
    trained, in_training = closest(queries, _Rows(audit.prepared["training"]))
    other, in_heldout = closest(queries, _Rows(audit.prepared["heldout"]))
    num_training, total = len(audit.training), len(audit.training) + len(audit.heldout)
    first = trained <= other
    votes = np.bincount(np.where(first, in_training, num_training + in_heldout), minlength=total)
    generator = audit.generator(5)
    draws = []
    for _ in range(NUM_BOOTSTRAPS):
        drawn = generator.integers(0, total, total)
        won = votes[drawn]
        draws.append(won[drawn < num_training].sum() / max(won.sum(), 1))
    low, high = np.percentile(draws, [2.5, 97.5])
    return Leak(float(first.mean()), float(low), float(high), num_training / total)


@dataclass(frozen=True, eq=False)
class _Rows:
    """A prepared set as rows of numbers, made where they are asked for: all take 0.3 GB."""

    ready: Prepared

    def __len__(self) -> int:
        return len(self.ready)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        signals = self.ready.signals[rows]
        flat: NDArray[np.float32] = signals.reshape(len(signals), -1).astype(np.float32)
        return flat


def _low_ratio_share(audit: Audit) -> Leak:
    """Share of synthetic records with a nearest-neighbour distance ratio that is low by chance.

    The ratio is that of the distances to the nearest and to the second nearest training record,
    aligned; low means one record stands out. Low is what 5 % of held-out records have.
    """
    audit.need(training=2)
    ours, theirs = (_ratio(matches) for matches in (audit.from_synthetic, audit.from_heldout))
    generator = audit.generator(3)

    def share(synthetic: Array, heldout: Array) -> float:
        return float(np.mean(synthetic < np.percentile(heldout, RATIO_PERCENTILE)))

    found = _interval(share, ours, theirs, generator)
    return Leak(*found, tail(RATIO_PERCENTILE / 100, len(theirs)))


def _ratio(matches: Matches) -> Array:
    second = copies.to_distance(matches.second)
    return np.where(second > 0, matches.distance / np.maximum(second, 1e-9), 1.0)


def _copy_share(audit: Audit) -> Leak:
    """Share of synthetic records that are copies, whatever their shift and gain."""
    audit.need()
    ours, theirs = audit.from_synthetic.similarity, audit.from_heldout.similarity
    count = int((ours > audit.threshold).sum())
    low, high = wilson(count, len(ours))
    # The share among held-out records, who copy nobody, is itself known from few.
    _, ideal = wilson(int((theirs > audit.threshold).sum()), len(theirs))
    return Leak(count / len(ours), low, high, ideal)


ALIGNED = damage.COPIES
FALSE_ALARMS = functools.partial(tail, FALSE_POSITIVE_RATE)
MEASURES: tuple[PrivacyMeasure, ...] = (
    PrivacyMeasure(
        "membership_signal",
        "Membership inference on signals, aligned: ROC-AUC",
        ALIGNED,
        _membership("signal_scores", attack_auc, lambda _: 0.5, MIN_RECORDS),
    ),
    PrivacyMeasure(
        "membership_signal_tpr",
        "Membership inference on signals: members found at 1 % false alarms",
        ALIGNED,
        _membership("signal_scores", attack_tpr, FALSE_ALARMS, 100),
    ),
    PrivacyMeasure(
        "membership_features",
        "Membership inference on a classifier's features: ROC-AUC",
        ("exact_copies",),
        _membership("feature_scores", attack_auc, lambda _: 0.5, MIN_RECORDS),
    ),
    PrivacyMeasure(
        "membership_features_tpr",
        "Membership inference on features: members found at 1 % false alarms",
        ("exact_copies",),
        _membership("feature_scores", attack_tpr, FALSE_ALARMS, 100),
    ),
    PrivacyMeasure("copies", "Records that copy a training record", ALIGNED, _copy_share),
    PrivacyMeasure(
        "distance_ratio",
        "Records with one training record far nearer than the next",
        ALIGNED,
        _low_ratio_share,
    ),
    PrivacyMeasure(
        "closest_record",
        "Records whose closest real record, unaligned, was trained on",
        ("exact_copies", "noisy_copies", "scaled_copies"),
        _closest_share,
    ),
)


def measured(measure: PrivacyMeasure, audit: Audit) -> Leak:
    """Return a measure's value; where it is undefined, NaN and the reason."""
    try:
        return measure.compute(audit)
    except Undefined as reason:
        return Leak(math.nan, math.nan, math.nan, math.nan, str(reason))


def as_measures(training: Side) -> tuple[Measure, ...]:
    """Return measures of a candidate and held-out records, for the self-test of all measures.

    They hold the training records themselves; those that need hundreds of records are left out.
    """

    @functools.lru_cache(maxsize=1)
    def whole(candidate: Side, reference: Side) -> Audit:
        return Audit(candidate, training, reference)

    def value(
        compute: Callable[[Audit], Leak], candidate: Side, reference: Side, _: np.random.Generator
    ) -> float:
        return compute(whole(candidate, reference)).value

    return tuple(
        Measure(
            name=f"privacy_{measure.name}",
            title=measure.title,
            unit="",
            better="lower",
            sees=measure.sees,
            compute=functools.partial(value, measure.compute),
        )
        for measure in MEASURES
        if not measure.name.endswith("_tpr")
    )


@dataclass(frozen=True)
class Privacy:
    """What an audit found."""

    leaks: dict[str, Leak]
    pairs: tuple[Pair, ...]
    """The most similar synthetic and training records, worst first."""
    threshold: float
    """Similarity from which a record is called a copy."""
    recall: float
    """Share of disguised copies, planted for this, that the search finds in this set."""
    num_planted: int
    counts: dict[str, int]
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold: None for NaN."""
        titles = {measure.name: measure.title for measure in MEASURES}
        return {
            "measures": {
                name: {"title": titles[name], **leak.to_json()} for name, leak in self.leaks.items()
            },
            "pairs": [asdict(pair) for pair in self.pairs],
            "threshold": None if math.isnan(self.threshold) else self.threshold,
            "recall": None if math.isnan(self.recall) else self.recall,
            "num_planted": self.num_planted,
            "counts": self.counts,
            "reason": self.reason or None,
        }


def audit(
    synthetic: Side,
    training: Side,
    heldout: Side,
    *,
    synthetic_ids: Sequence[int] | NDArray[np.int64] | None = None,
    training_ids: Sequence[int] | NDArray[np.int64] | None = None,
    member_features: Array | None = None,
    seed: int = 0,
) -> Privacy:
    """Measure what a synthetic set gives away, and name the worst pairs.

    Args:
        synthetic: generated records.
        training: the records that the generator was trained on.
        heldout: real records of other patients, unseen by generator and feature classifier.
        synthetic_ids: what to call synthetic records in `pairs`; default their rows.
        training_ids: the same for training records.
        member_features: features of the training records at `members`, if `training` has none.
        seed: of samples and bootstraps.

    Raises:
        UserError: records that differ in length, rate, labels or features.
    """
    whole = Audit(synthetic, training, heldout, seed, member_features)
    leaks = {measure.name: measured(measure, whole) for measure in MEASURES}
    counts = {name: len(side) for name, side in vars(whole).items() if isinstance(side, Side)}
    if min(counts.values()) == 0:
        empty = ", ".join(name for name, count in counts.items() if not count)
        return Privacy(leaks, (), math.nan, math.nan, 0, counts, f"no {empty} records")
    num_planted, recall = _recall(whole)
    return Privacy(
        leaks=leaks,
        pairs=_worst(whole, synthetic_ids, training_ids),
        threshold=whole.threshold,
        recall=recall,
        num_planted=num_planted,
        counts=counts,
    )


def _worst(
    whole: Audit,
    synthetic_ids: Sequence[int] | NDArray[np.int64] | None,
    training_ids: Sequence[int] | NDArray[np.int64] | None,
) -> tuple[Pair, ...]:
    found = whole.from_synthetic
    worst = np.argsort(-found.similarity, kind="stable")[:NUM_PAIRS]
    ours = np.arange(len(whole.synthetic)) if synthetic_ids is None else synthetic_ids
    theirs = np.arange(len(whole.training)) if training_ids is None else training_ids
    return tuple(
        Pair(
            synthetic=int(ours[k]),
            training=int(theirs[int(found.row[k])]),
            similarity=float(found.similarity[k]),
            shift_s=float(found.shift_s[k]),
            gain=float(found.gain[k]),
            copy=bool(found.similarity[k] > whole.threshold),
        )
        for k in worst
    )


def _recall(whole: Audit) -> tuple[int, float]:
    generator = whole.generator(4)
    rows = generator.permutation(len(whole.training))[:NUM_PLANTED]
    planted = copies.PLANTS["disguised"](
        whole.training.signals_mv[rows], whole.training.rate_hz, generator
    )
    ready = copies.prepare(planted, whole.training.rate_hz)
    found = copies.search(ready, whole.prepared["training"])
    return len(rows), float(np.mean(found.similarity > whole.threshold))
