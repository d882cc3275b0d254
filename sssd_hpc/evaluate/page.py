"""The pages of an evaluation: one HTML file each, style and pictures inside, nothing fetched.

Whatever comes from a store or a label is escaped.
"""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from sssd_hpc.evaluate.metrics import NUM_BOOTSTRAPS
from sssd_hpc.evaluate.summary import beyond_floor, summary

COLUMNS = {
    "roc_auc": "ROC-AUC",
    "g_mean": "G-mean",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
}

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
    "calibration": (
        "Calibration",
        "On the diagonal a score is a chance: of the records scored 0.7, 70 % carry the label.",
    ),
    "physiology": (
        "Rates, intervals, axis",
        "Distributions over records, of those in which the quantity could be measured.",
    ),
    "map": (
        "Map of the records",
        "t-SNE of the classifier's features: records that it sees alike lie together; distances "
        "between groups mean nothing. Regions of one colour alone are what a set lacks or invents.",
    ),
}
TABLE_CAPTIONS = {
    "convergence": (
        "Metrics by samples seen",
        "Filled: this run, with 95 % intervals; band: TRTR, what the classifier reaches with real "
        "records. Hollow and dotted: the paper's Table IV, of other records, classifiers and a "
        "network for each label. TRTS above the band means over-typical records, not better ones.",
    ),
}


def report_page(report: dict[str, Any], pictures: dict[str, bytes]) -> str:
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
        *(_figure(name, pictures[name]) for name in ("roc", "scores", "calibration")),
        "<h2>Fidelity: beside real records</h2>",
        _fidelity_table(report["fidelity"]),
        _figure("map", pictures["map"]),
        "<h2>What a cardiologist reads</h2>",
        _quantity_table(report["physiology"]),
        _failures(report["physiology"]),
        _figure("physiology", pictures["physiology"]),
        "<h2>What labels do</h2>",
        _effect_table(report["label_effects"]),
        "<h2>Privacy</h2>",
        _privacy_table(report["privacy"]),
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


def table_page(report: dict[str, Any], pictures: dict[str, bytes]) -> str:
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
            note = f"<br><i>{escape(left_out(row))}</i>" if row.get("excluded") else ""
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
        *(_figure(name, png) for name, png in pictures.items()),
        f"<div class=wide><table><thead><tr><th>Label</th><th>Row</th><th>Trained on n</th>"
        f"<th>Tested on n</th>{header}</tr></thead><tbody>{''.join(body)}</tbody></table></div>",
        f"<p class=note>Means over {len(report['seeds'])} seed(s) of the classifiers; small print: "
        f"95 % interval over {NUM_BOOTSTRAPS} bootstrap draws of test records"
        f"{' and seeds' if len(report['seeds']) > 1 else ''}, a label that a draw loses left out. "
        "Thresholds are set on fold 9 of the side that trained. The paper's figures are those of "
        f"SSSD-ECG-nle, arXiv 2407.11108, {escape(found['source'])}: other records, classifiers "
        "and seeds.</p>",
        *(f"<p class=note>{escape(note)}</p>" for note in found["notes"]),
        "<h2>Checks</h2>",
        _check_list(report),
        "<h2>How it was made</h2>",
        _making(report),
    ]
    return _PAGE.format(title=escape(found["title"]), body="\n".join(filter(None, sections)))


def _value_cell(metric: dict[str, Any], theirs: float | None = None) -> str:
    """Return a cell of the page: a value over its interval, or why there is none; the paper's."""
    beside = "" if theirs is None else f"<small>paper {theirs:.3f}</small>"
    if metric["value"] is None:
        return f'<td class=none title="{escape(metric["reason"])}">n/a{beside}</td>'
    return (
        f"<td><b>{metric['value']:.3f}</b>"
        f"<small>{metric['low']:.2f} to {metric['high']:.2f}</small>{beside}</td>"
    )


