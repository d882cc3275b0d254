from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import figures, page, paper, report
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.evaluate.protocols import evaluate
from sssd_hpc.evaluate.summary import beyond_floor, summary


def _metric(value: float | None, reason: str | None = None) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "reason": reason}
    return {"value": value, "low": value - 0.1, "high": value + 0.05, "reason": None}


def _row(trained: str, tested: str, value: float | None, reason: str | None) -> dict[str, Any]:
    return {
        "trained_on": trained,
        "tested_on": tested,
        "num_training": 353,
        "num_validation": 81,
        "num_test": 66,
        "num_test_positive": 36,
        "thresholds": [] if value is None else [0.4],
        "reason": reason,
        "metrics": {name: _metric(value, reason) for name in page.COLUMNS},
        "test": {
            "ecg_id": [1, 2, 3, 4] if value else [],
            "label": [0, 1, 0, 1] if value else [],
            "scores": [[0.1, 0.6, 0.7, 0.9]] if value else [],
        },
    }


def _measure(title: str, value: float, floor: float, better: str = "lower") -> dict[str, Any]:
    return {
        "title": title,
        "unit": "mV",
        "better": better,
        "value": value,
        "low": value - 0.05,
        "high": value + 0.05,
        "floor": floor,
        "floor_low": floor - 0.05,
        "floor_high": floor + 0.05,
        "reason": "",
        "interval": "least to greatest of 5 repeats",
    }


def _quantity(title: str, unit: str, median: float | None, mean: float | None) -> dict[str, Any]:
    quartiles = [None] * 3 if median is None else [median - 9, median, median + 9]
    return {"title": title, "unit": unit, "records": 57, "mean": mean, "quartiles": quartiles}


def _effect(label: str, title: str, real: tuple[float, float, float]) -> dict[str, Any]:
    sides = {
        side: dict(zip(("value", "low", "high"), values, strict=True))
        for side, values in (("real", real), ("synthetic", (3.0, 1.0, 5.0)))
    }
    return {"label": label, "title": title, "unit": "1/min", "num_real": 40, **sides} | {
        "num_synthetic": 38
    }


