"""Scores against the paper's tables, files that are broken or forged, and the page of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from sssd_hpc import cli
from sssd_hpc.errors import UserError
from sssd_hpc.review import result
from sssd_hpc.review.key import OTHER, Key, KeyRecord, read_key, write_private
from sssd_hpc.review.score import ALL, score

CLASSES = ("AFIB", "CRBBB", "PVC", "IMI", OTHER)
WORDS = {
    "AFIB": "Atrial fibrillation",
    "CRBBB": "SR, complete RBBB",
    "PVC": "Frequent PVCs, no AF",
    "IMI": "Old inferior infarction",
    OTHER: "Normal ECG, no AF",
}
SOURCE = {
    "stores": {
        kind: {"name": f"{kind} <i>store</i>", "manifest_sha256": "0" * 64}
        for kind in ("real", "synthetic")
    },
    "seed": 0,
    "records_per_class": 20,
    "rate_hz": 100,
    "length": 1000,
    "pass_hz": [0.5, 40.0],
    "uv_per_unit": 5,
}
Rows = list[tuple[str, str]]


def write_key(folder: Path, rows: Rows, classes: tuple[str, ...] = CLASSES) -> Key:
    """Write a key of records given as (kind, class), called r0, r1, .."""
    records = tuple(
        KeyRecord(f"r{k}", kind, label, 100 + k) for k, (kind, label) in enumerate(rows)
    )
    key = Key(
        ask="both", classes=classes, other="NORM", records=records, signals_sha256="", salt="s",
        source=SOURCE,
    )  # fmt: skip
    write_private(folder / "key.json", key.text())
    return key


def write_answers(path: Path, key: Key, answers: list[dict[str, Any]], rater: str = "A") -> Path:
    value = {
        "format": 1, "questionnaire": key.questionnaire, "rater": rater, "answers": answers,
    }  # fmt: skip
    path.write_text(json.dumps(value))
    return path


def said(
    number: int, report: str = "", generated: bool | None = None, confidence: int | None = None
) -> dict[str, Any]:
    return {
        "id": f"r{number}", "report": report, "generated": generated, "confidence": confidence,
    }  # fmt: skip


def test_the_papers_table_v_comes_out(tmp_path: Path) -> None:
    right = {
        "real": dict(zip(CLASSES, (19, 19, 20, 16, 20), strict=True)),
        "synthetic": dict(zip(CLASSES, (19, 20, 17, 14, 20), strict=True)),
    }
    rows = [(kind, label) for kind in right for label in CLASSES for _ in range(20)]
    key = write_key(tmp_path, rows)
    answers = []
    for number, (kind, label) in enumerate(rows):
        wrong = number % 20 >= right[kind][label]
        answers.append(said(number, "Sinus rhythm" if wrong else WORDS[label]))
    path = write_answers(tmp_path / "a.json", key, answers)
    table = score(tmp_path / "key.json", [path])["classification"][ALL]
    for kind in right:
        values = [table[label][kind]["value"] for label in CLASSES]
        assert values == pytest.approx(list(result.PAPER_ACCURACY[kind].values()))
    assert table["AFIB"]["real"]["n"] == 20
    # 160 records are not AFIB, and no report on them says so: "no AF" is a denial.
    assert table["AFIB"]["elsewhere"]["count"] == 0
    assert table["AFIB"]["elsewhere"]["n"] == 160
    # "Sinus rhythm" names none of the classes: 1 + 1 + 0 + 4 of real and 1 + 0 + 3 + 6.
    assert table[OTHER]["elsewhere"]["count"] == 16


def test_the_papers_table_vi_comes_out(tmp_path: Path) -> None:
    rows = [("real", OTHER)] * 100 + [("synthetic", OTHER)] * 280
    key = write_key(tmp_path, rows)
    answers = [said(k, generated=(k >= 100) != (k in (0, 100))) for k in range(380)]
    path = write_answers(tmp_path / "a.json", key, answers)
    table = score(tmp_path / "key.json", [path])["generated"][ALL]
    cells = {name: table[name] for name in result.PAPER_CONFUSION}
    assert cells == result.PAPER_CONFUSION
    assert table["accuracy"]["value"] == pytest.approx(378 / 380)
    assert table["real_recognised"]["value"] == pytest.approx(0.99)
    assert table["synthetic_recognised"]["value"] == pytest.approx(279 / 280)


def test_confidence_kappa_and_signs_equal_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [("real" if k % 2 else "synthetic", "AFIB") for k in range(80)]
    key = write_key(tmp_path, rows)
    truth = np.array([kind == "synthetic" for kind, _ in rows])
    paths, calls, grades = [], [], []
    for rater in ("Anna", "Ben", "Cleo"):
        call = np.where(rng.random(80) < 0.75, truth, ~truth)
        sure = rng.integers(1, 4, 80)
        reports = ["Low voltage. AF" if c else "AF, no low voltage" for c in call]
        answers = [said(k, reports[k], bool(call[k]), int(sure[k])) for k in range(80)]
        paths.append(write_answers(tmp_path / f"{rater}.json", key, answers, rater))
        calls.append(call)
        grades.append(np.where(call, sure, -sure))
    review = score(tmp_path / "key.json", paths)
    for number, grade in enumerate(grades):
        table = review["generated"][str(number)]
        assert table["roc_auc"] == pytest.approx(roc_auc_score(truth, grade))
        assert sum(level["n"] for level in table["by_confidence"].values()) == 80
    assert review["generated"][ALL]["roc_auc"] == pytest.approx(
        roc_auc_score(np.tile(truth, 3), np.concatenate(grades))
    )
    pairs = review["agreement"]["generated"]["pairs"]
    assert [(p["first"], p["second"]) for p in pairs] == [
        ("Anna", "Ben"), ("Anna", "Cleo"), ("Ben", "Cleo"),
    ]  # fmt: skip
    assert pairs[1]["kappa"] == pytest.approx(cohen_kappa_score(calls[0], calls[2]))
    assert review["agreement"]["generated"]["fleiss"]["n"] == 80
    # All say AF of every record: no choice, so no kappa.
    assert review["agreement"]["AFIB"]["fleiss"]["kappa"] is None
    assert "one and the same" in review["agreement"]["AFIB"]["fleiss"]["reason"]
    mentioned = review["signs"]["low voltage"]
    assert mentioned["synthetic"]["count"] == sum(int(c[truth].sum()) for c in calls)
    assert mentioned["real"]["count"] == sum(int(c[~truth].sum()) for c in calls)
    sentence = next(line for line in result.summary(review) if "low voltage" in line)
    assert "of generated" in sentence


def test_an_incomplete_review_is_scored_on_what_is_there(tmp_path: Path) -> None:
    key = write_key(tmp_path, [("real", "AFIB"), ("synthetic", "AFIB"), ("real", OTHER)])
    first = [said(0, "AF", None), said(1, "   ", True), said(2, "", False, 3)]
    paths = [
        write_answers(tmp_path / "a.json", key, first, "Anna"),
        write_answers(tmp_path / "b.json", key, [], "Ben"),
    ]
    review = score(tmp_path / "key.json", paths)
    table = review["classification"][ALL]
    assert (table["AFIB"]["real"]["count"], table["AFIB"]["real"]["n"]) == (1, 1)
    assert table["AFIB"]["synthetic"]["n"] == 0
    assert table["AFIB"]["synthetic"]["value"] is None
    assert table["PVC"]["real"]["reason"] == "no answers"
    assert review["generated"][ALL]["accuracy"]["n"] == 2
    assert [(r["num_reports"], r["num_generated"]) for r in review["raters"]] == [(1, 2), (0, 0)]
    assert review["agreement"]["generated"]["pairs"][0]["kappa"] is None
    assert "Anna answered 1 of 3; scored is what is there." in result.summary(review)
    result.write(review, tmp_path / "out")


def test_answers_of_nobody_are_no_numbers(tmp_path: Path) -> None:
    key = write_key(tmp_path, [("real", "AFIB"), ("synthetic", "AFIB")])
    review = score(tmp_path / "key.json", [write_answers(tmp_path / "a.json", key, [])])
    result.write(review, tmp_path / "out")
    assert "Nobody said which recordings are generated." in result.text(review)
    assert review["generated"][ALL]["roc_auc"] is None


def test_a_class_without_keywords_is_no_number_until_a_file_gives_some(tmp_path: Path) -> None:
    rows = [("real", "BRUGADA"), ("synthetic", "BRUGADA")]
    key = write_key(tmp_path, rows, ("BRUGADA", OTHER))
    answers = [said(0, "Coved ST elevation"), said(1, "Coved ST elevation")]
    path = write_answers(tmp_path / "a.json", key, answers)
    cell = score(tmp_path / "key.json", [path])["classification"][ALL]["BRUGADA"]["real"]
    assert (cell["value"], cell["reason"]) == (None, "no keywords for BRUGADA")
    more = tmp_path / "more.yaml"
    more.write_text("classes:\n  BRUGADA: [coved ST]\n")
    cell = score(tmp_path / "key.json", [path], more)["classification"][ALL]["BRUGADA"]["real"]
    assert cell["value"] == 1.0


# Broken and forged files.

NESTED = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "no json": ("not json", "cannot be read as JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read as JSON"),
    "a list": ("[]", "holds no answers"),
    "deep": (NESTED, "cannot be read as JSON"),
    "a huge number": ("9" * 5000, "cannot be read as JSON"),
    "a name twice": ('{"rater": "A", "rater": "B"}', "a name stands twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_answers_is_one_clear_line(
    case: str, key_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, expected = BROKEN[case]
    path = tmp_path / "broken.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    refused(key_path, [path], expected, tmp_path, capsys)


def refused(
    key_path: Path,
    answers: list[Path],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Expect exit code 2, one line that holds the words, and nothing written."""
    args = ["--key", str(key_path), "--answers", *map(str, answers)]
    assert cli.main(["review", "score", *args, "--out", str(tmp_path / "scores")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert len(err) < 600
    assert not (tmp_path / "scores").exists()


def one(**changes: Any) -> dict[str, Any]:
    return {"id": "zzzzzz", "report": "", "generated": None, "confidence": None, **changes}


FORGED = {
    "another questionnaire": ({"questionnaire": "0" * 16}, "answers questionnaire '0000"),
    "no questionnaire": ({"questionnaire": None}, "holds no answers"),
    "another format": ({"format": 2}, "of format 2"),
    "no rater": ({"rater": " "}, "rater is ' '"),
    "a rater of a thousand letters": ({"rater": "x" * 1000}, "a name of 1 to 80"),
    "a rater that writes to the terminal": ({"rater": "A\x1b[2J"}, "1 to 80 printable"),
    "rater is no text": ({"rater": {"a": 1}}, "rater is"),
    "answers is no list": ({"answers": {}}, "answers is no list"),
    "unknown id": ({"answers": [one()]}, "record 'zzzzzz', which questionnaire"),
    "id is no text": ({"answers": [one(id=3)]}, "answer 1 has no id"),
    "answer is no object": ({"answers": [3]}, "answer 1 has no id"),
    "report is no text": ({"answers": [one(report=None)]}, "report must be text"),
    "a report too long": ({"answers": [one(report="x" * 5001)]}, "at most 5000"),
    "half a character": ({"answers": [one(report="AFIB \ud800")]}, "half a character"),
    "generated is text": ({"answers": [one(generated="yes")]}, "generated is 'yes'"),
    "confidence out of range": ({"answers": [one(confidence=4)]}, "confidence is 4"),
    "confidence is true": ({"answers": [one(confidence=True)]}, "confidence is True"),
    "confidence is NaN": ({"answers": [one(confidence=float("nan"))]}, "confidence is nan"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_one_clear_line(
    case: str,
    key_path: Path,
    answer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, expected = FORGED[case]
    refused(key_path, [answer(**changes)], expected, tmp_path, capsys)


def test_an_id_answered_twice_is_refused(
    key_path: Path,
    answer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = read_key(key_path).records[0].id
    path = answer(answers=[one(id=record), one(id=record, generated=True)])
    refused(key_path, [path], f"record {record} is answered twice", tmp_path, capsys)


@pytest.mark.parametrize("again", ["Anna", "anna", " Anna "])
def test_two_files_of_one_rater_are_refused(
    again: str,
    key_path: Path,
    answer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [answer("Anna"), answer("Ben"), answer(again)]
    refused(key_path, paths, "are both of rater", tmp_path, capsys)


def test_a_huge_file_is_refused_unread(
    key_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
    refused(key_path, [path], "larger than 16 MiB", tmp_path, capsys)


def test_an_absent_file_and_a_folder_are_refused(
    key_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        refused(key_path, [path], "cannot be read as JSON", tmp_path, capsys)


def test_a_key_changed_afterwards_no_longer_fits(
    key_path: Path,
    answer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = answer()
    value = json.loads(key_path.read_text())
    for change in (
        lambda v: v["records"][0].update(kind="real" if v["records"][0]["kind"] != "real" else "x"),
        lambda v: v["records"].pop(),
        lambda v: v.update(classes=3),
        lambda v: v.update(source={"seed": float("nan")}),
        lambda v: v.pop("salt"),
    ):
        forged = json.loads(json.dumps(value))
        change(forged)
        key_path.write_text(json.dumps(forged))
        refused(key_path, [path], "was changed after", tmp_path, capsys)
    for text, expected in (("{}", "is no key"), ("", "as JSON"), (path.read_text(), "was changed")):
        key_path.write_text(text)
        refused(key_path, [path], expected, tmp_path, capsys)


def test_the_id_hides_the_key(questionnaire: tuple[Path, Key]) -> None:
    """With another salt the same key has another id, so nobody can try keys out on an id."""
    _, key = questionnaire
    other = Key(**{**key.__dict__, "salt": "0" * 32})
    assert other.questionnaire != key.questionnaire


# The result.


class Elements(HTMLParser):
    """Count the elements of a page, gather its text."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_in_names_labels_and_reports_stays_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&<script>alert(2)</script>"
    label = f"A{evil}"
    key = write_key(tmp_path, [("real", label), ("synthetic", OTHER)], (label, OTHER))
    report = f"{evil} AF <b>no PVC</b>"
    paths = [
        write_answers(tmp_path / f"{n}{name}.json", key, [said(0, report, True, 1)], f"{n}{evil}")
        for n, name in enumerate(("<b>", "b"))
    ]
    more = tmp_path / "more.yaml"
    more.write_text("classes: {'<i>': ['<b>no']}\nsigns: {'<u>': ['<script>alert(2)']}\n")
    review = score(tmp_path / "key.json", paths, more)
    result.write(review, tmp_path / "out")
    page = Elements()
    page.feed((tmp_path / "out" / result.PAGE).read_text())
    assert not page.names & {"script", "img", "u"}
    assert {"mark", "i"} <= page.names
    assert report in page.text
    assert label in page.text
    assert f"1{evil}" in page.text
    assert "real <i>store</i>" in page.text
    assert json.loads((tmp_path / "out" / "review.json").read_text()) == review


def test_keywords_are_marked_in_the_reports(tmp_path: Path) -> None:
    key = write_key(tmp_path, [("real", "AFIB")])
    path = write_answers(tmp_path / "a.json", key, [said(0, "RBBB & <AF>, no PVC")])
    page = result.html(score(tmp_path / "key.json", [path]))
    assert (
        '<mark title="CRBBB">RBBB</mark> &amp; &lt;<mark title="AFIB">AF</mark>&gt;, no '
        '<del title="PVC">PVC</del>' in page
    )


def test_score_writes_the_report_and_prints_the_tables(
    key_path: Path,
    answer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--key", str(key_path), "--answers", str(answer("Anna")), str(answer("Ben"))]
    assert cli.main(["review", "score", *args, "--out", str(tmp_path / "scores")]) == 0
    out = capsys.readouterr().out
    # Both call everything real.
    assert "12 of 24 (50 %" in out
    assert "cannot be told from guessing" in out
    assert "False real          12" in out
    review = json.loads((tmp_path / "scores" / "review.json").read_text())
    assert review["questionnaire"] == read_key(key_path).questionnaire
    assert [r["name"] for r in review["raters"]] == ["Anna", "Ben"]
    assert (tmp_path / "scores" / "review.html").is_file()


def test_a_byte_order_mark_is_no_obstacle(key_path: Path, answer: Callable[..., Path]) -> None:
    path = answer()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert score(key_path, [path])["raters"][0]["num_reports"] == 12


def test_answers_copied_from_another_rater_are_told_of(
    key_path: Path, answer: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    record = read_key(key_path).records[0].id
    said = one(id=record, report="AFIB, I think", generated=True)
    score(
        key_path,
        [answer("Anna", answers=[said]), answer("Ben", answers=[{**said, "report": "AFIB"}])],
    )
    assert "word for word" not in caplog.text
    score(key_path, [answer("Anna", answers=[said]), answer("Ben", answers=[said])])
    assert "word for word" in caplog.text


def test_no_answers_at_all_are_refused(key_path: Path) -> None:
    with pytest.raises(UserError, match="names no file"):
        score(key_path, [])
