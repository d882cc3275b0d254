"""What an evaluation's numbers say, in plain sentences."""

from __future__ import annotations

from typing import Any


def summary(report: dict[str, Any]) -> list[str]:
    """Return what the numbers say, in plain sentences."""
    auc = {name: row["metrics"]["roc_auc"] for name, row in report["protocols"].items()}
    lines = []
    label = report["label"]
    for name, verb in (
        ("TRTR", "Trained on real and tested on real records"),
        ("TSTR", "Trained on synthetic and tested on the same real records"),
        ("TRTS", "Trained on real and tested on synthetic records"),
    ):
        cell = auc[name]
        if cell["value"] is None:
            lines.append(f"{name} could not be computed: {cell['reason']}.")
            continue
        text = (
            f"{verb}, the classifier of {label} has ROC-AUC {cell['value']:.2f} "
            f"(95 % interval {cell['low']:.2f} to {cell['high']:.2f})"
        )
        if cell["low"] <= 0.5 <= cell["high"]:
            text += ", which cannot be told from guessing"
        lines.append(text + ".")
    gap = report["trtr_minus_tstr"]["roc_auc"]
    if gap["value"] is not None:
        verdict = (
            f"costs {gap['value']:.2f} of ROC-AUC"
            if gap["value"] > 0
            else f"costs no ROC-AUC ({-gap['value']:.2f} more)"
        )
        text = (
            f"Replacing the real training records by synthetic ones {verdict}; the 95 % interval "
            f"of the cost is {gap['low']:.2f} to {gap['high']:.2f}"
        )
        if gap["low"] <= 0 <= gap["high"]:
            text += ", which cannot be told from none"
        lines.append(text + ".")
    return [*lines, *_fidelity_summary(report["fidelity"]), *_privacy_summary(report["privacy"])]


def beyond_floor(row: dict[str, Any]) -> bool:
    """Whether a measure of synthetic records lies past all that real records have, the worse way.

    Intervals that touch are no difference: they span a few halvings of the same records.
    """
    if row["value"] is None or row["floor"] is None:
        return False
    if row["better"] == "lower":
        return bool(row["low"] > row["floor_high"])
    return bool(row["high"] < row["floor_low"])


def _fidelity_summary(fidelity: dict[str, Any]) -> list[str]:
    """Say which measures tell synthetic records from real ones."""
    rows = [row for group in fidelity.values() for row in group.values()]
    known = [row for row in rows if row["value"] is not None]
    beyond = [row for row in known if beyond_floor(row)]
    if not known:
        return ["No measure of fidelity could be computed: there are too few records."]
    text = (
        f"{len(beyond)} of {len(known)} measures of fidelity tell synthetic records from other "
        f"real ones"
    )
    if beyond:
        worst = sorted(beyond, key=_excess, reverse=True)[:4]
        text += ", farthest: " + "; ".join(row["title"] for row in worst)
    return [text + "."]


def _excess(row: dict[str, Any]) -> float:
    """Return how far a measure lies from its floor, in widths of both intervals."""
    width = row["floor_high"] - row["floor_low"] + row["high"] - row["low"]
    return float(abs(row["value"] - row["floor"]) / max(width, 1e-12))


def _privacy_summary(privacy: dict[str, Any]) -> list[str]:
    """Say whether training records were given away."""
    rows = [row for row in privacy["measures"].values() if row["value"] is not None]
    copies = sum(pair["copy"] for pair in privacy["pairs"])
    if not rows:
        return ["Privacy could not be measured: there are too few records."]
    exposed = [row["title"] for row in rows if row["exposed"]]
    if exposed:
        text = f"Training records show through: {', '.join(exposed)}"
    else:
        text = f"None of {len(rows)} measures of privacy tells training records from unseen ones"
    if copies:
        more = " or more" if copies == len(privacy["pairs"]) else ""
        text += f"; {copies}{more} synthetic records are copies of training records"
    return [text + "."]
