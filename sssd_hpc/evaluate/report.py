"""The report of an evaluation: report.json, figures, and one HTML file that opens offline.

It formats what `protocols` computed and computes no score itself.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate import figures
from sssd_hpc.evaluate.metrics import NUM_BOOTSTRAPS
from sssd_hpc.files import atomic_write_bytes, atomic_write_text, write_json

FORMAT = 2

COLUMNS = {
    "roc_auc": "ROC-AUC",
    "g_mean": "G-mean",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
}

TABLE_COLUMNS = ("roc_auc", "g_mean", "f1")
"""What the terminal's table shows with intervals."""

MEANING = {
    "TRTR": "Train on real, test on real: what this classifier can reach; the others aim for it.",
    "TSTR": "Train on synthetic, test on real: can the synthetic set stand in for the real one?",
    "TRTS": (
        "Train on real, test on synthetic: do synthetic records look like their label? "
        "Above TRTR means over-typical records, not better ones."
    ),
    "TSTS": "Train and test on synthetic: do synthetic records agree with each other?",
}

CAPTIONS = {
    "records": (
        "Real and synthetic records",
        "Chosen by the seed, not by hand: records with the label first, then without it.",
    ),
    "roc": (
        "ROC curves",
        "Up and to the left is better; the dashed line is guessing. A curve drawn from few records "
        "moves in large steps.",
    ),
    "scores": (
        "Scores of the test records",
        "Well apart is good. Dashed: the threshold, set on fold 9 of the training side.",
    ),
    "spectra": (
        "Power spectra",
        "Line: median over records; band: 10 to 90 %. Where the synthetic line leaves the real "
        "band, rhythm, noise or filtering differ.",
    ),
    "amplitudes": (
        "Amplitudes",
        "Share of samples at each amplitude, logarithmic. Missing tails mean that tall QRS "
        "complexes are missing.",
    ),
}


def write(report: dict[str, Any], real: Store, synthetic: Store, out: Path) -> None:
    """Write report.json, figures/*.png and report.html into `out`; each is whole or absent."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    pictures = _pictures(report, real, synthetic, out / "figures")
    write_json(out / "report.json", report)
    atomic_write_text(out / "report.html", html(report, pictures))


def write_table(report: dict[str, Any], out: Path) -> None:
    """Write report.json and report.html of one of the paper's tables into `out`."""
    write_json(out / "report.json", report)
    atomic_write_text(out / "report.html", table_html(report))


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
                notes.append(f"{name}: {len(row['labels'])} labels, {_left_out(row)}")
    heading = (
        f"{found['title']}: mean of {len(report['seeds'])} seed(s) (95 % interval) "
        f"[paper, {found['source']}]"
    )
    return "\n".join([heading, *_aligned(rows), *notes])


def _left_out(row: dict[str, Any]) -> str:
    """Say which labels a multilabel row leaves out."""
    names = list(row["excluded"])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} with too few records left out: {', '.join(names[:8])}{more}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, a rule under its first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]


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
    return lines


