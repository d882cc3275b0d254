"""The result of a review: review.json, and one HTML file that opens offline.

It formats what `score` computed and computes no score itself. Whatever a reader or a label brought
in is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sssd_hpc.files import atomic_write_text, write_json
from sssd_hpc.review.agreement import Proportion
from sssd_hpc.review.key import KINDS, OTHER
from sssd_hpc.review.make import csp_hash, template
from sssd_hpc.review.score import ALL

PAGE = "review.html"
Json = dict[str, Any]

# SSSD-ECG-nle (arXiv 2407.11108), Tables V and VI.
PAPER_ACCURACY = {
    "real": {"AFIB": 0.95, "CRBBB": 0.95, "PVC": 1.0, "IMI": 0.8, OTHER: 1.0},
    "synthetic": {"AFIB": 0.95, "CRBBB": 1.0, "PVC": 0.85, "IMI": 0.7, OTHER: 1.0},
}
PAPER_CONFUSION = {
    "true_real": 99, "false_synthetic": 1, "false_real": 1, "true_synthetic": 279,
}  # fmt: skip
CONFUSION = {
    "true_real": ("True real", "real, called real"),
    "false_synthetic": ("False synthetic", "real, called generated"),
    "false_real": ("False real", "generated, called real"),
    "true_synthetic": ("True synthetic", "generated, called generated"),
}
CONFIDENCE = {"1": "Guessing", "2": "Fairly sure", "3": "Certain"}
KIND_TITLES = {"real": "Real", "synthetic": "Synthetic"}


def write(review: Json, out: Path) -> None:
    """Write review.json and review.html into `out`; each is whole or absent."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "review.json", review)
    atomic_write_text(out / PAGE, html(review))


def text(review: Json) -> str:
    """Return Tables V and VI for a terminal."""
    lines = list(summary(review))
    if review["ask"] != "generated":
        classes = review["classes"]
        lines += ["", "Accuracy of the reports   " + "".join(f"{c[:12]:>13}" for c in classes)]
        for kind in KINDS:
            cells = [review["classification"][ALL][label][kind] for label in classes]
            shown = "".join(f"{_ratio(cell):>13}" for cell in cells)
            lines.append(f"  {KIND_TITLES[kind]:<24}{shown}")
    if review["ask"] != "report":
        table = review["generated"][ALL]
        lines += ["", *(f"{title:<16}{table[name]:>6}" for name, (title, _) in CONFUSION.items())]
    return "\n".join(lines)


def summary(review: Json) -> list[str]:
    """Return what the numbers say, in plain sentences."""
    raters = review["raters"]
    records = len(review["records"])
    lines = [f"{len(raters)} reader(s) of {records} recordings, half of them generated."]
    for rater in raters:
        done = min(
            rater[name]
            for name, without in (("num_reports", "generated"), ("num_generated", "report"))
            if review["ask"] != without
        )
        if done < records:
            lines.append(f"{rater['name']} answered {done} of {records}; scored is what is there.")
    if review["ask"] != "report":
        lines.append(_verdict(review["generated"][ALL]))
    if review["ask"] != "generated":
        totals = {kind: _total(review, kind) for kind in KINDS}
        lines.append(
            f"Reports named the recording's class in {_share(totals['real'])} of real and "
            f"{_share(totals['synthetic'])} of generated recordings."
        )
        lines += _telling_signs(review["signs"])
    return lines


def _verdict(table: Json) -> str:
    accuracy = table["accuracy"]
    if accuracy["value"] is None:
        return "Nobody said which recordings are generated."
    sentence = f"Readers told generated from real recordings rightly in {_share(accuracy)}"
    if accuracy["low"] <= 0.5 <= accuracy["high"]:
        return f"{sentence}, which cannot be told from guessing."
    better = accuracy["value"] > 0.5
    return f"{sentence}: {'better' if better else 'worse'} than guessing, which gives half."


def _total(review: Json, kind: str) -> Json:
    cells = [row[kind] for row in review["classification"][ALL].values()]
    return Proportion(sum(c["count"] for c in cells), sum(c["n"] for c in cells)).to_json()


def _telling_signs(signs: Json) -> list[str]:
    """Return a sentence for each sign whose two intervals do not meet."""
    return [
        f'Reports mention "{name}" in {_share(sign["synthetic"])} of generated and '
        f"{_share(sign['real'])} of real recordings."
        for name, sign in signs.items()
        if sign["real"]["n"]
        and sign["synthetic"]["n"]
        and (
            sign["real"]["high"] < sign["synthetic"]["low"]
            or sign["synthetic"]["high"] < sign["real"]["low"]
        )
    ]


def _ratio(cell: Json) -> str:
    return "n/a" if cell["value"] is None else f"{cell['value']:.2f} ({cell['n']})"