def left_out(row: dict[str, Any]) -> str:
    """Say which labels a multilabel row leaves out."""
    names = list(row["excluded"])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} with too few records left out: {', '.join(names[:8])}{more}"


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
        theirs = report["paper"].get(protocol, {})
        cells = [_value_cell(row["metrics"][name], theirs.get(name)) for name in COLUMNS]
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
    many = len(report["seeds"])
    seeds = (
        f" and of {many} classifiers, whose mean it is"
        if many > 1
        else "; it does not cover another training run, as --seeds 3 would"
    )
    paper = (
        "The paper's figures are those of SSSD-ECG-nle, arXiv 2407.11108, Table I: other records, "
        "classifiers and seeds."
        if report["paper"]
        else f"The paper has no figures of {escape(report['label'])} alone."
    )
    return (
        f"<p class=note>{warning}Small print under a value is its 95 % interval over "
        f"{NUM_BOOTSTRAPS} bootstrap draws of the test records that keep both classes{seeds}. "
        f"All but ROC-AUC depend on the threshold, chosen on fold 9 of the training side for the "
        f"greatest G-mean = sqrt(sensitivity x specificity). {paper}</p>"
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


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None else f"<small>{_number(low)} to {_number(high)}</small>"


def _fidelity_table(fidelity: dict[str, Any]) -> str:
    """Return every measure beside its floor."""
    body = []
    interval = ""
    for group, rows in fidelity.items():
        body.append(f"<tr><th colspan=6 class=group>{escape(group)}</th></tr>")
        for row in rows.values():
            interval = interval or row["interval"]
            title = f"<th>{escape(row['title'][:1].upper() + row['title'][1:])}</th>"
            if row["value"] is None:
                reason = escape(row["reason"] or "")
                body.append(f"<tr>{title}<td colspan=5 class=none>n/a: {reason}</td></tr>")
                continue
            worse = beyond_floor(row)
            verdict = "<b class=bad>differs</b>" if worse else "<b class=ok>as real</b>"
            body.append(
                f"<tr>{title}<td class=unit>{escape(row['unit'])}</td>"
                f"<td><b>{_number(row['value'])}</b>{_span(row['low'], row['high'])}</td>"
                f"<td>{_number(row['floor'])}{_span(row['floor_low'], row['floor_high'])}</td>"
                f"<td>{row['better']}</td><td>{verdict}</td></tr>"
            )
    return (
        "<p class=note>Every measure compares two sets with one half of the held-out real records "
        "(folds 9 and 10): synthetic records, and, as the floor, as many of the other half. No set "
        "can be expected to do better than the floor. Features are those of the first classifier "
        "trained on real records, so they see what its label needs. Small print: "
        f"{escape(interval)}. <i>Differs</i>: the whole interval is worse than the floor's.</p>"
        "<div class=wide><table><thead><tr><th>Measure</th><th>Unit</th><th>Synthetic</th>"
        "<th>Real (floor)</th><th>Better</th><th></th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _quantity_table(found: dict[str, Any]) -> str:
    """Return medians and quartiles of both sides' rates, intervals and amplitudes."""
    body = []
    for name, real in found["real"]["quantities"].items():
        cells = []
        for one in (real, found["synthetic"]["quantities"][name]):
            low, median, high = one["quartiles"]
            if one["unit"] == "share":
                cells.append(f"<td><b>{_number(one['mean'])}</b>")
            else:
                cells.append(f"<td><b>{_number(median)}</b>{_span(low, high)}")
            cells.append(f"<small>{one['records']} records</small></td>")
        title = escape(real["title"][:1].upper() + real["title"][1:])
        body.append(
            f"<tr><th>{title}</th><td class=unit>{escape(real['unit'])}</td>{''.join(cells)}</tr>"
        )
    return (
        "<p class=note>Medians, with quartiles as small print; shares are means. Only records in "
        "which a quantity could be measured count.</p>"
        "<div class=wide><table><thead><tr><th>Quantity</th><th>Unit</th><th>Real</th>"
        f"<th>Synthetic</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _failures(found: dict[str, Any]) -> str:
    """Say how many records could not be delineated, and why."""
    parts = []
    for side, counts in found.items():
        reasons = "; ".join(f"{reason}: {n}" for reason, n in counts["reasons"].items())
        text = f"{side}: {counts['failed']} of {counts['records']}"
        parts.append(text + (f" ({reasons})" if reasons else ""))
    return f"<p class=note>Records that could not be measured, {escape(', '.join(parts))}.</p>"


def _effect_table(effects: list[dict[str, Any]]) -> str:
    """Return what labels do to physiology, where real records show it."""
    rows = [e for e in effects if (e["real"]["low"] or 0) > 0 or (e["real"]["high"] or 0) < 0]
    if not rows:
        return (
            "<p class=note>No label has an effect on rates, intervals or axis that can be told "
            "from none in these real records.</p>"
        )
    body = "".join(
        f"<tr><th>{escape(e['label'])}</th><td class=meaning>{escape(e['title'])}</td>"
        f"<td class=unit>{escape(e['unit'])}</td>"
        + "".join(
            f"<td><b>{_number(e[side]['value'])}</b>{_span(e[side]['low'], e[side]['high'])}"
            f"<small>{e[f'num_{side}']} records</small></td>"
            for side in ("real", "synthetic")
        )
        + "</tr>"
        for e in rows
    )
    return (
        "<p class=note>Median of the records with the label less that of those without it (shares: "
        "means), with 95 % bootstrap intervals; only where real records show a difference.</p>"
        "<div class=wide><table><thead><tr><th>Label</th><th>Quantity</th><th>Unit</th>"
        f"<th>Real</th><th>Synthetic</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _privacy_table(privacy: dict[str, Any]) -> str:
    """Return the measures of privacy and the pairs that are most alike."""
    body = []
    for row in privacy["measures"].values():
        title = f"<th>{escape(row['title'])}</th>"
        if row["value"] is None:
            body.append(
                f"<tr>{title}<td colspan=3 class=none>n/a: {escape(row['reason'])}</td></tr>"
            )
            continue
        verdict = (
            "<b class=bad>gives away</b>" if row["exposed"] else "<b class=ok>nothing found</b>"
        )
        body.append(
            f"<tr>{title}<td><b>{_number(row['value'])}</b>{_span(row['low'], row['high'])}</td>"
            f"<td>{_number(row['ideal'])}</td><td>{verdict}</td></tr>"
        )
    pairs = "".join(
        f"<tr><th>{pair['synthetic']}</th><td>{pair['training']}</td>"
        f"<td>{pair['similarity']:.3f}</td><td>{pair['shift_s']:+.2f} s</td>"
        f"<td>{pair['gain']:.2f}</td>"
        f"<td>{'<b class=bad>copy</b>' if pair['copy'] else ''}</td></tr>"
        for pair in privacy["pairs"][:8]
    )
    recall = (
        f" The search finds {privacy['recall']:.0%} of {privacy['num_planted']} copies that were "
        "shifted, scaled and made noisy for this test."
        if privacy["recall"] is not None
        else ""
    )
    return (
        "<p class=note>Can records that trained the generator be told from held-out ones by what "
        "it made? <i>Ideal</i>: the value if nothing is given away; <i>gives away</i>: the "
        "whole 95 % interval lies above it; of honest sets one in six has such a measure among "
        f"seven.{recall}</p>"
        "<div class=wide><table><thead><tr><th>Measure</th><th>Value</th><th>Ideal</th><th></th>"
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<h3>Most alike, whatever shift and gain</h3>"
        "<div class=wide><table><thead><tr><th>Synthetic ecg_id</th><th>Training ecg_id</th>"
        "<th>Correlation</th><th>Shift</th><th>Gain</th><th></th></tr></thead>"
        f"<tbody>{pairs}</tbody></table></div>"
    )


def _figure(name: str, png: bytes) -> str:
    title, caption = (CAPTIONS | TABLE_CAPTIONS)[name]
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
.bad b, b.bad {{ color: #b03030; }}
b.ok {{ color: #2f7d32; }}
.group {{ padding-top: 1rem; color: #1f4e79; }}
.unit {{ color: #6a7488; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem; }}
</style></head><body>
{body}
</body></html>
"""
