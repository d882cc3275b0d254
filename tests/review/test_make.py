"""The questionnaire: what is drawn, how it is prepared, and that nothing gives a kind away."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from sssd_hpc import cli
from sssd_hpc.ecg.leads import EIGHT, LEADS, take, to_twelve
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.review.key import OTHER, Key, read_key
from sssd_hpc.review.make import ID_ALPHABET, KEY, PAGE, make, prepare

LABELS = ["AFIB", "PVC"]
StoreMaker = Callable[..., Store]


def data_of(out: Path) -> dict[str, Any]:
    """Return what a page holds as data."""
    page = (out / PAGE).read_text()
    match = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def shell_of(out: Path) -> str:
    """Return a page without its data."""
    page = (out / PAGE).read_text()
    return re.sub(r'(<script type="application/json"[^>]*>).*?(</script>)', "", page, flags=re.S)


def units_of(data: dict[str, Any]) -> np.ndarray:
    """Return a page's samples, (n, 12, L)."""
    raw = [base64.b64decode(record["signals"]) for record in data["records"]]
    return np.stack([np.frombuffer(r, "<i2").reshape(len(LEADS), -1) for r in raw])


def auc(kinds: np.ndarray, values: np.ndarray) -> float:
    """Return how well values tell kinds apart, 0.5 for not at all."""
    ranks = rankdata(values)[kinds]
    return float((ranks.sum() - len(ranks) * (len(ranks) + 1) / 2) / (len(ranks) * (~kinds).sum()))


def test_every_class_has_as_many_real_as_generated_records(
    questionnaire: tuple[Path, Key],
) -> None:
    _, key = questionnaire
    assert key.classes == ("AFIB", "PVC", OTHER)
    counts = Counter((record.label, record.kind) for record in key.records)
    assert set(counts.values()) == {2}
    assert len(counts) == 6
    for record in key.records:
        row = record.ecg_id % 7000 - 1
        assert ("AFIB", "PVC", OTHER)[row % 3] == record.label
        assert (record.ecg_id > 14000) == (record.kind == "synthetic")


