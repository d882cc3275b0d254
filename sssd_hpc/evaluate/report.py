"""The report of an evaluation: report.json, figures, a page that opens offline, a text table.

It formats what `protocols` computed and computes no score itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate import figures, physiology
from sssd_hpc.evaluate.comparison import Side
from sssd_hpc.evaluate.page import COLUMNS, left_out, report_page, table_page
from sssd_hpc.files import atomic_write_text, write_json

FORMAT = 2

TABLE_COLUMNS = ("roc_auc", "g_mean", "f1")
"""What the terminal's table shows with intervals."""

PICTURED = ("heart_rate", "rr_sd", "pr", "qrs", "qtc", "axis")
"""Quantities of physiology that are drawn."""


def write(
    report: dict[str, Any], real: Store, synthetic: Store, sides: Mapping[str, Side], out: Path
) -> None:
    """Write report.json, figures/*.png and report.html into `out`; each is whole or absent."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    pictures = _pictures(report, real, synthetic, sides, out / "figures")
    write_json(out / "report.json", report)
    atomic_write_text(out / "report.html", report_page(report, pictures))


def write_table(report: dict[str, Any], out: Path) -> None:
    """Write report.json and report.html of one of the paper's tables into `out`."""
    pictures = {}
    if report["protocol"] == "convergence":
        (out / "figures").mkdir(parents=True, exist_ok=True)
        pictures["convergence"] = figures.save(
            figures.convergence(report["table"]), out / "figures" / "convergence.png"
        )
    write_json(out / "report.json", report)
    atomic_write_text(out / "report.html", table_page(report, pictures))


def table(report: dict[str, Any]) -> str:
    """Return the result as a text table for a terminal of 80 columns."""
    if report["protocol"] != "utility":
        return _paper_table(report)
    rows = [["", "n (pos.)", *(COLUMNS[name] for name in TABLE_COLUMNS), "Sens", "Spec"]]
    notes = []
    for protocol, row in report["protocols"].items():
        metrics = row["metrics"]
        cells = [_cell(metrics[name], interval=True) for name in TABLE_COLUMNS]
        cells += [_cell(metrics[name], interval=False) for name in figures.ROC_POINT]
        rows.append([protocol, f"{row['num_test']} ({row['num_test_positive']})", *cells])
        if row["reason"]:
            notes.append(f"{protocol}: {row['reason']}")
    heading = (
        f"Label {report['label']}, n test records: value (95 % interval), threshold from fold 9"
    )
    return "\n".join([heading, *_aligned(rows), *notes])


def _paper_table(report: dict[str, Any]) -> str:
    """Return one of the paper's tables as text, the paper's own figures in square brackets."""
    found = report["table"]
    rows = [["label", "row", "n", *(COLUMNS[name] for name in found["columns"])]]
    notes = []
    for label, of_label in found["rows"].items():
        for name, row in of_label.items():
            theirs = found["paper"].get(label, {}).get(name, {})
            cells = []
            for column in found["columns"]:
                cell = _cell(row["metrics"][column], interval=True)
                cells.append(f"{cell} [{theirs[column]:.2f}]" if column in theirs else cell)
            rows.append([label, name, str(row["num_test"]), *cells])
            reason = row["metrics"]["f1"]["reason"]
            notes.extend([f"{label}, {name}: {reason}"] if reason else [])
            if row.get("excluded"):
                notes.append(f"{name}: {len(row['labels'])} labels, {left_out(row)}")
    heading = (
        f"{found['title']}: mean of {len(report['seeds'])} seed(s) (95 % interval) "
        f"[paper, {found['source']}]"
    )
    return "\n".join([heading, *_aligned(rows), *notes, *found["notes"]])


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, a rule under its first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]


def _pictures(
    report: dict[str, Any],
    real: Store,
    synthetic: Store,
    sides: Mapping[str, Side],
    folder: Path,
) -> dict[str, bytes]:
    seed, label = report["seed"], report["label"]
    tables = {name: physiology.drawn_table(side, report["seed"]) for name, side in sides.items()}
    signals = {
        "real": figures.sample_signals(real, seed),
        "synthetic": figures.sample_signals(synthetic, seed),
    }
    drawn = {
        "roc": figures.roc(report["protocols"], label),
        "scores": figures.score_histograms(report["protocols"], label),
        "spectra": figures.spectra(signals, real.rate_hz),
        "amplitudes": figures.amplitudes(signals),
        "calibration": figures.calibration(report["protocols"], label),
        "physiology": figures.distributions(
            {name: {q: table.column(q) for q in PICTURED} for name, table in tables.items()},
            {q: physiology.TITLES[q] for q in PICTURED},
        ),
        "map": figures.feature_map({n: side.features for n, side in sides.items()}, seed),
    }
    pictures = {}
    for name, figure in drawn.items():
        pictures[name] = figures.save(figure, folder / f"{name}.png")
    figures.pairs(real, synthetic, label, seed, folder / "records.png")
    pictures["records"] = (folder / "records.png").read_bytes()
    return pictures


def _cell(metric: dict[str, Any], *, interval: bool) -> str:
    if metric["value"] is None:
        return "n/a"
    value = f"{metric['value']:.2f}"
    return f"{value} ({metric['low']:.2f}-{metric['high']:.2f})" if interval else value