@pytest.fixture
def sample() -> dict[str, Any]:
    """A report of two computed protocols and a third that could not be."""
    side = {
        "name": "store",
        "manifest_sha256": "ab" * 32,
        "num_records": 500,
        "rate_hz": 100,
        "length": 1000,
        "splits": {
            name: {"records": n, "positive": n // 2}
            for name, n in (("training", 353), ("validation", 81), ("test", 66))
        },
    }
    return {
        "format": 2,
        "protocol": "utility",
        "label": "NORM",
        "label_choice": "the default",
        "seed": 0,
        "seeds": [0],
        "recipe": {
            "epochs": 15,
            "batch_size": 32,
            "learning_rate": 0.01,
            "weight_decay": 0.01,
            "crop_s": 2.5,
        },
        "sides": {"real": side, "synthetic": {**side, "name": "synthetic"}},
        "checks": [{"name": "a check", "ok": True, "detail": "fine"}],
        "paper": {"TSTR": {"g_mean": 0.922, "f1": 0.709}},
        "protocols": {
            "TRTR": _row("real", "real", 0.8, None),
            "TSTR": _row("synthetic", "real", 0.58, None),
            "TRTS": _row("real", "synthetic", None, "synthetic fold 10 has 0 records"),
        },
        "trtr_minus_tstr": {"roc_auc": {"value": 0.22, "low": 0.11, "high": 0.33, "reason": None}},
        "fidelity": {
            "Features": {
                "frechet": _measure("Frechet distance", 20.0, 9.0),
                "recall": _measure("recall", 0.4, 0.9, better="higher"),
            },
            "Signals": {
                "mmd": _measure("discrepancy", 0.1, 0.1),
                "none": {**_measure("undefined one", 0, 0), "value": None, "reason": "n is 1"},
            },
        },
        "physiology": {
            side: {
                "records": 60,
                "failed": failed,
                "reasons": {"a flat lead": failed},
                "quantities": {
                    "heart_rate": _quantity("heart rate", "1/min", rate, 57.0),
                    "p_wave": _quantity("records with P waves", "share", 1.0, 0.876),
                    "pr": _quantity("PR interval", "ms", None, None),
                },
            }
            for side, failed, rate in (("real", 0, 71.0), ("synthetic", 3, 42.0))
        },
        "label_effects": [
            _effect("AFIB", "heart rate", (12.0, 8.0, 16.0)),
            _effect("PVC", "PR interval", (1.0, -4.0, 6.0)),
        ],
        "privacy": {
            "measures": {
                "membership": {
                    "title": "Membership inference",
                    "value": 0.52,
                    "low": 0.47,
                    "high": 0.57,
                    "ideal": 0.5,
                    "reason": "",
                    "exposed": False,
                },
                "copies": {
                    "title": "Copies",
                    "value": None,
                    "low": None,
                    "high": None,
                    "ideal": None,
                    "reason": "3 heldout records",
                    "exposed": False,
                },
            },
            "pairs": [
                {
                    "synthetic": 17,
                    "training": 4,
                    "similarity": 0.7,
                    "shift_s": -0.4,
                    "gain": 1.2,
                    "copy": False,
                }
            ],
            "recall": 0.97,
            "num_planted": 100,
        },
        "versions": {"python": "3.11"},
        "seconds": 12.5,
    }


PICTURES = dict.fromkeys(page.CAPTIONS, b"png")


def test_the_terminal_table_is_aligned_and_explains_what_is_missing(sample: dict[str, Any]) -> None:
    lines = report.table(sample).splitlines()
    assert lines[0].startswith("Label NORM")
    assert lines[3].split()[:4] == ["TRTR", "66", "(36)", "0.80"]
    assert "0.58 (0.48-0.63)" in lines[4]
    assert lines[5].count("n/a") == 5
    assert lines[6] == "TRTS: synthetic fold 10 has 0 records"
    column = lines[1].index("ROC-AUC")
    assert lines[3][column:].startswith("0.80 (")
    assert lines[4][column:].startswith("0.58 (")
    assert max(map(len, lines)) <= 80


def test_the_summary_says_in_words_what_the_numbers_say(sample: dict[str, Any]) -> None:
    first, second, third, last, *_ = summary(sample)
    assert "ROC-AUC 0.80" in first
    assert "guessing" not in first
    assert second.endswith("cannot be told from guessing.")
    assert third.startswith("TRTS could not be computed: synthetic fold 10")
    assert "costs 0.22 of ROC-AUC; the 95 % interval of the cost is 0.11 to 0.33." in last
    gap = sample["trtr_minus_tstr"]["roc_auc"]
    gap.update(value=-0.03, low=-0.1, high=0.04)
    text = summary(sample)[3]
    assert "costs no ROC-AUC (0.03 more)" in text
    assert text.endswith("-0.10 to 0.04, which cannot be told from none.")
    gap.update(_metric(None, "no scores"))
    assert not any("Replacing" in line for line in summary(sample))


def test_the_summary_counts_measures_beyond_their_floor_and_tells_of_privacy(
    sample: dict[str, Any],
) -> None:
    fidelity, privacy = summary(sample)[-2:]
    assert fidelity.startswith("2 of 3 measures of fidelity")
    assert fidelity.endswith("farthest: Frechet distance; recall.")
    assert privacy == "None of 1 measures of privacy tells training records from unseen ones."
    sample["privacy"]["measures"]["membership"]["exposed"] = True
    sample["privacy"]["pairs"][0]["copy"] = True
    sample["privacy"]["pairs"].append({**sample["privacy"]["pairs"][0], "copy": False})
    privacy = summary(sample)[-1]
    assert privacy.startswith("Training records show through: Membership inference; 1 synthetic")
    for group in sample["fidelity"].values():
        for row in group.values():
            row["value"] = None
    assert "too few records" in summary(sample)[-2]


@pytest.mark.parametrize(
    ("better", "value", "beyond"),
    [("lower", 0.5, True), ("lower", 0.19, False), ("higher", 0.5, False), ("higher", -0.5, True)],
)
def test_a_measure_differs_when_its_whole_interval_is_worse(
    better: str, value: float, beyond: bool
) -> None:
    assert beyond_floor(_measure("m", value, 0.1, better=better)) is beyond
    assert not beyond_floor({**_measure("m", value, 0.1, better=better), "floor": None})


def test_the_page_tells_of_measures_labels_and_privacy(sample: dict[str, Any]) -> None:
    text = page.report_page(sample, PICTURES)
    assert text.count("<b class=bad>differs</b>") == 2
    assert "n/a: n is 1" in text
    assert "synthetic: 3 of 60 (a flat lead: 3)" in text
    assert "AFIB" in text
    assert "PVC" not in text.partition("What labels do")[2]
    assert "finds 97% of 100 copies" in text
    assert "-0.40 s" in text
    assert "<b>71</b><small>62 to 80</small>" in text
    assert "<b>42</b><small>33 to 51</small>" in text
    assert text.count("<b>0.876</b><small>57 records") == 2
    assert text.count("<b>n/a</b><small>57 records") == 2


def test_the_page_warns_of_small_samples_and_of_allowed_leakage(sample: dict[str, Any]) -> None:
    text = page.report_page(sample, PICTURES)
    assert "This is a small sample" in text
    assert "Leakage was allowed" not in text
    sample["checks"].append({"name": "copies", "ok": False, "detail": "3 copies"})
    for row in sample["protocols"].values():
        row["num_test"] = 2198
    text = page.report_page(sample, PICTURES)
    assert "This is a small sample" not in text
    assert "Leakage was allowed; scores are too good.</b> 3 copies" in text


def test_the_papers_figures_stand_beside_those_of_its_labels(sample: dict[str, Any]) -> None:
    text = page.report_page(sample, PICTURES)
    assert text.count("<small>paper ") == 2
    assert "paper 0.922" in text
    assert "Table I: other records" in text
    sample["paper"] = paper.of_label("NORM")
    assert "The paper has no figures of NORM alone" in page.report_page(sample, PICTURES)
    assert paper.of_label("AFIB") == {
        "TRTR": {"g_mean": 0.950, "f1": 0.744},
        "TSTR": {"g_mean": 0.922, "f1": 0.709},
        "TRTS": {"g_mean": 0.985, "f1": 0.858},
    }


def test_hostile_names_reach_the_page_as_text(sample: dict[str, Any]) -> None:
    attack = "<script>alert(1)</script>\"'{x}"
    sample["label"] = sample["label_choice"] = attack
    sample["sides"]["real"]["name"] = sample["checks"][0]["detail"] = attack
    sample["checks"][0]["name"] = sample["versions"]["python"] = attack
    sample["protocols"]["TRTS"] = _row("real", "synthetic", None, attack)
    sample["fidelity"]["Signals"]["none"]["reason"] = attack
    sample["physiology"]["real"]["reasons"] = {attack: 1}
    sample["label_effects"][0]["label"] = attack
    sample["privacy"]["measures"]["copies"]["reason"] = attack
    text = page.report_page(sample, PICTURES)
    assert "<script" not in text
    assert text.count("alert(1)") >= 12


def test_a_label_of_dollar_signs_is_drawn_as_it_stands(sample: dict[str, Any]) -> None:
    for draw in (figures.roc, figures.score_histograms, figures.calibration):
        draw(sample["protocols"], r"A$\x$ and $").savefig(io.BytesIO())


def test_the_roc_curve_equals_scikit_learn_with_ties() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 200), generator.integers(0, 20, 200) / 20
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    found = figures.roc_points(labels, scores)
    np.testing.assert_allclose(found, (false, true))