def _share(cell: Json) -> str:
    if cell["value"] is None:
        return "none"
    return (
        (
            f"{cell['count']} of {cell['n']} ({cell['value']:.0%}, 95 % interval "
            f"{cell['low']:.0%} to {cell['high']:.0%})"
        )
        .replace("%,", " %,")
        .replace("% to", " % to")
        .replace("%)", " %)")
    )


def html(review: Json) -> str:
    """Return the whole page: style inside, no script, nothing fetched."""
    reports, question = review["ask"] != "generated", review["ask"] != "report"
    items = "".join(f"<li>{escape(line)}</li>" for line in summary(review))
    sections = [
        "<h1>What physicians made of the recordings</h1>",
        f"<ul class=summary>{items}</ul>",
        *([_classification(review)] if reports else []),
        *([_generated(review), _by_confidence(review)] if question else []),
        *([_signs(review["signs"])] if reports else []),
        _agreement(review["agreement"]),
        _pipeline(review),
        _records(review),
    ]
    style = template("result.css")
    policy = f"default-src 'none'; style-src '{csp_hash(style)}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ECG review</title><style>{style}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


def _who(review: Json) -> list[tuple[str, str]]:
    """Return (group, title): all readers first, then each, where there are several."""
    raters = [(str(k), rater["name"]) for k, rater in enumerate(review["raters"])]
    return raters if len(raters) == 1 else [(ALL, "All readers"), *raters]


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str] | None]]) -> str:
    """Return a table of cells that are HTML already; a row's name is text, without cells a title.

    The name is escaped here.
    """
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr class=group><th colspan={len(header)}>{escape(name)}</th></tr>"
        if cells is None
        else f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Json) -> str:
    if cell["value"] is None:
        return f'<span class=none title="{escape(cell["reason"] or "")}">n/a</span>'
    digits = 3 if cell["n"] >= 100 else 2
    return (
        f"<b>{cell['value']:.{digits}f}</b><small>{cell['count']} of {cell['n']}<br>"
        f"{cell['low']:.{digits}f} to {cell['high']:.{digits}f}</small>"
    )


def _classification(review: Json) -> str:
    classes = review["classes"]
    paper: list[tuple[str, Sequence[str] | None]] = [("Paper, Table V", None)]
    for kind, title in KIND_TITLES.items():
        known = [PAPER_ACCURACY[kind].get(label) for label in classes]
        paper.append((title, ["-" if value is None else f"{value:.2f}" for value in known]))
    groups = []
    for who, name in _who(review):
        table = review["classification"][who]
        group: list[tuple[str, Sequence[str] | None]] = [(name, None)]
        for part, title in {**KIND_TITLES, "elsewhere": "Said of other classes"}.items():
            group.append((title, [_cell(table[label][part]) for label in classes]))
        groups.append(group)
    rows = [*groups[0], *paper, *(row for group in groups[1:] for row in group)]
    return (
        "<h2>Table V: is the class in the report?</h2>"
        f"{_table(['', *map(escape, classes)], rows)}"
        "<p class=note>Share of reports that assert the class of their recording; of class "
        f"{OTHER} ({escape(review['other'])}), that assert none of the others. <i>Said of other "
        "classes</i> is the share of reports on other recordings that say the same: a reader who "
        "always names everything has 1.00 in both. Keywords and denials are marked in each "
        "report below, to be checked. Small print: counts and 95 % Wilson interval; answers of "
        "several readers on one recording count as independent.</p>"
    )


def _generated(review: Json) -> str:
    extra = ("accuracy", "real_recognised", "synthetic_recognised")
    header = [
        "",
        *(f"{title}<small>{meaning}</small>" for title, meaning in CONFUSION.values()),
        "Accuracy",
        "Real recognised",
        "Generated recognised",
        "ROC-AUC<small>by confidence</small>",
    ]
    rows: list[tuple[str, Sequence[str]]] = []
    for who, name in _who(review):
        table = review["generated"][who]
        auc = "n/a" if table["roc_auc"] is None else f"{table['roc_auc']:.2f}"
        cells = [*(str(table[c]) for c in CONFUSION), *(_cell(table[c]) for c in extra), auc]
        rows.append((name, cells))
    p = PAPER_CONFUSION
    shares = [
        Proportion(p["true_real"] + p["true_synthetic"], sum(p.values())),
        Proportion(p["true_real"], p["true_real"] + p["false_synthetic"]),
        Proportion(p["true_synthetic"], p["true_synthetic"] + p["false_real"]),
    ]
    cells = [*(str(p[c]) for c in CONFUSION), *(_cell(share.to_json()) for share in shares), "-"]
    rows.insert(1, ("Paper, Table VI", cells))
    return (
        "<h2>Table VI: is this a generated recording?</h2>"
        f"{_table(header, rows)}"
        "<p class=note>A generator that nobody can tell from patients has an accuracy and an "
        "ROC-AUC of 0.50.</p>"
    )


