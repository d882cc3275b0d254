"""The paper's tables from stores to numbers: conditioning, multilabel, augmentation, convergence.

Source: SSSD-ECG-nle (arXiv 2407.11108), Tables I to IV; its own figures stand in `paper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate import paper
from sssd_hpc.evaluate.splits import FOLDS, Split, split
from sssd_hpc.evaluate.utility import Arm, Cell, Laboratory, binary_rows, multilabel_rows

DIRECTIONS = {
    "TRTR": ("real", "real"),
    "TSTR": ("synthetic", "real"),
    "TRTS": ("real", "synthetic"),
    "TSTS": ("synthetic", "synthetic"),
}
"""Which side trains (and sets the threshold) and which is tested."""

COLUMNS = ("g_mean", "f1", "roc_auc")

Sets = Mapping[str, Store]
"""Synthetic sets by the name of their arm."""


def conditioning(
    real: Store, sets: Sets, labels: Sequence[str], laboratory: Laboratory, *, seed: int
) -> dict[str, Any]:
    """Return Table I: TRTR, and TSTR and TRTS of each set, a binary classifier for each label.

    Args:
        real: store of the real records.
        sets: one synthetic set for each way of conditioning.
        labels: labels to classify one by one.
        laboratory: trains the classifiers.
        seed: of the bootstrap.
    """
    rows = {}
    for label in labels:
        real_arm, real_test = _sides(real, "real", [label])
        cells = [Cell("TRTR", real_arm, "real", real_test)]
        for name, store in sets.items():
            arm, test = _sides(store, name, [label])
            cells.append(Cell(f"{name} TSTR", arm, "real", real_test))
            cells.append(Cell(f"{name} TRTS", real_arm, name, test))
        rows[label] = binary_rows(cells, laboratory, seed=seed)
    return {
        "title": "Conditioning mechanisms",
        "source": "Table I",
        "columns": list(COLUMNS),
        "rows": rows,
        "paper": _beside(rows, paper.TABLE_I),
    }


def augmentation(
    real: Store, synthetic: Store, labels: Sequence[str], laboratory: Laboratory, *, seed: int
) -> dict[str, Any]:
    """Return Table III: real training records alone, positives doubled, synthetic positives added.

    "double" repeats each positive once; it tells what mere enlargement does. Thresholds are set on
    real validation records, scores are of real test records. Arguments as those of `conditioning`.
    """
    rows = {}
    for label in labels:
        arm, test = _sides(real, "real", [label])
        added = split(synthetic, [label], "training").positives()
        trained = {
            "baseline": arm.training,
            "double": arm.training + arm.training.positives(),
            "synthetic": arm.training + added,
        }
        none = "" if len(added) else f"synthetic folds 1-8 hold no {label} to add"
        cells = [
            Cell(
                name,
                Arm(name, training, arm.validation),
                "real",
                test,
                reason=none if name == "synthetic" else "",
            )
            for name, training in trained.items()
        ]
        rows[label] = binary_rows(cells, laboratory, seed=seed)
    return {
        "title": "Augmentation of the real training records",
        "source": "Table III",
        "columns": list(COLUMNS),
        "rows": rows,
        "paper": _beside(rows, paper.TABLE_III),
    }


def multilabel(
    real: Store, synthetic: Store, labels: Sequence[str], laboratory: Laboratory, *, seed: int
) -> dict[str, Any]:
    """Return Table II: classifiers of all labels at once, in all four directions.

    Arguments as those of `conditioning`.
    """
    cells = directions(real, synthetic, labels)
    rows = {"all": multilabel_rows(cells, labels, laboratory, seed=seed)}
    theirs = {
        name: dict(zip(COLUMNS, values, strict=True)) for name, values in paper.TABLE_II.items()
    }
    return {
        "title": f"Multilabel classification, {len(labels)} labels",
        "source": "Table II",
        "columns": list(COLUMNS),
        "rows": rows,
        "paper": {"all": theirs},
        "notes": [
            f"The paper's figures are of {paper.TABLE_II_LABELS} labels, these of {len(labels)}."
        ],
    }


def convergence(
    real: Store,
    sets: Mapping[int, Store],
    labels: Sequence[str],
    laboratory: Laboratory,
    *,
    seed: int,
) -> dict[str, Any]:
    """Return Table IV: TSTR and TRTS of sets drawn from a run's checkpoints, by samples seen.

    Arguments as those of `conditioning`, but that `sets` are by the samples a checkpoint has seen.
    """
    rows = {}
    for label in labels:
        real_arm, real_test = _sides(real, "real", [label])
        trained, tested = [], []
        for samples, store in sorted(sets.items()):
            arm, test = _sides(store, f"samples-{samples}", [label])
            trained.append(Cell(f"TSTR {samples}", arm, "real", real_test))
            tested.append(Cell(f"TRTS {samples}", real_arm, arm.name, test))
        cells = [Cell("TRTR", real_arm, "real", real_test), *trained, *tested]
        rows[label] = binary_rows(cells, laboratory, seed=seed)
    theirs = {
        label: {
            f"{protocol} {samples}": dict(zip(("g_mean", "f1"), values, strict=True))
            for protocol, of_labels in paper.TABLE_IV.items()
            for samples, values in of_labels.get(label, {}).items()
        }
        for label in labels
    }
    return {
        "title": "Convergence by samples seen",
        "source": "Table IV",
        "columns": list(COLUMNS),
        "samples": sorted(sets),
        "rows": rows,
        "paper": theirs,
        "notes": [
            f"The paper's {label}, {protocol}, G-mean and F1 by samples seen: "
            + ", ".join(f"{n:,}: {g:.3f} and {f:.3f}" for n, (g, f) in of_labels[label].items())
            + "."
            for label in labels
            for protocol, of_labels in paper.TABLE_IV.items()
            if label in of_labels
        ],
    }


def directions(real: Store, synthetic: Store, labels: Sequence[str]) -> list[Cell]:
    """Return the cells of all four directions between a real and a synthetic set."""
    sides = {
        name: _sides(store, name, labels)
        for name, store in (("real", real), ("synthetic", synthetic))
    }
    return [
        Cell(name, sides[trained][0], tested, sides[tested][1])
        for name, (trained, tested) in DIRECTIONS.items()
    ]


def _sides(store: Store, name: str, labels: Sequence[str]) -> tuple[Arm, Split]:
    """Return what trains and what tests, of one store."""
    parts = {part: split(store, labels, part) for part in FOLDS}
    return Arm(name, parts["training"], parts["validation"]), parts["test"]


def _beside(
    rows: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, paper.Row]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the paper's figures for the labels and rows that it has."""
    return {
        label: {
            name: dict(zip(("g_mean", "f1"), theirs[name][label], strict=True))
            for name in of_label
            if label in theirs.get(name, {})
        }
        for label, of_label in rows.items()
    }