def test_figures_are_drawn_when_protocols_are_missing(sample: dict[str, Any]) -> None:
    rows = sample["protocols"]
    curves = figures.roc(rows, "NORM").axes[0]
    texts = [text.get_text() for text in curves.get_legend().get_texts()]
    assert texts == ["chance", "TRTR: 0.80 (0.70 to 0.85)", "TSTR: 0.58 (0.48 to 0.63)"]
    panels = figures.score_histograms(rows, "NORM").axes
    assert [panel.get_title() for panel in panels if panel.get_visible()] == [
        "TRTR: tested on real",
        "TSTR: tested on real",
        "TRTS: tested on synthetic",
    ]
    assert [text.get_text() for text in panels[2].texts] == ["not computed"]


def test_spectra_peak_at_the_frequency_of_the_signal() -> None:
    t = np.arange(1000) / 100
    wave = np.broadcast_to(np.sin(2 * np.pi * 10 * t), (3, 12, 1000)).astype(np.float32)
    figure = figures.spectra({"real": wave, "synthetic": 2 * wave}, 100)
    assert len(figure.axes) == 4
    for line in figure.axes[0].lines:
        hertz, power = line.get_data()
        assert hertz[np.argmax(power)] == pytest.approx(10)
    powers = [line.get_data()[1].max() for line in figure.axes[0].lines]
    assert powers[1] == pytest.approx(4 * powers[0], rel=1e-4)


