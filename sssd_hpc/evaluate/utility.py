"""Utility of a set: what classifiers trained on one set of records score on another.

An arm trains classifiers of several seeds and sets their thresholds on its own validation records;
test records see neither. Values are cached by content, so that a table goes on where it stopped and
two tables share what they share. Source: SSSD-ECG-nle (arXiv 2407.11108), sections IV-E and V.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc.evaluate import metrics
from sssd_hpc.evaluate.classify import Classifier, Recipe, fit
from sssd_hpc.evaluate.splits import Split
from sssd_hpc.files import atomic_write_bytes, sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

Values = NDArray[np.float64]

MAX_KEPT = 4
"""Classifiers kept in memory, so that features need no second training."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What classifiers are made of: records that train them, and records that set thresholds."""

    name: str
    training: Split
    validation: Split


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """Trains classifiers and asks them of records, or remembers what they said before."""

    recipe: Recipe
    seeds: tuple[int, ...]
    cache: Path | None = None
    """Folder of remembered scores, one file a classifier; it may be removed at any time."""

    _trained: dict[str, Classifier] = dataclasses.field(default_factory=dict, repr=False)
    """The last classifiers of this process, by what they are made of."""

    def scores(self, arm: Arm, splits: Sequence[Split]) -> list[list[Values]]:
        """Return, seed by seed, the probabilities (n, num_labels) of each split."""
        return [self._asked(arm, splits, seed, Classifier.predict, "") for seed in self.seeds]

    def features(self, arm: Arm, splits: Sequence[Split]) -> list[Values]:
        """Return the first seed's features (n, d) of each split, d as `Classifier.features`."""
        return self._asked(arm, splits, self.seeds[0], Classifier.features, "features-")

    def _asked(
        self,
        arm: Arm,
        splits: Sequence[Split],
        seed: int,
        ask: Callable[[Classifier, NDArray[np.float32]], Values],
        kind: str,
    ) -> list[Values]:
        made_of = self._made_of(arm.training, seed)
        path = self.cache / f"scores-{made_of}.npz" if self.cache else None
        known = _read(path) if path else {}
        missing = [split for split in splits if kind + split.digest not in known]
        if missing:
            classifier = self._classifier(arm, seed, made_of)
            for split in missing:
                # No records have no shape: one of training tells it.
                chunks = split.chunks_mv() if len(split) else [arm.training.signals_mv()[:1]]
                values = np.concatenate([ask(classifier, chunk) for chunk in chunks])
                known[kind + split.digest] = values[: len(split)]
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **known)
                atomic_write_bytes(path, buffer.getvalue(), durable=False)
        return [known[kind + split.digest] for split in splits]

    def _classifier(self, arm: Arm, seed: int, made_of: str) -> Classifier:
        if made_of not in self._trained:
            training = arm.training
            classifier = fit(
                training.signals_mv(),
                training.labels,
                training.rate_hz,
                recipe=self.recipe,
                seed=seed,
                title=f"classifier on {len(training)} {arm.name} records"
                + (f", seed {seed}" if len(self.seeds) > 1 else ""),
            )
            while len(self._trained) >= MAX_KEPT:
                del self._trained[next(iter(self._trained))]
            self._trained[made_of] = classifier
        return self._trained[made_of]

    def _made_of(self, training: Split, seed: int) -> str:
        """Return a hash of all that decides a classifier."""
        made_of = (
            training.digest,
            dataclasses.asdict(self.recipe),
            seed,
            _code(),
            torch.__version__,
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        return sha256_bytes(repr(made_of).encode())[:24]


@functools.cache
def _code() -> tuple[str, ...]:
    """Return hashes of what decides scores and features besides data: a changed one forgets."""
    here = Path(__file__).parent
    return tuple(sha256_file(here / name) for name in ("classify.py", "xresnet1d.py"))


def _read(path: Path) -> dict[str, Values]:
    """Read remembered scores; a file that is not whole is no memory."""
    if not path.is_file():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged and made again: %s", path, error)
        return {}


def too_few(split: Split, what: str, column: int = 0) -> str:
    """Say why a split cannot play its part for a label, or return an empty text."""
    num_positive = int(split.labels[:, column].sum())
    num_negative = len(split) - num_positive
    if min(num_positive, num_negative) >= metrics.MIN_PER_CLASS:
        return ""
    missing = "" if len(split) else "; sample with --folds 1-10"
    return (
        f"{what} has {num_positive} positive and {num_negative} negative records, "
        f"at least {metrics.MIN_PER_CLASS} of each are needed{missing}"
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of a table: an arm, and the records that it is tested on."""

    name: str
    arm: Arm
    tested: str
    test: Split
    reason: str = ""
    """Why it cannot be computed, where that is known."""


def binary_rows(cells: Sequence[Cell], laboratory: Laboratory, *, seed: int) -> dict[str, Any]:
    """Return the rows of a table for one label: counts, thresholds, metrics, and the scores.

    `seed` is that of the bootstrap.
    """
    reasons = {cell.name: _cannot(cell) for cell in cells}
    scores = _scored([cell for cell in cells if not reasons[cell.name]], laboratory)
    return {
        cell.name: _binary_row(cell, reasons[cell.name], scores.get(cell.name, []), seed=seed)
        for cell in cells
    }


def _scored(
    cells: Sequence[Cell], laboratory: Laboratory
) -> dict[str, list[tuple[Values, Values]]]:
    """Return, by cell and seed, the scores of its validation and of its test records.

    Each arm is trained once for all of its cells.
    """
    scores = {}
    for name, arm in {cell.arm.name: cell.arm for cell in cells}.items():
        own = [cell for cell in cells if cell.arm.name == name]
        found = laboratory.scores(arm, [arm.validation, *(cell.test for cell in own)])
        for place, cell in enumerate(own, 1):
            scores[cell.name] = [(of_seed[0], of_seed[place]) for of_seed in found]
    return scores


def _cannot(cell: Cell) -> str:
    reason = (
        cell.reason
        or too_few(cell.arm.training, f"{cell.arm.name} folds 1-8")
        or too_few(cell.test, f"{cell.tested} fold 10")
    )
    if reason:
        logger.warning("%s cannot be computed: %s", cell.name, reason)
    return reason


def _binary_row(
    cell: Cell, reason: str, found: list[tuple[Values, Values]], *, seed: int
) -> dict[str, Any]:
    validation, scores = ([pair[k][:, 0] for pair in found] for k in range(2))
    arm, labels = cell.arm, cell.test.labels[:, 0]
    thresholds: list[float] = []
    threshold_reason = reason
    if reason:
        values = {name: metrics.Metric(math.nan, reason=reason) for name in metrics.METRICS}
    else:
        chosen = [metrics.choose_threshold(arm.validation.labels[:, 0], one) for one in validation]
        thresholds = [threshold for threshold, _ in chosen]
        threshold_reason = too_few(arm.validation, f"{arm.name} fold 9") or next(
            (why for _, why in chosen if why), ""
        )
        values = metrics.score(
            labels, scores, thresholds, threshold_reason=threshold_reason, seed=seed
        )
    return {
        **_counts(cell),
        "num_test_positive": int(labels.sum()),
        "thresholds": [None if math.isnan(one) else one for one in thresholds],
        "reason": reason or threshold_reason or None,
        "metrics": {name: value.to_json() for name, value in values.items()},
        "test": {
            "ecg_id": cell.test.ecg_id.tolist() if scores else [],
            "label": labels.tolist() if scores else [],
            "scores": [one.tolist() for one in scores],
        },
    }


OVERALL = {"roc_auc": "macro", "g_mean": "weighted", "f1": "weighted"}
"""How labels make one number: their mean, or their mean weighted by positive test records."""


def multilabel_rows(
    cells: Sequence[Cell], labels: Sequence[str], laboratory: Laboratory, *, seed: int
) -> dict[str, Any]:
    """Return the rows of a table of classifiers that score all labels at once.

    A label counts where training, validation and test records all hold both classes; the others are
    named with the reason. In a bootstrap draw that loses a label's last positive or negative record
    the mean is over the others. Source: Table II of arXiv 2407.11108.
    """
    able = [cell for cell in cells if len(cell.test) and len(cell.arm.training) > 1]
    scores = _scored(able, laboratory)
    rows = {cell.name: _multilabel_row(cell, labels, scores[cell.name], seed) for cell in able}
    missing = "no records to train or to test on; sample with --folds 1-10"
    return {cell.name: rows.get(cell.name) or _empty_row(cell, missing) for cell in cells}


def _multilabel_row(
    cell: Cell, labels: Sequence[str], scores: list[tuple[Values, Values]], seed: int
) -> dict[str, Any]:
    arm, test = cell.arm, cell.test
    excluded, by_label = {}, {}
    draws = metrics.draw_any(len(test), metrics.NUM_BOOTSTRAPS, seed)
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in OVERALL}
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in OVERALL}
    weights = []
    for column, label in enumerate(labels):
        truth = test.labels[:, column]
        reason = (
            too_few(arm.training, f"{arm.name} folds 1-8", column)
            or too_few(arm.validation, f"{arm.name} fold 9", column)
            or too_few(test, f"{cell.tested} fold 10", column)
        )
        chosen = [
            metrics.choose_threshold(arm.validation.labels[:, column], on_validation[:, column])
            for on_validation, _ in scores
        ]
        reason = reason or next((why for _, why in chosen if why), "")
        if reason:
            excluded[label] = reason
            continue
        weights.append(float(truth.sum()))
        pairs = [
            (on_test[:, column], threshold)
            for (_, on_test), (threshold, _) in zip(scores, chosen, strict=True)
        ]
        for name in OVERALL:
            metric = metrics.METRICS[name]
            values[name].append(np.array([metric(truth, *pair) for pair in pairs]))
            drawn[name].append(np.stack([metric(truth, *pair, draws) for pair in pairs]))
        by_label[label] = {
            "num_test_positive": int(truth.sum()),
            **{name: float(np.mean(values[name][-1])) for name in OVERALL},
        }
    if not by_label:
        return _empty_row(cell, f"no label can be scored: {next(iter(excluded.values()))}")
    overall = {}
    for name, how in OVERALL.items():
        share = np.array(weights) if how == "weighted" else np.ones(len(weights))
        overall[name] = metrics.with_interval(
            _mean(np.stack(values[name]), share),
            _mean(np.stack(drawn[name]), share),
            metrics.picks(len(scores), metrics.NUM_BOOTSTRAPS, seed),
        ).to_json()
    return {**_counts(cell), "metrics": overall, "labels": by_label, "excluded": excluded}


def _mean(values: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weighted mean over labels, the first axis, of those that are defined."""
    known = ~np.isnan(values)
    share = share.reshape(-1, *[1] * (values.ndim - 1)) * known
    total = share.sum(axis=0)
    mean = np.full(total.shape, np.nan)
    np.divide((np.where(known, values, 0.0) * share).sum(axis=0), total, out=mean, where=total > 0)
    return mean


def _empty_row(cell: Cell, reason: str) -> dict[str, Any]:
    """Return the row of a cell that cannot be computed."""
    logger.warning("%s cannot be computed: %s", cell.name, reason)
    none = metrics.Metric(math.nan, reason=reason).to_json()
    return {**_counts(cell), "metrics": dict.fromkeys(OVERALL, none), "labels": {}, "excluded": {}}


def _counts(cell: Cell) -> dict[str, Any]:
    """Return what both kinds of rows say of their records."""
    return {
        "trained_on": cell.arm.name,
        "tested_on": cell.tested,
        "num_training": len(cell.arm.training),
        "num_validation": len(cell.arm.validation),
        "num_test": len(cell.test),
    }
