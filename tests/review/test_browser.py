"""The questionnaire in a real browser: answered by keyboard, kept on reload, saved and scored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sssd_hpc import cli
from sssd_hpc.ecg.store import Store
from sssd_hpc.review import result
from sssd_hpc.review.key import Key
from sssd_hpc.review.make import KEY, PAGE, make
from sssd_hpc.review.score import ALL, score
from tests.review import browser as chromium
from tests.review.browser import CONTROL, SHIFT, Page

Questionnaire = tuple[Path, Key]
WIDTH_MM = 13 + 3 * 25 + 4
"""Margins and the three seconds of the tests' records."""


def begin(page: Page, folder: Path, rater: str = "Anna") -> None:
    """Open a questionnaire as a reader who has not been there."""
    page.open((folder / PAGE).as_uri())
    page.run("localStorage.clear()")
    page.reload()
    sign_in(page, rater)


def sign_in(page: Page, rater: str) -> None:
    page.run("document.getElementById('rater').focus()")
    page.type(rater)
    page.click("#start-form button")
    page.frame()


def chosen(page: Page, name: str) -> str | None:
    return page.run(f"document.querySelector('input[name={name}]:checked')?.value ?? null")


def kept(page: Page) -> dict[str, Any]:
    text = page.run("localStorage.getItem(Object.keys(localStorage).find(k => / .* /.test(k)))")
    return json.loads(text)


def picture(page: Page) -> str:
    return page.run("document.getElementById('paper').toDataURL()")


def test_answered_by_keyboard_kept_on_reload_saved_and_scored(
    page: Page, questionnaire: Questionnaire, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, key = questionnaire
    begin(page, folder)
    assert page.text("#place") == "Recording 1 of 12"
    truth = {record.id: record for record in key.records}
    for number in range(7):
        record = truth[page.text("#record-id").removeprefix("Id ")]
        page.key("w")
        page.type("Atrial fibrillation" if record.label == "AFIB" else "Sinus rhythm, no AF")
        page.key("Escape")
        page.key("g" if record.kind == "synthetic" else "r")
        page.key("3" if number % 2 else "1")
        page.key("ArrowRight" if number % 2 else "n")
    assert page.text("#place") == "Recording 8 of 12"
    assert page.text("#progress-text") == "7 of 12 answered; this one is not"

    page.reload()
    assert page.text("#place") == "Recording 8 of 12"
    assert page.text("#rater-name") == "Reader: Anna"
    page.key("ArrowLeft")
    assert page.text("#place") == "Recording 7 of 12"
    assert page.run("document.getElementById('report').value") != ""
    assert chosen(page, "confidence") == "1"
    page.key("p")
    page.key("u")
    assert page.text("#place") == "Recording 8 of 12"

    page.key("s")
    saved = page.downloaded()
    assert saved.name == f"answers-{key.questionnaire[:6]}-Anna.json"
    assert page.text("#status").endswith("7 of 12 answered.")
    args = ["--key", str(folder / KEY), "--answers", str(saved), "--out", str(tmp_path / "scores")]
    assert cli.main(["review", "score", *args]) == 0
    assert "Anna answered 7 of 12" in capsys.readouterr().out
    review = score(folder / KEY, [saved])
    assert review["generated"][ALL]["accuracy"]["count"] == 7
    reported = [review["classification"][ALL]["AFIB"][kind] for kind in ("real", "synthetic")]
    assert all(cell["count"] == cell["n"] for cell in reported)

    asked = [e["params"]["request"]["url"] for e in page.seen if e["method"].endswith("BeSent")]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "blob"}
    wrong = [e for e in page.seen if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert wrong == []


VIOLATION = """new Promise(said => {
    document.addEventListener("securitypolicyviolation", e => said(e.effectiveDirective));
    (%s)();
})"""


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        ("() => fetch('http://127.0.0.1:9/').catch(() => 0)", "connect-src"),
        ("() => { new Image().src = 'http://127.0.0.1:9/a.png'; }", "img-src"),
        (
            "() => { const s = document.createElement('script'); s.text = 'window.hit = 1';"
            "document.body.append(s); }",
            "script-src-elem",
        ),
        ("() => document.body.setAttribute('onclick', 'window.hit = 1')", "script-src-attr"),
    ],
)
def test_the_policy_stops_network_and_injected_scripts(
    attempt: str, directive: str, page: Page, questionnaire: Questionnaire
) -> None:
    begin(page, questionnaire[0])
    assert page.run(VIOLATION % attempt) == directive
    assert page.run("window.hit ?? null") is None


