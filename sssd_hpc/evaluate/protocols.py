"""TRTR, TSTR and TRTS for one binary label, and the checks that keep their numbers honest.

Folds 1-8 train, fold 9 sets the threshold, fold 10 is scored; threshold and training always come
from the same side. Leakage is an error, not a footnote. Source: SSSD-ECG-nle (arXiv 2407.11108),
sections IV-E and V-A. This file knows stores, never the model that made the synthetic one.
"""

from __future__ import annotations

import difflib
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc import __version__
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import checks, metrics, report
from sssd_hpc.evaluate.classify import Classifier, Recipe, fit
from sssd_hpc.files import sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

SPLITS: dict[str, tuple[int, ...]] = {
    "training": (1, 2, 3, 4, 5, 6, 7, 8),
    "validation": (9,),
    "test": (10,),
}
PROTOCOLS = {
    "TRTR": ("real", "real"),
    "TSTR": ("synthetic", "real"),
    "TRTS": ("real", "synthetic"),
}
"""Which side trains (and sets the threshold) and which is tested."""

DEFAULT_LABEL = "NORM"


@dataclass(frozen=True)
class Split:
    """Records of one side that play one part: where they stand in the store, and their label."""

    store: Store
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    """(n,), 1 where the label is present."""

    @property
    def num_positive(self) -> int:
        """Records that carry the label."""
        return int(self.labels.sum())

    def signals_mv(self) -> NDArray[np.float32]:
        """Return (n, 12, L) in mV."""
        return self.store.signals_mv(self.rows, LEADS)


