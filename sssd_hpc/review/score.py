"""Score the answers to a questionnaire: accuracy per class, real against generated, agreement.

What a reader left out is left out of every count, and counted. Source: SSSD-ECG-nle
(arXiv 2407.11108), section V-B, Tables V and VI.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sssd_hpc import __version__
from sssd_hpc.evaluate import metrics
from sssd_hpc.review import keywords as words
from sssd_hpc.review.agreement import Proportion, cohen_kappa, fleiss_kappa
from sssd_hpc.review.answers import CONFIDENCE, Answer, Rater, read_all
from sssd_hpc.review.key import KINDS, OTHER, Key, KeyRecord, read_key
from sssd_hpc.review.keywords import Keywords

FORMAT = 1
ALL = "all"
"""What stands for every rater's answers together."""

Given = Sequence[tuple[KeyRecord, Answer]]
"""Answers with what the key says of their records."""

Found = Mapping[str, set[str]]
"""Classes and signs that each report asserts."""


def score(key_path: Path, answers: Sequence[Path], keywords: Path | None = None) -> dict[str, Any]:
    """Return every number of a review, ready for JSON.

    Raises:
        UserError: a key, answers or keywords that cannot be used.
    """
    key = read_key(key_path)
    lists = words.load(keywords)
    raters = read_all(answers, key)
    given = {
        str(number): [(r, rater.answers[r.id]) for r in key.records if r.id in rater.answers]
        for number, rater in enumerate(raters)
    }
    reports = {answer.report for rater in raters for answer in rater.answers.values()}
    found = {report: lists.asserted(report) for report in reports}
    groups: dict[str, Given] = {ALL: list(itertools.chain(*given.values())), **given}
    return {
        "format": FORMAT,
        "questionnaire": key.questionnaire,
        "ask": key.ask,
        "classes": list(key.classes),
        "other": key.other,
        "source": key.source,
        "sssd_hpc": __version__,
        "raters": [_rater(rater, key) for rater in raters],
        "classification": {who: _classification(g, key, lists, found) for who, g in groups.items()},
        "generated": {who: _generated(g) for who, g in groups.items()},
        "signs": _signs(groups[ALL], lists, found),
        "agreement": _agreement(raters, key, lists, found),
        "records": [_record(record, raters, lists) for record in key.records],
    }


def _rater(rater: Rater, key: Key) -> dict[str, Any]:
    answers = rater.answers.values()
    return {
        "name": rater.name,
        "file": rater.file,
        "sha256": rater.sha256,
        "num_records": len(key.records),
        "num_reports": sum(bool(answer.report.strip()) for answer in answers),
        "num_generated": sum(answer.generated is not None for answer in answers),
    }


def _reported(given: Given) -> Given:
    return [(record, answer) for record, answer in given if answer.report.strip()]


def _classification(given: Given, key: Key, lists: Keywords, found: Found) -> dict[str, Any]:
    """Return Table V; `elsewhere` says how often a class is named in records of other classes.

    A record of a class counts as right where its report asserts the class; one of class Other
    where it asserts none of the classes asked about.
    """
    asked = set(key.classes) - {OTHER}
    reported = [(record, found[answer.report]) for record, answer in _reported(given)]
    table = {}
    for label in key.classes:
        reason = "" if label == OTHER or label in lists.classes else f"no keywords for {label}"
        named = [(r, not said & asked if label == OTHER else label in said) for r, said in reported]
        table[label] = {
            kind: _share((hit for r, hit in named if (r.label, r.kind) == (label, kind)), reason)
            for kind in KINDS
        }
        elsewhere = _share((hit for r, hit in named if r.label != label), reason)
        table[label]["elsewhere"] = elsewhere
    return table


def _share(right: Iterable[bool], reason: str = "") -> dict[str, Any]:
    values = [] if reason else list(right)
    return Proportion(sum(values), len(values), reason).to_json()