def test_the_result_is_drawn_as_meant(
    page: Page, questionnaire: Questionnaire, answer: Callable[..., Path], tmp_path: Path
) -> None:
    review = score(questionnaire[0] / KEY, [answer("Anna"), answer("Ben <b>")])
    result.write(review, tmp_path / "scores")
    page.open((tmp_path / "scores" / result.PAGE).as_uri())
    # Its style is applied, so the policy lets it.
    assert page.run("getComputedStyle(document.querySelector('.chain')).display") == "flex"
    assert [e for e in page.seen if e["method"] == "Log.entryAdded"] == []
    page.resize(390, 844, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_while_writing_letters_are_letters(page: Page, questionnaire: Questionnaire) -> None:
    begin(page, questionnaire[0])
    page.key("w")
    for letter in "ngrs1":
        page.key(letter)
    assert page.run("document.getElementById('report').value") == "ngrs1"
    assert chosen(page, "generated") is None
    page.key("Enter", CONTROL)
    assert page.text("#place") == "Recording 2 of 12"
    assert page.run("document.getElementById('report').value") == ""


def test_two_readers_of_one_browser_do_not_see_each_other(
    page: Page, questionnaire: Questionnaire
) -> None:
    begin(page, questionnaire[0])
    page.key("g")
    page.click("#leave")
    page.reload()
    assert page.run("document.getElementById('review').hidden")
    sign_in(page, "Ben")
    assert chosen(page, "generated") is None
    page.click("#leave")
    sign_in(page, "Anna")
    assert chosen(page, "generated") == "yes"


def test_html_from_a_reader_stays_text(page: Page, questionnaire: Questionnaire) -> None:
    evil = "<img src=x onerror=window.hit=1>"
    begin(page, questionnaire[0], evil)
    page.key("w")
    page.type(evil)
    page.reload()
    assert page.text("#rater-name") == f"Reader: {evil}"
    assert page.run("document.getElementById('report').value") == evil
    assert page.run("[window.hit ?? null, document.images.length]") == [None, 0]


def test_a_damaged_store_of_the_browser_is_not_trusted(
    page: Page, questionnaire: Questionnaire
) -> None:
    folder, key = questionnaire
    begin(page, folder)
    bad = {"place": 99, "answers": {key.records[0].id: {"report": 3, "generated": "x"}}}
    page.run(
        "localStorage.setItem(Object.keys(localStorage).find(k => / .* /.test(k)), "
        f"{json.dumps(json.dumps(bad))})"
    )
    page.reload()
    assert page.text("#place") == "Recording 12 of 12"
    assert page.text("#progress-text") == "0 of 12 answered; this one is not"
    page.run("localStorage.setItem(Object.keys(localStorage).find(k => / .* /.test(k)), '{')")
    page.reload()
    assert page.run("document.getElementById('review').hidden")


def test_a_saved_file_goes_on_elsewhere(page: Page, questionnaire: Questionnaire) -> None:
    folder, key = questionnaire
    begin(page, folder)
    page.key("g")
    page.key("2")
    page.key("s")
    saved = page.downloaded()

    def load(path: Path) -> None:
        page.run("localStorage.clear()")
        page.reload()
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=root, selector="#load")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
        page.run(
            """new Promise(done => {
                const start = document.getElementById("start");
                const over = () => start.hidden || start.querySelector("[role=alert]").textContent;
                const look = () => (over() ? done() : requestAnimationFrame(look));
                look();
            })"""
        )

    load(saved)
    assert page.text("#rater-name") == "Reader: Anna"
    assert (chosen(page, "generated"), chosen(page, "confidence")) == ("yes", "2")
    other = saved.with_name("other.json")
    other.write_text(saved.read_text().replace(key.questionnaire, "0" * 16))
    load(other)
    assert "another questionnaire" in page.text("#start-message")
    other.write_text("not json")
    load(other)
    assert "cannot be used" in page.text("#start-message")