def test_the_page_shows_the_records_of_the_key_in_its_order(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    stores = {"real": make_store("real"), "synthetic": make_store("synthetic", seed=1)}
    key = make(*stores.values(), tmp_path / "out", labels=LABELS, records_per_class=3)
    data = data_of(tmp_path / "out")
    assert [r["id"] for r in data["records"]] == [record.id for record in key.records]
    for units, record in zip(units_of(data), key.records, strict=True):
        store = stores[record.kind]
        row = np.flatnonzero(store.ecg_id == record.ecg_id)
        assert np.array_equal(units, prepare(store.signals_mv(row, LEADS), store.rate_hz)[0])


def test_records_with_two_labels_flags_or_a_patient_seen_before_are_not_drawn(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    codes = [{"AFIB": 0.0}] * 4 + [{"AFIB": 0.0, "PVC": 0.0}] * 4 + [{"PVC": 0.0}] * 4
    codes += [{"NORM": 0.0}] * 4
    fields: dict[str, Any] = {
        "num_records": 16,
        "scp_codes": tuple(codes),
        "labels": np.array([["NORM" in code] for code in codes], dtype=np.uint8),
        "flags": tuple(("flat:V1",) if row == 0 else () for row in range(16)),
        "patient_id": np.array(["p1" if row in (1, 2) else f"q{row}" for row in range(16)]),
    }
    stores = [make_store(name, seed=seed, **fields) for seed, name in enumerate(("a", "b"))]
    key = make(*stores, tmp_path / "out", labels=LABELS, records_per_class=2)
    drawn = {record.ecg_id % 7000 for record in key.records if record.label == "AFIB"}
    assert drawn <= {2, 3, 4}
    assert 4 in drawn
    with pytest.raises(UserError, match="real a has 2 usable"):
        make(*stores, tmp_path / "more", labels=LABELS, records_per_class=3)


def test_other_is_normal_where_both_sides_have_enough(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    real, synthetic = make_store("real"), make_store("synthetic", seed=1)
    key = make(real, synthetic, tmp_path / "both", labels=["AFIB"], records_per_class=2)
    assert key.other.startswith("NORM")
    bare = make_store(
        "bare", seed=2, scp_codes=({"AFIB": 0.0}, {}) * 18, labels=np.zeros((36, 1), np.uint8)
    )
    key = make(real, bare, tmp_path / "one", labels=["AFIB"], records_per_class=2)
    assert key.other == "without any of the labels asked about"


# What must not give a kind away.


def test_the_same_records_on_both_sides_cannot_be_told_apart(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    real = make_store("real", num_records=12)
    twin = make_store("twin", num_records=12)
    key = make(real, twin, tmp_path / "out", labels=LABELS, records_per_class=4)
    data = data_of(tmp_path / "out")
    assert set(Counter(record["signals"] for record in data["records"]).values()) == {2}
    assert {tuple(record) for record in data["records"]} == {("id", "signals")}
    assert len(key.records) == len({record["id"] for record in data["records"]}) == 24
    letters = re.compile(f"[{ID_ALPHABET}]{{6}}")
    assert all(letters.fullmatch(record["id"]) for record in data["records"])


def test_nothing_but_the_signals_depends_on_the_stores(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    canary = "canary-patient"
    marked = make_store(
        "canary-store", seed=5, patient_id=np.array([f"{canary}-{k}" for k in range(36)])
    )
    other = make_store("synthetic", seed=6)
    make(marked, other, tmp_path / "one", labels=LABELS, records_per_class=2, seed=987654321)
    make(other, marked, tmp_path / "two", labels=LABELS, records_per_class=2)
    assert shell_of(tmp_path / "one") == shell_of(tmp_path / "two")
    one, two = data_of(tmp_path / "one"), data_of(tmp_path / "two")
    for data in (one, two):
        data.pop("questionnaire")
        data.pop("records")
    assert one == two
    page = (tmp_path / "one" / PAGE).read_text()
    key = read_key(tmp_path / "one" / KEY)
    secrets = ["canary", "987654321", key.salt, key.signals_sha256, *LABELS, "ecg_id", "synthetic"]
    assert [word for word in secrets if word.lower() in page.lower()] == []


def test_steps_offset_and_length_of_a_source_are_gone(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    plain = make_store("plain", num_records=12)
    signals = np.pad(np.asarray(plain.signals, dtype=float), ((0, 0), (0, 0), (0, 200)))
    rough = make_store("rough", num_records=12, signals=25 * np.rint(signals / 25) + 2000)
    key = make(rough, plain, tmp_path / "out", labels=LABELS, records_per_class=4)
    units = units_of(data_of(tmp_path / "out"))
    kinds = np.array([record.kind == "real" for record in key.records])
    for side in (units[kinds], units[~kinds]):
        assert side.shape == (12, 12, 300)
        # Rounding moves a median by half a unit at most.
        assert np.abs(np.median(take(side, LEADS, EIGHT), axis=-1)).max() <= 0.5
        assert all(np.gcd.reduce(np.diff(record).ravel()) == 1 for record in side)
    order = {r.ecg_id: k for k, r in enumerate(key.records) if r.kind == "synthetic"}
    pairs = [(k, order[r.ecg_id]) for k, r in enumerate(key.records) if r.kind == "real"]
    apart = [int(np.abs(units[a].astype(int) - units[b]).max()) for a, b in pairs]
    # The steps of 25 uV were 12.5 uV of error a sample, 2.5 units, which the filter averages.
    assert max(apart) <= 5


def test_order_and_ids_say_nothing_of_the_kind(make_store: StoreMaker, tmp_path: Path) -> None:
    stores = make_store("real", length=60), make_store("synthetic", seed=1, length=60)
    repeats, half = 40, 9
    by_place, by_id = [], []
    for seed in range(repeats):
        out = tmp_path / str(seed)
        key = make(*stores, out, labels=LABELS, records_per_class=half // 3, seed=seed)
        kinds = np.array([record.kind == "real" for record in key.records])
        by_place.append(auc(kinds, np.arange(2 * half)))
        by_id.append(auc(kinds, np.array([record.id for record in key.records])))
    # The variance of U / n^2 with two groups of n that do not differ is (2n + 1) / 12n^2.
    error = np.sqrt((2 * half + 1) / (12 * half**2 * repeats))
    assert abs(np.mean(by_place) - 0.5) < 4 * error
    assert abs(np.mean(by_id) - 0.5) < 4 * error


def test_the_seed_alone_does_not_tell_the_order(make_store: StoreMaker, tmp_path: Path) -> None:
    real, synthetic = make_store("real"), make_store("synthetic", seed=1)
    third = make_store("third", seed=2)
    orders = []
    for number, side in enumerate((synthetic, third)):
        out = tmp_path / str(number)
        key = make(real, side, out, labels=LABELS, records_per_class=8)
        orders.append(tuple(record.kind for record in key.records))
    assert orders[0] != orders[1]


def test_leads_that_obey_einthoven_and_goldberger_still_do() -> None:
    eight = np.random.default_rng(0).normal(0.2, 0.5, (3, 8, 1000))
    units = prepare(to_twelve(eight, EIGHT) + 1.0, 100).astype(int)
    one, two, three, right = (units[:, LEADS.index(name)] for name in ("I", "II", "III", "AVR"))
    # Each of three rounded leads is off by half a unit at most.
    assert np.abs(one + three - two).max() <= 1.5
    assert np.abs(right + (one + two) / 2).max() <= 1.0


def test_a_record_that_ends_in_a_complex_does_not_drift() -> None:
    signals = np.zeros((1, 12, 1000))
    signals[..., -1] = 1.0
    units = prepare(signals, 100)
    # 5 uV a unit: a tenth of a small square.
    assert np.abs(units[..., :-50]).max() <= 10


# The files.


def test_the_key_is_the_owners_alone_whatever_the_umask(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        stores = make_store("real"), make_store("synthetic", seed=1)
        make(*stores, tmp_path / "out", labels=LABELS, records_per_class=2)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / KEY).stat().st_mode) == 0o600
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [KEY, PAGE]


def test_the_same_command_makes_the_same_files_and_another_spares_the_key(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    stores = make_store("real"), make_store("synthetic", seed=1)
    out = tmp_path / "out"
    made = []
    for _ in range(2):
        make(*stores, out, labels=LABELS, records_per_class=2)
        made.append([(out / name).read_bytes() for name in (KEY, PAGE)])
    assert made[0] == made[1]
    with pytest.raises(UserError, match="the key of another questionnaire"):
        make(*stores, out, labels=LABELS, records_per_class=2, seed=1)
    assert (out / KEY).read_bytes() == made[0][0]


def test_the_page_may_run_its_own_script_and_reach_nothing(
    questionnaire: tuple[Path, Key],
) -> None:
    page = (questionnaire[0] / PAGE).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert script
    assert style
    digest = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("script-src", script[1]), ("style-src", style[1]))
    }
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        **{name: f"'sha256-{value}'" for name, value in digest.items()},
    }
    assert not re.search(r"https?:|//\w+\.|innerHTML|\beval\b|XMLHttpRequest|fetch\(", page)


def test_ask_leaves_questions_out(make_store: StoreMaker, tmp_path: Path) -> None:
    stores = make_store("real"), make_store("synthetic", seed=1)
    for ask, expected in (
        ("both", ["report", "generated"]),
        ("report", ["report"]),
        ("generated", ["generated"]),
    ):
        make(*stores, tmp_path / ask, labels=LABELS, records_per_class=1, ask=ask)
        assert data_of(tmp_path / ask)["ask"] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": ["IMI"]}, "has 0 usable record.s. of class IMI"),
        ({"records_per_class": 13}, "lower --records-per-class"),
        ({"records_per_class": 0}, "at least 1"),
        ({"records_per_class": 10**6}, "MiB of signals"),
        ({"labels": ["AFIB", "AFIB"]}, "each once"),
        ({"labels": [""]}, "each once"),
        ({"labels": ["AFIB", OTHER]}, "leave it out"),
        ({"ask": "nothing"}, "allowed are both, report, generated"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_what_cannot_be_made_is_one_clear_line(
    arguments: dict[str, Any], said: str, make_store: StoreMaker, tmp_path: Path
) -> None:
    stores = make_store("real"), make_store("synthetic", seed=1)
    with pytest.raises(UserError, match=said):
        make(*stores, tmp_path / "out", **{"labels": LABELS, "records_per_class": 2, **arguments})
    assert not (tmp_path / "out").exists()


def test_different_rates_are_refused(make_store: StoreMaker, tmp_path: Path) -> None:
    stores = make_store("real"), make_store("synthetic", rate_hz=500)
    with pytest.raises(UserError, match="prepare both with the same --rate"):
        make(*stores, tmp_path / "out", labels=LABELS, records_per_class=2)


def test_one_store_for_both_sides_is_refused(make_store: StoreMaker, tmp_path: Path) -> None:
    store = make_store("real")
    with pytest.raises(UserError, match="are the same store"):
        make(store, store, tmp_path / "out", labels=LABELS, records_per_class=2)


def test_the_command_takes_a_store_and_a_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, root in enumerate(("real", "synthetic")):
        args = ["--out", str(tmp_path / root), "--records", "20", "--seed", str(seed)]
        assert cli.main(["simulate", *args]) == 0
    store = tmp_path / "store"
    assert cli.main(["prepare", "--source", str(tmp_path / "real"), "--out", str(store)]) == 0
    out = tmp_path / "out"
    flags = ["--labels", "AFIB,CRBBB", "--records-per-class", "1", "--ask", "report"]
    sides = ["--real", str(store), "--synthetic", str(tmp_path / "synthetic")]
    assert cli.main(["review", "make", *sides, "--out", str(out), *flags]) == 0
    assert "never send it" in capsys.readouterr().out
    assert len(data_of(out)["records"]) == 6
    assert units_of(data_of(out)).shape == (6, 12, 1000)


def test_review_alone_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["review"]) == 0
    out = capsys.readouterr().out
    assert "review make" in out
    assert "review score" in out
    assert "doctor" not in out
    assert cli.main(["review", "mkae"]) == 2
    assert "review make" in capsys.readouterr().err
