from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import metrics, paper, report, tables, utility
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.evaluate.protocols import named_sets, tabulate
from sssd_hpc.evaluate.splits import split
from sssd_hpc.evaluate.utility import Arm, Cell, Laboratory

StoreMaker = Callable[..., Store]
LABELS = ("AFIB", "PVC")


@pytest.fixture
def real(make_store: StoreMaker) -> Store:
    return make_store("real", num_records=100, label_names=LABELS)


def _blind(store: Store) -> Store:
    """Return a set whose labels say nothing of its records."""
    shuffled = np.random.default_rng(0).permutation(store.labels)
    return dataclasses.replace(store, labels=shuffled)


def test_conditioning_tells_a_set_that_follows_its_labels_from_a_blind_one(
    real: Store, make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    good = make_store("good", num_records=100, seed=1, label_names=LABELS)
    blind = _blind(make_store("blind", num_records=100, seed=2, label_names=LABELS))
    sets = {"nle": good, "sssd_ecg": blind}
    result = tabulate("conditioning", real, sets, tmp_path, labels=["PVC"], seeds=2, recipe=tiny)
    rows = result["table"]["rows"]["PVC"]
    names = ["TRTR", "nle TSTR", "nle TRTS", "sssd_ecg TSTR", "sssd_ecg TRTS"]
    assert list(rows) == names
    auc = {name: row["metrics"]["roc_auc"]["value"] for name, row in rows.items()}
    assert min(auc["TRTR"], auc["nle TSTR"], auc["nle TRTS"]) > 0.95
    assert max(auc["sssd_ecg TSTR"], auc["sssd_ecg TRTS"]) < 0.9
    assert all(len(row["thresholds"]) == 2 for row in rows.values())
    assert result["table"]["paper"]["PVC"]["nle TSTR"] == {"g_mean": 0.850, "f1": 0.561}
    assert json.loads((tmp_path / "report.json").read_text())["table"] == result["table"]


def test_augmentation_adds_positives_alone(
    real: Store, make_store: StoreMaker, tmp_path: Path, tiny: Recipe, monkeypatch: Any
) -> None:
    synthetic = make_store("synthetic", num_records=100, seed=1, label_names=LABELS)
    trained: dict[str, Arm] = {}
    rows_of = tables.binary_rows

    def seen(cells: list[Cell], *arguments: Any, **options: Any) -> Any:
        trained.update({cell.name: cell.arm for cell in cells})
        return rows_of(cells, *arguments, **options)

    monkeypatch.setattr(tables, "binary_rows", seen)
    laboratory = Laboratory(dataclasses.replace(tiny, epochs=1), (0,))
    table = tables.augmentation(real, synthetic, ["PVC"], laboratory, seed=0)
    base = split(real, ["PVC"], "training")
    count = int(base.labels.sum())
    added = int(split(synthetic, ["PVC"], "training").labels.sum())
    for name, more in (("baseline", 0), ("double", count), ("synthetic", added)):
        assert len(trained[name].training) == len(base) + more
        assert trained[name].training.labels.sum() == count + more
        assert trained[name].validation.digest == split(real, ["PVC"], "validation").digest
        assert table["rows"]["PVC"][name]["num_test"] == 10
    doubled = trained["double"].training.signals_mv()[len(base) :]
    assert np.array_equal(doubled, base.positives().signals_mv())


def test_multilabel_means_equal_scikit_learn(
    real: Store, make_store: StoreMaker, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_store("other", num_records=100, seed=1, label_names=LABELS)
    laboratory = Laboratory(dataclasses.replace(tiny, epochs=2), (0, 1))
    table = tables.multilabel(real, other, LABELS, laboratory, seed=0)
    row = table["rows"]["all"]["TSTR"]
    arm = Arm("synthetic", split(other, LABELS, "training"), split(other, LABELS, "validation"))
    test = split(real, LABELS, "test")
    expected: dict[str, list[float]] = {"roc_auc": [], "f1": []}
    for on_validation, on_test in laboratory.scores(arm, [arm.validation, test]):
        thresholds = [
            metrics.choose_threshold(arm.validation.labels[:, k], on_validation[:, k])[0]
            for k in range(2)
        ]
        expected["roc_auc"].append(roc_auc_score(test.labels, on_test, average="macro"))
        called = on_test >= np.array(thresholds)
        expected["f1"].append(f1_score(test.labels, called, average="weighted"))
    for name, values in expected.items():
        metric = row["metrics"][name]
        assert metric["value"] == pytest.approx(np.mean(values))
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert set(row["labels"]) == set(LABELS)
    assert row["excluded"] == {}
    assert table["paper"]["all"]["TSTR"]["roc_auc"] == 0.820
    assert table["notes"] == ["The paper's figures are of 71 labels, these of 2."]
    assert "cannot be computed" not in caplog.text


def test_labels_that_are_too_rare_are_left_out_and_named(
    make_store: StoreMaker, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store("real", num_records=100, label_names=LABELS)
    labels = np.array(store.labels)
    labels[:, 0] = 0
    labels[store.indices([10])[0], 0] = 1
    rare = dataclasses.replace(store, labels=labels)
    laboratory = Laboratory(dataclasses.replace(tiny, epochs=1), (0,))
    rows = tables.multilabel(rare, rare, LABELS, laboratory, seed=0)["rows"]["all"]
    assert set(rows["TRTR"]["labels"]) == {"PVC"}
    assert "0 positive" in rows["TRTR"]["excluded"]["AFIB"]
    none = dataclasses.replace(store, labels=np.zeros_like(labels))
    rows = tables.multilabel(none, none, LABELS, laboratory, seed=0)["rows"]["all"]
    assert rows["TRTR"]["metrics"]["f1"]["value"] is None
    assert "no label can be scored" in rows["TRTR"]["metrics"]["f1"]["reason"]


def test_a_set_of_training_folds_alone_has_no_trts(
    real: Store, make_store: StoreMaker, tiny: Recipe
) -> None:
    folds = tuple(range(1, 9))
    partial = make_store("part", num_records=100, seed=1, folds=folds, label_names=LABELS)
    laboratory = Laboratory(dataclasses.replace(tiny, epochs=1), (0,))
    rows = tables.multilabel(real, partial, LABELS, laboratory, seed=0)["rows"]["all"]
    assert "--folds 1-10" in rows["TRTS"]["metrics"]["f1"]["reason"]
    assert rows["TRTR"]["metrics"]["f1"]["value"] is not None
    # Thresholds come from the training side, which has no fold 9 here.
    assert "fold 9" in rows["TSTR"]["metrics"]["f1"]["reason"]


def test_a_draw_without_a_label_is_a_mean_over_the_others() -> None:
    values = np.array([[0.2, math.nan], [0.6, 0.5]])
    mean = utility._mean(values, np.array([1.0, 3.0]))
    assert mean == pytest.approx([0.5, 0.5])
    assert math.isnan(utility._mean(np.full((2, 1), math.nan), np.ones(2))[0])


def test_the_table_stands_beside_the_papers_on_terminal_and_page(
    real: Store, make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    other = make_store("other<b>", num_records=100, seed=1, label_names=LABELS)
    result = tabulate("augmentation", real, {"synthetic": other}, tmp_path, epochs=1, recipe=tiny)
    assert result["labels"] == ["AFIB", "PVC"]
    text = report.table(result)
    assert "[paper, Table III]" in text.splitlines()[0]
    assert "[0.97]" in text
    page = (tmp_path / "report.html").read_text()
    assert "0.971" in page
    assert "other&lt;b&gt;" in page
    assert "other<b>" not in page


def test_the_papers_labels_are_the_default_and_others_are_refused(
    make_store: StoreMaker, tmp_path: Path
) -> None:
    store = make_store("real", num_records=20)
    with pytest.raises(UserError, match="none of the paper's labels AFIB"):
        tabulate("conditioning", store, {}, tmp_path)
    with pytest.raises(UserError, match="'AVB' is not in real"):
        tabulate("conditioning", store, {}, tmp_path, labels=["AVB"])
    with pytest.raises(UserError, match="names 0 sets; augmentation takes one"):
        tabulate("augmentation", store, {}, tmp_path, labels=["MI"])


def test_sets_are_named_or_alone(tmp_path: Path) -> None:
    assert named_sets(["a"]) == {"synthetic": Path("a")}
    assert named_sets(["nle=x/y", "old=z=1"]) == {"nle": Path("x/y"), "old": Path("z=1")}
    (tmp_path / "k=v").mkdir()
    assert named_sets([str(tmp_path / "k=v")]) == {"synthetic": tmp_path / "k=v"}
    for wrong in (["a", "b"], ["x=1", "x=2"], ["real=a"], ["<b>=a"], ["=a"]):
        with pytest.raises(UserError, match="names are letters"):
            named_sets(wrong)


def test_the_papers_rows_name_the_same_labels() -> None:
    assert {tuple(row) for row in paper.TABLE_I.values()} == {("AFIB", "1AVB", "PVC", "CRBBB")}
    assert all(len(row) == 5 for row in paper.TABLE_III.values())


def test_augmentation_with_nothing_to_add_says_so(make_store: StoreMaker, tiny: Recipe) -> None:
    real = make_store("real", num_records=100, label_names=LABELS)
    without = dataclasses.replace(
        make_store("synthetic", num_records=100, seed=1, label_names=LABELS),
        labels=np.zeros_like(real.labels),
    )
    laboratory = Laboratory(dataclasses.replace(tiny, epochs=1), (0,))
    rows = tables.augmentation(real, without, LABELS[:1], laboratory, seed=0)["rows"][LABELS[0]]
    assert rows["synthetic"]["metrics"]["f1"]["value"] is None
    assert rows["synthetic"]["reason"] == f"synthetic folds 1-8 hold no {LABELS[0]} to add"
    assert rows["baseline"]["metrics"]["f1"]["value"] is not None