def test_calipers_measure_time_rate_and_voltage(page: Page, questionnaire: Questionnaire) -> None:
    begin(page, questionnaire[0])
    paper = page.box("#paper")
    # The sheet is fitted: its width, or its height of 4 rows of 40 mm with margins, fills.
    scale = min(paper["width"] / WIDTH_MM, paper["height"] / (5 + 160 + 9))
    start = paper["x"] + paper["width"] / 2, paper["y"] + paper["height"] / 2
    page.drag(start, (start[0] + 20 * scale, start[1] - 15 * scale))
    # 20 mm are 800 ms, 15 mm are 1.5 mV; the mouse moves by whole pixels at worst.
    ms, bpm, mv = (float(part.split()[0]) for part in page.text("#measure").split("   "))
    pixel = 1 / scale
    assert ms == pytest.approx(800, abs=40 * pixel + 0.5)
    assert bpm == pytest.approx(60000 / ms, abs=0.51)
    assert mv == pytest.approx(1.5, abs=0.1 * pixel + 0.005)
    page.key("ArrowRight", SHIFT)
    assert float(page.text("#measure").split()[0]) == pytest.approx(ms + 10, abs=1)
    before = picture(page)
    page.key("m")
    assert picture(page) != before
    page.key("Escape")
    assert page.text("#measure") == ""


def test_zoom_layout_and_gain_redraw_and_zero_fits_again(
    page: Page, questionnaire: Questionnaire
) -> None:
    begin(page, questionnaire[0])
    page.frame()
    first = picture(page)
    paper = page.box("#paper")
    middle = paper["x"] + paper["width"] / 2, paper["y"] + paper["height"] / 2
    seen = {first}
    page.mouse("mouseWheel", *middle, deltaX=0, deltaY=-400, button="none", buttons=0)
    page.frame()
    seen.add(picture(page))
    page.key("c")
    page.drag(middle, (middle[0] + 40, middle[1] + 30))
    seen.add(picture(page))
    page.key("+")
    seen.add(picture(page))
    page.key("0")
    assert picture(page) == first
    page.key("l")
    seen.add(picture(page))
    page.key("l")
    page.run("const g = document.getElementById('gain'); g.value = '20';"
             "g.dispatchEvent(new Event('change'))")  # fmt: skip
    seen.add(picture(page))
    assert len(seen) == 6


def test_every_record_is_drawn_in_ink_on_a_grid(page: Page, questionnaire: Questionnaire) -> None:
    begin(page, questionnaire[0])
    pictures = set()
    count = """(() => {
        const canvas = document.getElementById("paper"), context = canvas.getContext("2d");
        const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
        let ink = 0, red = 0;
        for (let k = 0; k < data.length; k += 4) {
            if (data[k] < 80 && data[k + 1] < 80) ink++;
            if (data[k] > 220 && data[k + 1] < 190) red++;
        }
        return [ink / (data.length / 4), red / (data.length / 4)];
    })()"""
    for _ in range(12):
        page.frame()
        ink, red = page.run(count)
        assert 0.001 < ink < 0.2
        assert 0.01 < red < 0.5
        pictures.add(picture(page))
        page.key("n")
    assert len(pictures) == 12


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768), (800, 1100), (390, 844)])
def test_nothing_sticks_out_at_any_width(
    width: int, height: int, page: Page, questionnaire: Questionnaire
) -> None:
    page.resize(width, height, mobile=width < 800)
    page.open((questionnaire[0] / PAGE).as_uri())
    page.run("localStorage.clear()")
    page.reload()
    wide = "document.documentElement.scrollWidth"
    assert page.run(wide) <= width
    sign_in(page, "Anna")
    assert page.run(wide) <= width
    for element in ("#paper", "#report", "#next", "#save"):
        box = page.box(element)
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 0.5
        assert box["width"] > 60


def test_questions_not_asked_are_not_shown(
    page: Page, make_store: Callable[..., Store], tmp_path: Path
) -> None:
    stores = make_store("a"), make_store("b", seed=1)
    make(*stores, tmp_path / "q", labels=["AFIB"], records_per_class=1, ask="report")
    begin(page, tmp_path / "q")
    assert page.box("fieldset")["height"] == 0
    page.key("g")
    assert chosen(page, "generated") is None
    page.key("w")
    page.type("AF")
    assert page.text("#progress-text") == "1 of 4 answered"


@pytest.mark.parametrize("code", [0, 100])
def test_the_browser_is_installed_as_root_on_debian(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    apt, seen = tmp_path / "apt-get", tmp_path / "seen"
    apt.write_text(f'#!{shutil.which("bash")}\necho "$@" >>{seen}\nexit {code}\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    chromium.install()
    lines = seen.read_text().splitlines()
    assert lines[0] == "-qq update"
    assert ("apt-get update failed" in capfd.readouterr().out) == bool(code)
    if not code:
        assert lines[1].endswith("chromium")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    chromium.install()
    assert "its tests are left out" in capfd.readouterr().out


def test_no_browser_is_a_skip_and_in_ci_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make browser-package"):
        chromium.needed()
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="make browser-package"):
        chromium.needed()