def _by_confidence(review: Json) -> str:
    rows = [
        (name, [_cell(review["generated"][who]["by_confidence"][k]) for k in CONFIDENCE])
        for who, name in _who(review)
    ]
    return (
        "<h2>Were they right when they were sure?</h2>"
        f"{_table(['Accuracy of answers given as', *CONFIDENCE.values()], rows)}"
    )


def _signs(signs: Json) -> str:
    rows = [(name, [_cell(sign[kind]) for kind in KINDS]) for name, sign in signs.items()]
    return (
        "<h2>What reports say unasked</h2>"
        f"{_table(['Mentioned in reports of', 'Real', 'Generated'], rows)}"
        "<p class=note>The paper's physicians wrote of reversed chest electrodes and low voltage "
        "in almost every generated recording, and called 10 of 100 artefacts.</p>"
    )


def _agreement(agreement: Json) -> str:
    rows = []
    for question, result in agreement.items():
        name = "Generated or not" if question == "generated" else f"{question} named or not"
        for pair in result["pairs"]:
            who = f"{pair['first']} and {pair['second']}, Cohen"
            rows.append((name, [escape(who), *_kappa_cells(pair)]))
        if result["fleiss"]:
            rows.append((name, ["all, Fleiss", *_kappa_cells(result["fleiss"])]))
    if not rows:
        return ""
    return (
        "<h2>Do readers agree?</h2>"
        f"{_table(['Question', 'Readers', 'Kappa', 'Recordings'], rows)}"
        "<p class=note>0 is what chance gives, 1 full agreement.</p>"
    )


def _kappa_cells(kappa: Json) -> list[str]:
    value = "n/a" if kappa["kappa"] is None else f"<b>{kappa['kappa']:.2f}</b>"
    reason = f"<small>{escape(kappa['reason'])}</small>" if kappa["reason"] else ""
    return [value + reason, str(kappa["n"])]


def _pipeline(review: Json) -> str:
    """Return how the review was made, as a chain of boxes after the paper's Figure 3."""
    source = review["source"]
    stores = source["stores"]
    low, high = source["pass_hz"]
    seconds = source["length"] / source["rate_hz"]
    boxes = [
        *(
            f"<b>{KIND_TITLES[kind]}</b>{escape(stores[kind]['name'])}"
            f"<small>SHA-256 {escape(stores[kind]['manifest_sha256'][:12])}</small>"
            for kind in KINDS
        ),
        f"<b>Drawn</b>{source['records_per_class']} of each kind in each of "
        f"{len(review['classes'])} classes, one a patient, seed {source['seed']}",
        f"<b>Prepared alike</b>{seconds:g} s, {low:g} to {high:g} Hz, median 0, "
        f"steps of {source['uv_per_unit']} uV",
        f"<b>Blinded</b>shuffled, random ids, questionnaire {escape(review['questionnaire'])}",
        f"<b>Read</b>by {len(review['raters'])} reader(s)",
        "<b>Scored</b>with the key, by keywords",
    ]
    steps = "".join(f"<li>{box}</li>" for box in boxes)
    files = "".join(
        f"<li>{escape(r['name'])}: {escape(r['file'])}, {r['num_reports']} report(s), "
        f"{r['num_generated']} answer(s), SHA-256 {escape(r['sha256'])}</li>"
        for r in review["raters"]
    )
    return f"<h2>How it was made</h2><ol class=chain>{steps}</ol><ul class=note>{files}</ul>"


def _records(review: Json) -> str:
    rows = []
    for record in review["records"]:
        title = (
            f"<b>{escape(record['id'])}</b> {escape(record['label'])}, "
            f"{KIND_TITLES[record['kind']].lower()}, ecg_id {record['ecg_id']}"
        )
        said = "".join(_answer(answer) for answer in record["answers"]) or "<p>not answered</p>"
        rows.append(f"<section class=record><h3>{title}</h3>{said}</section>")
    return (
        f"<h2>Every recording</h2><details><summary>{len(rows)} recordings with their reports; "
        "marked: <mark>asserted</mark>, <del>denied</del></summary>"
        f"{''.join(rows)}</details>"
    )


def _answer(answer: Json) -> str:
    words = {True: "generated", False: "real", None: "no answer"}[answer["generated"]]
    if answer["confidence"]:
        words += f", {CONFIDENCE[str(answer['confidence'])].lower()}"
    return (
        f"<p><i>{escape(answer['rater'])}</i> ({words}): "
        f"{_marked(answer['report'], answer['mentions'])}</p>"
    )


def _marked(report: str, mentions: Sequence[Json]) -> str:
    """Return a report as HTML with its keywords marked."""
    parts, end = [], 0
    for mention in mentions:
        tag = "del" if mention["denied"] else "mark"
        parts.append(escape(report[end : mention["start"]]))
        word = escape(report[mention["start"] : mention["end"]])
        parts.append(f'<{tag} title="{escape(mention["name"])}">{word}</{tag}>')
        end = mention["end"]
    return "".join([*parts, escape(report[end:])])
