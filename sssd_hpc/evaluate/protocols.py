"""TRTR, TSTR, TRTS and TSTS for one binary label, and the checks that keep them honest.

Folds 1-8 train, fold 9 sets the threshold, fold 10 is scored; threshold and training always come
from the same side. Leakage is an error, not a footnote. Source: SSSD-ECG-nle (arXiv 2407.11108),
sections IV-E and V-A. This file knows stores, never the model that made the synthetic one.
"""

from __future__ import annotations

import difflib
import logging
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_hpc import __version__
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import checks, metrics, paper, report, tables
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.evaluate.inspection import inspect
from sssd_hpc.evaluate.splits import FOLDS
from sssd_hpc.evaluate.summary import summary
from sssd_hpc.evaluate.utility import Cell, Laboratory, binary_rows
from sssd_hpc.files import sha256_bytes, sha256_file

logger = logging.getLogger(__name__)

CACHE = "cache"
"""Folder of a report where scores are remembered."""

TABLES = ("conditioning", "multilabel", "augmentation", "convergence")
"""The paper's Tables I to IV."""

DEFAULT_LABEL = "NORM"


def evaluate(
    real: Store,
    synthetic: Store,
    out: Path,
    *,
    label: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    epochs: int | None = None,
    allow_leakage: bool = False,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Score a synthetic set by TRTR, TSTR, TRTS, TSTS, fidelity and privacy; write the report.

    What classifiers scored is remembered in `out`, so that a command that was stopped goes on.

    Args:
        real: store of the real records.
        synthetic: store of the synthetic records, of the same label names, rate and leads.
        out: folder of report.json, report.html and figures/*.png.
        label: label to classify; default NORM, else the one nearest to balance.
        seed: of the first classifier, of bootstrap and choice of pictures.
        seeds: classifiers of each side, of seeds from `seed` on; metrics are their means.
        epochs: of each classifier; default that of the recipe.
        allow_leakage: report leakage instead of refusing it.
        recipe: how classifiers are trained; default `Recipe`, shorter than the benchmark's.

    Raises:
        UserError: the stores do not fit together, the label is unknown, a patient stands in two
            folds, or the same waveform stands on both sides of a split (unless allowed).
    """
    began = time.monotonic()
    laboratory = _laboratory(out, recipe, epochs, seed, seeds)
    findings = checks.check(real, synthetic, allow_leakage=allow_leakage)
    label, why = choose_label(real, label)
    logger.info("label %s: %s", label, why)
    cells = tables.directions(real, synthetic, [label])
    if (count := len(cells[0].arm.training)) < 2:
        raise UserError(
            f"{real.path.name} has {count} record(s) in folds 1-8, which train the classifier that "
            "everything is compared by; prepare the whole set"
        )
    results = binary_rows(cells, laboratory, seed=seed)
    inspection = inspect(real, synthetic, label, laboratory, seed=seed)
    result: dict[str, Any] = {
        "format": report.FORMAT,
        "protocol": "utility",
        "label": label,
        "label_choice": why,
        "sides": {
            side: {**_describe(store), "splits": _counts(cells, side)}
            for side, store in (("real", real), ("synthetic", synthetic))
        },
        "checks": [asdict(finding) for finding in findings],
        "protocols": results,
        "paper": paper.of_label(label),
        "trtr_minus_tstr": {"roc_auc": _gap(results["TRTR"], results["TSTR"], seed).to_json()},
        **inspection.found,
        **_making(laboratory, began),
    }
    result["summary"] = summary(result)
    report.write(result, real, synthetic, inspection.sides, out)
    return result


def tabulate(
    protocol: str,
    real: Store,
    sets: Mapping[str, Store],
    out: Path,
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    seeds: int = 1,
    epochs: int | None = None,
    allow_leakage: bool = False,
    recipe: Recipe | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Make one of the paper's tables; write report.json and report.html into `out`; return it.

    Args:
        protocol: one of TABLES.
        real: store of the real records.
        sets: stores of synthetic records by name; `conditioning` and `convergence` take several,
            the latter by names that end in the samples seen, others take one.
        out: folder of the report and of what was scored so far.
        labels: labels to classify; default: those of the paper, or all for `multilabel`.
        notes: sentences that stand under the table.
        seed: see `evaluate`; so are the rest.

    Raises:
        UserError: see `evaluate`; a label that the stores lack; several sets for a table of one.
    """
    began = time.monotonic()
    laboratory = _laboratory(out, recipe, epochs, seed, seeds)
    findings = [
        finding
        for name, store in sets.items()
        for finding in checks.check(real, store, name=name, allow_leakage=allow_leakage)
    ]
    labels = table_labels(protocol, real, labels)
    if protocol == "conditioning":
        table = tables.conditioning(real, sets, labels, laboratory, seed=seed)
    elif protocol == "convergence":
        by_samples = {int(name.rpartition("-")[2]): store for name, store in sets.items()}
        table = tables.convergence(real, by_samples, labels, laboratory, seed=seed)
    else:
        if len(sets) != 1:
            raise UserError(f"--synthetic names {len(sets)} sets; {protocol} takes one")
        make = tables.multilabel if protocol == "multilabel" else tables.augmentation
        table = make(real, next(iter(sets.values())), labels, laboratory, seed=seed)
    result = {
        "format": report.FORMAT,
        "protocol": protocol,
        "labels": list(labels),
        "table": {**table, "notes": [*notes, *table.get("notes", ())]},
        "sides": {name: _describe(store) for name, store in {"real": real, **sets}.items()},
        "checks": [asdict(finding) for finding in dict.fromkeys(findings)],
        **_making(laboratory, began),
    }
    report.write_table(result, out)
    return result


def table_labels(protocol: str, real: Store, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a table: those asked for, or the paper's that a store has.

    `multilabel` takes all of the store's.

    Raises:
        UserError: the store lacks one that is asked for, or has none of the paper's.
    """
    if labels:
        return tuple(choose_label(real, label)[0] for label in labels)
    if protocol == "multilabel":
        return real.label_names
    known = {"conditioning": paper.TABLE_I, "augmentation": paper.TABLE_III}
    theirs: Iterable[str] = next(iter(known.get(protocol, paper.TABLE_IV).values()))
    found = tuple(label for label in theirs if label in real.label_names)
    if not found:
        raise UserError(
            f"{real.path.name} has none of the paper's labels {', '.join(theirs)}; name labels of "
            "it with --label"
        )
    return found


def _laboratory(
    out: Path, recipe: Recipe | None, epochs: int | None, seed: int, seeds: int
) -> Laboratory:
    """Return what trains classifiers and remembers their scores in `out`."""
    recipe = recipe or Recipe()
    if epochs is not None:
        if epochs < 1:
            raise UserError(f"epochs is {epochs}; at least 1 is needed")
        recipe = replace(recipe, epochs=epochs)
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; at least 1 is needed")
    if seed < 0:
        raise UserError(f"seed is {seed}; zero or more is needed")
    return Laboratory(recipe, tuple(range(seed, seed + seeds)), out / CACHE)


def _making(laboratory: Laboratory, began: float) -> dict[str, Any]:
    """Return how a result was made."""
    recipe = laboratory.recipe
    return {
        "seed": laboratory.seeds[0],
        "seeds": list(laboratory.seeds),
        "recipe": {**asdict(recipe), "num_blocks": list(recipe.num_blocks)},
        "versions": {
            "sssd_hpc": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: metadata.version(name) for name in ("numpy", "scipy", "neurokit2")},
        },
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - began, 1),
    }


def named_sets(given: Sequence[str]) -> dict[str, Path]:
    """Return paths by name, from NAME=PATH; a path alone is named "synthetic".

    Raises:
        UserError: a name twice, or one that is taken or is no name.
    """
    named: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = "synthetic", text
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) or name == "real" or name in named:
            raise UserError(
                f"--synthetic {text!r}: names are letters, digits, '_', '.' and '-', each once and "
                "not 'real'; several sets are given as NAME=PATH"
            )
        named[name] = Path(path)
    return named


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
    parts.extend(
        f"{entry.relative_to(root)} {entry.stat().st_size} {entry.stat().st_mtime_ns}"
        for entry in sorted(root.rglob("*.dat"))
    )
    return sha256_bytes("\n".join(parts).encode())


def choose_label(real: Store, label: str | None) -> tuple[str, str]:
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
    share = real.labels_of(real.indices(FOLDS["training"])).mean(axis=0)
    nearest = int(np.argmin(np.abs(share - 0.5)))
    return names[nearest], (
        f"nearest to balance, {share[nearest]:.0%} of the real training records, "
        f"as the stores have no {DEFAULT_LABEL}"
    )


def _gap(trtr: dict[str, Any], tstr: dict[str, Any], seed: int) -> metrics.Metric:
    """Return what training on synthetic records costs in ROC-AUC on the real test records."""
    for row in (trtr, tstr):
        if reason := row["metrics"]["roc_auc"]["reason"]:
            return metrics.Metric(math.nan, reason=reason)
    labels = np.array(trtr["test"]["label"])
    first, second = (list(map(np.array, row["test"]["scores"])) for row in (trtr, tstr))
    return metrics.roc_auc_gap(labels, first, second, seed=seed)


def _counts(cells: Sequence[Cell], side: str) -> dict[str, dict[str, int]]:
    """Return the records and positives of a side's parts."""
    arm = next(cell.arm for cell in cells if cell.arm.name == side)
    test = next(cell.test for cell in cells if cell.tested == side)
    parts = {"training": arm.training, "validation": arm.validation, "test": test}
    return {
        name: {"records": len(part), "positive": int(part.labels.sum())}
        for name, part in parts.items()
    }


def _describe(store: Store) -> dict[str, Any]:
    """Return what a reader needs to know of a side: no path of the machine beyond the name."""
    return {
        "name": store.path.name,
        "manifest_sha256": sha256_file(store.path / "manifest.json"),
        "num_records": store.num_records,
        "rate_hz": store.rate_hz,
        "length": store.length,
    }