def evaluate(
    real: Store,
    synthetic: Store,
    out: Path,
    *,
    label: str | None = None,
    seed: int = 0,
    epochs: int | None = None,
    allow_leakage: bool = False,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Score a synthetic set by TRTR, TSTR and TRTS; write the report into `out` and return it.

    Args:
        real: store of the real records.
        synthetic: store of the synthetic records, of the same label names, rate and leads.
        out: folder of report.json, report.html and figures/*.png.
        label: label to classify; default NORM, else the one nearest to balance.
        seed: of classifiers, bootstrap and choice of pictures.
        epochs: of each classifier; default that of the recipe.
        allow_leakage: report leakage instead of refusing it.
        recipe: how classifiers are trained; default the benchmark's.

    Raises:
        UserError: the stores do not fit together, the label is unknown, a patient stands in two
            folds, or the same waveform stands on both sides of a split (unless allowed).
    """
    began = time.monotonic()
    recipe = recipe or Recipe()
    if epochs is not None:
        if epochs < 1:
            raise UserError(f"epochs is {epochs}; at least 1 is needed")
        recipe = replace(recipe, epochs=epochs)
    findings = checks.check(real, synthetic, allow_leakage=allow_leakage)
    label, why = choose_label(real, synthetic, label)
    logger.info("label %s: %s", label, why)
    sides = {
        name: {split: _split(store, label, folds) for split, folds in SPLITS.items()}
        for name, store in (("real", real), ("synthetic", synthetic))
    }
    classifiers = {side: _classifier(side, splits, recipe, seed) for side, splits in sides.items()}
    results = {
        name: _protocol(sides[trained], sides[tested], trained, tested, classifiers[trained], seed)
        for name, (trained, tested) in PROTOCOLS.items()
    }
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "label": label,
        "label_choice": why,
        "seed": seed,
        "recipe": {**asdict(recipe), "num_blocks": list(recipe.num_blocks)},
        "sides": {
            side: _describe(store, sides[side])
            for side, store in (("real", real), ("synthetic", synthetic))
        },
        "checks": [asdict(finding) for finding in findings],
        "protocols": results,
        "trtr_minus_tstr": {"roc_auc": _gap(results["TRTR"], results["TSTR"], seed).to_json()},
        "versions": {
            "sssd_hpc": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    report.write(result, real, synthetic, out)
    return result


def open_store_or_root(
    path: Path, cache: Path, like: Store, *, allow_leakage: bool = False
) -> Store:
    """Open a store, or prepare a WFDB root as `like` was prepared, into a folder of `cache`.

    The folder's name ends in a hash of the root, so that a root sampled anew is prepared anew and
    the same one is not. No band-pass is applied: records that imitate filtered ones are filtered.

    Raises:
        UserError: `path` is neither, a damaged store, or cannot be prepared.
    """
    if (path / "manifest.json").is_file():
        return Store.open(path, verify=True)
    if not (path / "ptbxl_database.csv").is_file():
        raise UserError(
            f"{path} is neither a store (no manifest.json) nor a WFDB root "
            f"(no ptbxl_database.csv); give what `sample` or `prepare` wrote"
        )
    command = like.manifest.get("command", {})
    return prepare(
        path,
        cache / f"{path.resolve().name}-{_fingerprint(path)[:8]}",
        rate=like.rate_hz,
        labels=command.get("labels", "all"),
        min_likelihood=command.get("min_likelihood"),
        allow_leakage=allow_leakage,
    )


def _fingerprint(root: Path) -> str:
    """Return a hash that changes with a root's table or signals."""
    parts = [sha256_file(root / "ptbxl_database.csv")]
    sums = root / "SHA256SUMS.txt"
    if sums.is_file():
        parts.append(sha256_file(sums))
    else:
        parts.extend(
            f"{entry.relative_to(root)} {entry.stat().st_size} {entry.stat().st_mtime_ns}"
            for entry in sorted(root.rglob("*.dat"))
        )
    return sha256_bytes("\n".join(parts).encode())


def choose_label(real: Store, synthetic: Store, label: str | None) -> tuple[str, str]:
    """Return the label to classify and why it is this one.

    Raises:
        UserError: the label asked for is not in the stores.
    """
    names = real.label_names
    if label is not None:
        if label not in names:
            close = difflib.get_close_matches(label, names, 3) or list(names[:8])
            raise UserError(
                f"label {label!r} is not in {real.path.name}; close ones: {', '.join(close)}"
            )
        return label, "asked for"
    if DEFAULT_LABEL in names:
        return DEFAULT_LABEL, "the default"
    share = real.labels_of(real.indices(SPLITS["training"])).mean(axis=0)
    nearest = int(np.argmin(np.abs(share - 0.5)))
    return names[nearest], (
        f"nearest to balance, {share[nearest]:.0%} of the real training records, "
        f"as the stores have no {DEFAULT_LABEL}"
    )


def _split(store: Store, label: str, folds: tuple[int, ...]) -> Split:
    rows = store.indices(folds)
    return Split(store, rows, store.labels_of(rows)[:, store.label_names.index(label)])


def _too_few(split: Split, what: str) -> str:
    """Say why a split cannot play its part, or return an empty text."""
    num_negative = len(split.labels) - split.num_positive
    if min(split.num_positive, num_negative) >= metrics.MIN_PER_CLASS:
        return ""
    missing = "" if len(split.labels) else "; sample with --folds 1-10"
    return (
        f"{what} has {split.num_positive} positive and {num_negative} negative records, "
        f"at least {metrics.MIN_PER_CLASS} of each are needed{missing}"
    )


def _classifier(
    side: str, splits: dict[str, Split], recipe: Recipe, seed: int
) -> tuple[Classifier | None, str]:
    """Return the classifier of a side's training folds, or None and why there is none."""
    training = splits["training"]
    reason = _too_few(training, f"{side} folds 1-8")
    if reason:
        logger.warning("no classifier: %s", reason)
        return None, reason
    title = f"classifier on {len(training.rows)} {side} records"
    labels = training.labels[:, None]
    rate_hz = training.store.rate_hz
    return fit(training.signals_mv(), labels, rate_hz, recipe=recipe, seed=seed, title=title), ""


def _protocol(
    train_side: dict[str, Split],
    test_side: dict[str, Split],
    trained: str,
    tested: str,
    classifier: tuple[Classifier | None, str],
    seed: int,
) -> dict[str, Any]:
    """Return one row of the report: counts, threshold, metrics, and the scores behind them."""
    validation, test = train_side["validation"], test_side["test"]
    network, reason = classifier
    reason = reason or _too_few(test, f"{tested} fold 10")
    threshold, threshold_reason = math.nan, reason
    scores: NDArray[np.float64] = np.zeros(0)
    if network is not None and not reason:
        scores = network.predict(test.signals_mv())[:, 0]
        threshold_reason = _too_few(validation, f"{trained} fold 9")
        if not threshold_reason:
            on_validation = network.predict(validation.signals_mv())[:, 0]
            threshold, threshold_reason = metrics.choose_threshold(validation.labels, on_validation)
    if reason:
        values = {name: metrics.Metric(math.nan, reason=reason) for name in metrics.METRICS}
    else:
        values = metrics.score(
            test.labels, scores, threshold, threshold_reason=threshold_reason, seed=seed
        )
    return {
        "trained_on": trained,
        "tested_on": tested,
        "num_training": len(train_side["training"].rows),
        "num_validation": len(validation.rows),
        "num_test": len(test.rows),
        "num_test_positive": test.num_positive,
        "threshold": None if math.isnan(threshold) else threshold,
        "reason": reason or threshold_reason or None,
        "metrics": {name: value.to_json() for name, value in values.items()},
        "test": {
            "ecg_id": test.store.ecg_id[test.rows].tolist() if len(scores) else [],
            "label": test.labels.tolist() if len(scores) else [],
            "score": scores.tolist(),
        },
    }


def _gap(trtr: dict[str, Any], tstr: dict[str, Any], seed: int) -> metrics.Metric:
    """Return what training on synthetic records costs in ROC-AUC on the real test records."""
    for row in (trtr, tstr):
        if reason := row["metrics"]["roc_auc"]["reason"]:
            return metrics.Metric(math.nan, reason=reason)
    labels, first, second = (
        np.array(values)
        for values in (trtr["test"]["label"], trtr["test"]["score"], tstr["test"]["score"])
    )
    return metrics.roc_auc_gap(labels, first, second, seed=seed)


def _describe(store: Store, splits: dict[str, Split]) -> dict[str, Any]:
    """Return what a reader needs to know of a side: no path of the machine beyond the name."""
    return {
        "name": store.path.name,
        "manifest_sha256": sha256_file(store.path / "manifest.json"),
        "num_records": store.num_records,
        "rate_hz": store.rate_hz,
        "length": store.length,
        "splits": {
            name: {"records": len(split.rows), "positive": split.num_positive}
            for name, split in splits.items()
        },
    }