def _generated(given: Given) -> dict[str, Any]:
    """Return Table VI and what follows from it; "false synthetic" is a real one called generated.

    The ROC-AUC ranks by answer and confidence, from certainly real to certainly generated.
    """
    said = [(r, a) for r, a in given if a.generated is not None]
    cells = {
        "true_real": sum(r.kind == "real" and a.generated is False for r, a in said),
        "false_synthetic": sum(r.kind == "real" and a.generated is True for r, a in said),
        "false_real": sum(r.kind == "synthetic" and a.generated is False for r, a in said),
        "true_synthetic": sum(r.kind == "synthetic" and a.generated is True for r, a in said),
    }
    num_real = cells["true_real"] + cells["false_synthetic"]
    num_synthetic = cells["true_synthetic"] + cells["false_real"]
    right = cells["true_real"] + cells["true_synthetic"]
    graded = [(r, a) for r, a in said if a.confidence is not None]
    truth = np.array([r.kind == "synthetic" for r, _ in graded], dtype=np.int64)
    grades = np.array([(a.confidence or 0) * (1 if a.generated else -1) for _, a in graded])
    auc = metrics.roc_auc(truth, grades)
    return {
        **cells,
        "accuracy": Proportion(right, len(said)).to_json(),
        "real_recognised": Proportion(cells["true_real"], num_real).to_json(),
        "synthetic_recognised": Proportion(cells["true_synthetic"], num_synthetic).to_json(),
        "roc_auc": None if math.isnan(auc) else auc,
        "by_confidence": {
            str(level): _share(
                (r.kind == "synthetic") == a.generated for r, a in graded if a.confidence == level
            )
            for level in CONFIDENCE
        },
    }


def _signs(given: Given, lists: Keywords, found: Found) -> dict[str, Any]:
    """Return how many reports of each kind mention each sign of something artificial."""
    reported = [(record, found[answer.report]) for record, answer in _reported(given)]
    return {
        sign: {
            kind: _share(sign in said for r, said in reported if r.kind == kind) for kind in KINDS
        }
        for sign in lists.signs
    }


def _agreement(raters: Sequence[Rater], key: Key, lists: Keywords, found: Found) -> dict[str, Any]:
    """Return kappas between raters: on generated or not, and on each class named or not."""

    def generated(answer: Answer) -> bool | None:
        return answer.generated

    def naming(label: str) -> Callable[[Answer], bool | None]:
        def named(answer: Answer) -> bool | None:
            return label in found[answer.report] if answer.report.strip() else None

        return named

    questions: dict[str, Callable[[Answer], bool | None]] = {}
    if key.ask != "report":
        questions["generated"] = generated
    if key.ask != "generated":
        questions |= {label: naming(label) for label in key.classes if label in lists.classes}
    return {name: _kappas(raters, ask) for name, ask in questions.items()}


def _kappas(raters: Sequence[Rater], ask: Callable[[Answer], bool | None]) -> dict[str, Any]:
    said = [
        {k: value for k, a in rater.answers.items() if (value := ask(a)) is not None}
        for rater in raters
    ]
    pairs = []
    for first, second in itertools.combinations(range(len(raters)), 2):
        both = sorted(said[first].keys() & said[second].keys())
        kappa, reason = cohen_kappa([said[first][k] for k in both], [said[second][k] for k in both])
        names = {"first": raters[first].name, "second": raters[second].name}
        pairs.append({**names, **_kappa(kappa, reason, len(both))})
    result: dict[str, Any] = {"pairs": pairs, "fleiss": None}
    if len(raters) > 2:
        common = sorted(set.intersection(*(set(answers) for answers in said)))
        kappa, reason = fleiss_kappa([[answers[k] for k in common] for answers in said])
        result["fleiss"] = _kappa(kappa, reason, len(common))
    return result


def _kappa(value: float, reason: str, n: int) -> dict[str, Any]:
    return {"kappa": None if math.isnan(value) else value, "n": n, "reason": reason or None}


def _record(record: KeyRecord, raters: Sequence[Rater], lists: Keywords) -> dict[str, Any]:
    """Return one record with every rater's answer and the keywords found in its report."""
    answers = [
        {
            "rater": rater.name,
            **asdict(answer),
            "mentions": [asdict(mention) for mention in lists.mentions(answer.report)],
        }
        for rater in raters
        if (answer := rater.answers.get(record.id)) is not None
    ]
    return {**asdict(record), "answers": answers}