def test_amplitude_densities_integrate_to_the_share_inside_the_panel() -> None:
    signals = np.random.default_rng(0).normal(0, 0.3, (4, 12, 500)).astype(np.float32)
    (patch,) = figures.amplitudes({"real": signals}).axes[0].patches
    data = patch.get_data()
    assert np.nansum(data.values) * (data.edges[1] - data.edges[0]) == pytest.approx(1)


def test_the_report_lies_in_its_folder_and_names_no_path_of_the_machine(
    make_store: Callable[..., Store], tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real", num_records=60), make_store("s", num_records=60, seed=1)
    out = tmp_path / "out"
    report = evaluate(real, synthetic, out, recipe=tiny, epochs=1)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["cache", "figures", "report.html", "report.json"]
    names = sorted(path.name for path in (out / "figures").iterdir())
    assert names == sorted(f"{name}.png" for name in page.CAPTIONS)
    assert json.loads((out / "report.json").read_text()) == report
    text = (out / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(page.CAPTIONS)
    # Nothing is fetched: every source is embedded and no style or script comes from elsewhere.
    assert set(re.findall(r'(?:src|href)="([^:"]*:?)', text)) == {"data:"}
    assert "http" not in text
    for each in ((out / "report.json").read_text(), text):
        assert str(tmp_path) not in each


def test_a_table_of_hostile_labels_is_text(sample: dict[str, Any]) -> None:
    attack = "<script>alert(1)</script>"
    row = {**_row("real", "real", None, attack), "labels": {}, "excluded": {attack: attack}}
    shown = {
        **sample,
        "protocol": "multilabel",
        "table": {
            "title": attack,
            "source": attack,
            "columns": ["f1"],
            "rows": {attack: {attack: row}},
            "paper": {},
            "notes": [attack],
        },
        "sides": {attack: {**sample["sides"]["real"], "name": attack}},
        "checks": [{"name": attack, "ok": False, "detail": attack}],
        "versions": {attack: attack},
    }
    text = page.table_page(shown, {})
    assert "<script" not in text
    assert text.count("alert(1)") >= 8


def _flat(store: Store) -> Store:
    return dataclasses.replace(store, signals=np.zeros_like(store.signals))


def _one_record(store: Store) -> Store:
    return dataclasses.replace(
        store,
        signals=store.signals[:1],
        labels=store.labels[:1],
        ecg_id=store.ecg_id[:1],
        patient_id=store.patient_id[:1],
        strat_fold=store.strat_fold[:1],
        scp_codes=store.scp_codes[:1],
        flags=store.flags[:1],
    )


@pytest.mark.parametrize("spoil", [_flat, _one_record])
def test_a_set_that_says_nothing_makes_a_whole_report(
    spoil: Callable[[Store], Store],
    make_store: Callable[..., Store],
    tmp_path: Path,
    tiny: Recipe,
) -> None:
    real, synthetic = make_store("real", num_records=60), make_store("s", num_records=60, seed=1)
    report = evaluate(real, spoil(synthetic), tmp_path / "out", recipe=tiny, epochs=1)
    assert report["protocols"]["TRTS"]["metrics"]["roc_auc"]["value"] is None
    assert report["physiology"]["synthetic"]["failed"] == spoil(synthetic).num_records
    assert report["summary"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "could not be computed" in text


def test_a_real_set_without_training_records_is_refused_by_name(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    real = make_store("real", num_records=20, folds=(9, 10))
    with pytest.raises(UserError, match=r"real has 0 record.* in folds 1-8"):
        evaluate(real, make_store("s", num_records=20, seed=1), tmp_path / "out")