def html(report: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Return the whole page: style and pictures inside, nothing fetched."""
    sections = [
        _head(report),
        "<ul class=summary>"
        + "".join(f"<li>{escape(line)}</li>" for line in summary(report))
        + "</ul>",
        _leakage(report),
        "<h2>Scores</h2>",
        _score_table(report),
        _small_sample(report),
        *(_figure(name, pictures[name]) for name in ("roc", "scores")),
        "<h2>Data</h2>",
        _data_table(report),
        *(_figure(name, pictures[name]) for name in ("records", "spectra", "amplitudes")),
        "<h2>Checks</h2>",
        _check_list(report),
        "<h2>How it was made</h2>",
        _making(report),
    ]
    return _PAGE.format(
        title=escape(f"Synthetic ECGs: {report['label']}"), body="\n".join(filter(None, sections))
    )


def table_html(report: dict[str, Any]) -> str:
    """Return the page of one of the paper's tables."""
    found = report["table"]
    header = "".join(f"<th>{escape(COLUMNS[name])}</th><th>paper</th>" for name in found["columns"])
    body = []
    for label, of_label in found["rows"].items():
        for name, row in of_label.items():
            theirs = found["paper"].get(label, {}).get(name, {})
            cells = "".join(
                _value_cell(row["metrics"][column])
                + (f"<td class=none>{theirs[column]:.3f}</td>" if column in theirs else "<td></td>")
                for column in found["columns"]
            )
            note = f"<br><i>{escape(_left_out(row))}</i>" if row.get("excluded") else ""
            body.append(
                f"<tr><th>{escape(label)}</th><td class=meaning>{escape(name)}{note}</td>"
                f"<td>{row['num_training']}</td><td>{row['num_test']}</td>{cells}</tr>"
            )
    sides = ", ".join(
        f"{escape(name)}: {side['num_records']} records of {escape(side['name'])}"
        for name, side in report["sides"].items()
    )
    sections = [
        f"<h1>{escape(found['title'])}</h1><p class=lead>{sides}.</p>",
        _leakage(report),
        f"<div class=wide><table><thead><tr><th>Label</th><th>Row</th><th>Trained on n</th>"
        f"<th>Tested on n</th>{header}</tr></thead><tbody>{''.join(body)}</tbody></table></div>",
        f"<p class=note>Means over {len(report['seeds'])} seed(s) of the classifiers; small print: "
        f"95 % interval over {NUM_BOOTSTRAPS} bootstrap draws of test records and seeds. "
        "Thresholds are set on fold 9 of the side that trained. The paper's figures are those of "
        f"SSSD-ECG-nle, arXiv 2407.11108, {escape(found['source'])}: other records, classifiers "
        "and seeds.</p>",
        "<h2>Checks</h2>",
        _check_list(report),
        "<h2>How it was made</h2>",
        _making(report),
    ]
    return _PAGE.format(title=escape(found["title"]), body="\n".join(filter(None, sections)))


def _value_cell(metric: dict[str, Any]) -> str:
    """Return a cell of the page: a value over its interval, or why there is none."""
    if metric["value"] is None:
        return f'<td class=none title="{escape(metric["reason"])}">n/a</td>'
    return (
        f"<td><b>{metric['value']:.3f}</b>"
        f"<small>{metric['low']:.2f} to {metric['high']:.2f}</small></td>"
    )


def _pictures(
    report: dict[str, Any], real: Store, synthetic: Store, folder: Path
) -> dict[str, bytes]:
    seed, label = report["seed"], report["label"]
    sides = {
        "real": figures.sample_signals(real, seed),
        "synthetic": figures.sample_signals(synthetic, seed),
    }
    drawn = {
        "roc": figures.roc(report["protocols"], label),
        "scores": figures.score_histograms(report["protocols"], label),
        "spectra": figures.spectra(sides, real.rate_hz),
        "amplitudes": figures.amplitudes(sides),
    }
    pictures = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        pictures[name] = buffer.getvalue()
        atomic_write_bytes(folder / f"{name}.png", pictures[name], durable=False)
    figures.pairs(real, synthetic, label, seed, folder / "records.png")
    pictures["records"] = (folder / "records.png").read_bytes()
    return pictures


def _cell(metric: dict[str, Any], *, interval: bool) -> str:
    if metric["value"] is None:
        return "n/a"
    value = f"{metric['value']:.2f}"
    return f"{value} ({metric['low']:.2f}-{metric['high']:.2f})" if interval else value


def _head(report: dict[str, Any]) -> str:
    sides = report["sides"]
    return (
        f"<h1>How good are the synthetic ECGs?</h1>"
        f"<p class=lead>{sides['synthetic']['num_records']} synthetic records "
        f"(<b>{escape(sides['synthetic']['name'])}</b>) against "
        f"{sides['real']['num_records']} real ones (<b>{escape(sides['real']['name'])}</b>), "
        f"by classifiers of the label <b>{escape(report['label'])}</b> "
        f"({escape(report['label_choice'])}).</p>"
    )


def _leakage(report: dict[str, Any]) -> str:
    failed = [check for check in report["checks"] if not check["ok"]]
    if not failed:
        return ""
    details = "; ".join(escape(check["detail"]) for check in failed)
    return f"<p class=warning><b>Leakage was allowed; scores are too good.</b> {details}.</p>"


def _score_table(report: dict[str, Any]) -> str:
    header = "".join(f"<th>{escape(title)}</th>" for title in COLUMNS.values())
    body = []
    for protocol, row in report["protocols"].items():
        cells = [_value_cell(row["metrics"][name]) for name in COLUMNS]
        note = f"<br><i>{escape(row['reason'])}</i>" if row["reason"] else ""
        body.append(
            f"<tr><th>{protocol}</th><td class=meaning>{escape(MEANING[protocol])}{note}</td>"
            f"<td>{row['num_training']}</td>"
            f"<td>{row['num_test']}<small>{row['num_test_positive']} positive</small></td>"
            f"{''.join(cells)}</tr>"
        )
    return (
        f"<div class=wide><table><thead><tr><th></th><th>Question</th><th>Trained on n</th>"
        f"<th>Tested on n</th>{header}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _small_sample(report: dict[str, Any]) -> str:
    tests = [row["num_test"] for row in report["protocols"].values()]
    warning = (
        f"<b>This is a small sample.</b> With {min(tests)} test records one record moves "
        f"sensitivity or specificity by whole percents; read the intervals, not the third decimal. "
        if min(tests) < 1000
        else ""
    )
    return (
        f"<p class=note>{warning}Small print under a value is its 95 % interval over "
        f"{NUM_BOOTSTRAPS} bootstrap draws of the test records that keep both classes. It does not "
        f"cover another training run. All but ROC-AUC depend on the threshold, chosen on fold 9 of "
        f"the training side for the greatest G-mean = sqrt(sensitivity x specificity).</p>"
    )


def _data_table(report: dict[str, Any]) -> str:
    rows = []
    for side, info in report["sides"].items():
        cells = "".join(
            f"<td>{split['records']}<small>{split['positive']} positive</small></td>"
            for split in info["splits"].values()
        )
        rows.append(
            f"<tr><th>{side}</th><td>{escape(info['name'])}</td><td>{info['num_records']}</td>"
            f"{cells}<td>{info['length'] / info['rate_hz']:g} s at {info['rate_hz']} Hz</td></tr>"
        )
    return (
        "<div class=wide><table><thead><tr><th></th><th>Store</th><th>Records</th>"
        "<th>Training (folds 1-8)</th><th>Validation (fold 9)</th><th>Test (fold 10)</th>"
        f"<th>Record</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(name: str, png: bytes) -> str:
    title, caption = CAPTIONS[name]
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{escape(title)}</h2><figure>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _check_list(report: dict[str, Any]) -> str:
    items = "".join(
        f"<li class={'ok' if check['ok'] else 'bad'}><b>{'holds' if check['ok'] else 'FAILS'}</b> "
        f"{escape(check['name'])}: {escape(check['detail'])}</li>"
        for check in report["checks"]
    )
    return f"<ul class=checks>{items}</ul>"


def _making(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    facts = {
        "Classifier": f"1-D XResNet-50, {recipe['epochs']} epochs, batch {recipe['batch_size']}, "
        f"AdamW {recipe['learning_rate']:g} one-cycle, weight decay {recipe['weight_decay']:g}, "
        f"crops of {recipe['crop_s']:g} s, mean over windows at prediction",
        "Seeds": ", ".join(map(str, report["seeds"])),
        "Versions": ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "Seconds": str(report["seconds"]),
        **{
            f"{side} manifest": f"SHA-256 {info['manifest_sha256']}"
            for side, info in report["sides"].items()
        },
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td class=meaning>{escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table class=facts>{rows}</table>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2433; margin: 0 auto; max-width: 78rem;
  padding: 1.5rem; background: #fff; }}
h1 {{ font-size: 1.8rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d5dae3; }}
.lead {{ margin-top: 0; color: #4a5468; }}
.summary {{ background: #f2f5fa; border-left: 4px solid #1f4e79; padding: .8rem 1rem .8rem 2rem; }}
.warning {{ background: #fdecea; border-left: 4px solid #b03030; padding: .8rem 1rem; }}
.note {{ color: #4a5468; font-size: .9rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .45rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e3e7ee; }}
thead th {{ border-bottom: 2px solid #9aa5b8; font-size: .85rem; vertical-align: bottom; }}
th:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
.meaning {{ font-size: .88rem; color: #4a5468; min-width: 13rem; overflow-wrap: anywhere; }}
.facts th {{ width: 10rem; }}
small {{ display: block; color: #6a7488; white-space: nowrap; }}
.none {{ color: #9aa5b8; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #4a5468; font-size: .9rem; max-width: 48rem; }}
.checks {{ list-style: none; padding: 0; }}
.ok b {{ color: #2f7d32; }}
.bad b {{ color: #b03030; }}
</style></head><body>
{body}
</body></html>
"""
