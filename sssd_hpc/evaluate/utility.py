"""Utility of a set: what classifiers trained on one set of records score on another.

An arm trains classifiers of several seeds and sets their thresholds on its own validation records;
test records see neither. Scores are cached by content, so that a table goes on where it stopped and
two tables share what they share. Source: SSSD-ECG-nle (arXiv 2407.11108), sections IV-E and V.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc import __version__
from sssd_hpc.evaluate import metrics
from sssd_hpc.evaluate.classify import Recipe, fit
from sssd_hpc.evaluate.splits import Split
from sssd_hpc.files import atomic_write_bytes, sha256_bytes

logger = logging.getLogger(__name__)

Scores = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What classifiers are made of: records that train them, and records that set thresholds."""

    name: str
    training: Split
    validation: Split


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """Trains classifiers and scores records with them, or remembers what it scored before."""

    recipe: Recipe
    seeds: tuple[int, ...]
    cache: Path | None = None
    """Folder of remembered scores, one file a classifier; it may be removed at any time."""

    def scores(self, arm: Arm, splits: Sequence[Split]) -> list[list[Scores]]:
        """Return, seed by seed, the probabilities (n, num_labels) of each split."""
        return [self._of_seed(arm, splits, seed) for seed in self.seeds]

    def _of_seed(self, arm: Arm, splits: Sequence[Split], seed: int) -> list[Scores]:
        path = self._path(arm.training, seed)
        known = _read(path) if path else {}
        if any(split.digest not in known for split in splits):
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
            for split in splits:
                known[split.digest] = (
                    classifier.predict(split.signals_mv())
                    if len(split)
                    else np.zeros((0, training.labels.shape[1]))
                )
            if path:
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **known)
                atomic_write_bytes(path, buffer.getvalue(), durable=False)
        return [known[split.digest] for split in splits]

    def _path(self, training: Split, seed: int) -> Path | None:
        """Name the file of one classifier after all that decides it."""
        if self.cache is None:
            return None
        self.cache.mkdir(parents=True, exist_ok=True)
        made_of = (
            training.digest,
            dataclasses.asdict(self.recipe),
            seed,
            __version__,
            torch.__version__,
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        return self.cache / f"scores-{sha256_bytes(repr(made_of).encode())[:24]}.npz"


def _read(path: Path) -> dict[str, Scores]:
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


def binary_rows(cells: Sequence[Cell], laboratory: Laboratory, *, seed: int) -> dict[str, Any]:
    """Return the rows of a table for one label: counts, thresholds, metrics, and the scores.

    Each arm is trained once for all of its cells; `seed` is that of the bootstrap.
    """
    arms = {cell.arm.name: cell.arm for cell in cells}
    reasons = {cell.name: _cannot(cell) for cell in cells}
    scores: dict[str, tuple[list[Scores], list[Scores]]] = {}
    for name, arm in arms.items():
        able = [cell for cell in cells if cell.arm.name == name and not reasons[cell.name]]
        if not able:
            continue
        found = laboratory.scores(arm, [arm.validation, *(cell.test for cell in able)])
        validation = [of_seed[0][:, 0] for of_seed in found]
        for place, cell in enumerate(able, 1):
            scores[cell.name] = validation, [of_seed[place][:, 0] for of_seed in found]
    return {
        cell.name: _binary_row(
            cell, reasons[cell.name], *scores.get(cell.name, ([], [])), seed=seed
        )
        for cell in cells
    }


def _cannot(cell: Cell) -> str:
    reason = too_few(cell.arm.training, f"{cell.arm.name} folds 1-8") or too_few(
        cell.test, f"{cell.tested} fold 10"
    )
    if reason:
        logger.warning("%s cannot be computed: %s", cell.name, reason)
    return reason


def _binary_row(
    cell: Cell, reason: str, validation: list[Scores], scores: list[Scores], *, seed: int
) -> dict[str, Any]:
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
        "trained_on": arm.name,
        "tested_on": cell.tested,
        "num_training": len(arm.training),
        "num_validation": len(arm.validation),
        "num_test": len(cell.test),
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
