"""What reports assert and deny, sentence by sentence, and lists of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.review.keywords import load

KEYWORDS = load()

ASSERTED = {
    "Atrial fibrillation": {"AFIB"},
    "AFib with rapid ventricular response.": {"AFIB"},
    "AF, rate 110": {"AFIB"},
    "a-fib; LVH": {"AFIB", "LVH"},
    "No atrial fibrillation.": set(),
    "no evidence of atrial fibrillation or flutter": set(),
    "Not AF.": set(),
    "Atrial fibrillation is not seen": set(),
    "Atrial fibrillation: no": set(),
    "AF ruled out. RBBB": {"CRBBB"},
    "AF cannot be ruled out": {"AFIB"},
    "cannot exclude atrial fibrillation": {"AFIB"},
    "Not only AF but RBBB": {"AFIB", "CRBBB"},
    "No P waves, atrial fibrillation": {"AFIB"},
    "no P waves and irregular rhythm: atrial fibrillation": {"AFIB"},
    "No P waves and AF": {"AFIB"},
    "No AF, complete RBBB": {"CRBBB"},
    "No AF, PVC or inferior infarction": set(),
    "No AF, PVC or inferior infarction, RBBB present": {"CRBBB"},
    "no AF or PVC, RBBB": {"CRBBB"},
    "neither AF nor PVCs": set(),
    "Without AF. With PVC.": {"PVC"},
    "not consistent with AF": set(),
    "No ST elevation but AF": {"AFIB"},
    "no acute ST changes of any kind in any lead, AF": {"AFIB"},
    "Irregular rhythm suggesting AF": {"AFIB"},
    "complete right bundle-branch block": {"CRBBB"},
    "Right bundle branch\nblock": {"CRBBB"},
    "incomplete RBBB": {"IRBBB"},
    "incomplete right bundle branch block and LBBB": {"IRBBB", "CLBBB"},
    "RBBB (incomplete)": {"IRBBB"},
    "ventricular extrasystoles": {"PVC"},
    "supraventricular extrasystoles": {"PAC"},
    "supra-ventricular extrasystole": {"PAC"},
    "premature ventricular contractions, bigeminy": {"PVC"},
    "PVCs": {"PVC"},
    "old inferior MI": {"IMI"},
    "Q waves in II, III, aVF": {"IMI"},
    "Scarring in the inferior wall; scar of the inferior wall": {"IMI"},
    "inferolateral infarction": {"IMI"},
    "anterior infarction": {"AMI"},
    "1st-degree AV block": {"1AVB"},
    "PR interval is prolonged": {"1AVB"},
    "PR is not prolonged": set(),
    "Normal ECG": {"NORM"},
    "abnormal ECG": set(),
    "not a normal ECG": set(),
    "no abnormalities": {"NORM"},
    "Low voltage, chest electrodes? reversed electrodes, noise": {
        "low voltage", "electrodes swapped", "noise",
    },
    "No low voltage": set(),
    "half afternoon, safe, paved": set(),
    "": set(),
}  # fmt: skip


@pytest.mark.parametrize("report", ASSERTED)
def test_a_report_asserts(report: str) -> None:
    assert KEYWORDS.asserted(report) == ASSERTED[report]


@pytest.mark.parametrize("report", [text for text in ASSERTED if ASSERTED[text]])
def test_case_does_not_matter(report: str) -> None:
    assert KEYWORDS.asserted(report.upper()) == ASSERTED[report]


def test_mentions_say_where_they_stand() -> None:
    report = "No AF, but incomplete RBBB"
    found = [(report[m.start : m.end], m.name, m.denied) for m in KEYWORDS.mentions(report)]
    assert found == [("AF", "AFIB", True), ("incomplete RBBB", "IRBBB", False)]


def test_a_long_report_of_repeated_words_is_read_quickly() -> None:
    # A pattern that backtracks would not end; pytest's own timeout is the reader's patience.
    assert KEYWORDS.asserted("right bundle branch " * 250) == set()
    assert KEYWORDS.asserted("no " * 1600 + "AF") == set()


def test_a_users_file_adds_classes_and_keywords(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text("classes:\n  AFIB: [delirium cordis]\n  BRUGADA: [coved ST*]\n")
    more = load(path)
    assert more.asserted("Delirium cordis, coved ST-segments; AF") == {"AFIB", "BRUGADA"}
    assert KEYWORDS.asserted("delirium cordis") == set()


@pytest.mark.parametrize(
    "text",
    [
        "AFIB: [x]",
        "classes: [x]",
        "classes:\n  AFIB: x",
        "classes:\n  AFIB: [no]",
        "classes:\n  AFIB: ['']",
        "classes:\n  AFIB: ['*']",
        "negation:\n  beside: [x]",
        "classes: !!python/object:os.system {}",
        "{",
    ],
)
def test_a_bad_file_of_keywords_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load(path)


def test_a_keyword_is_text_not_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "signs.yaml"
    path.write_text("classes:\n  X: ['(a+)+b', 'c.d']\n")
    more = load(path)
    assert more.asserted("ccd aab") == set()
    assert more.asserted("c.d") == {"X"}
