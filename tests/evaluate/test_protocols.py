from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import metrics, protocols
from sssd_hpc.evaluate.classify import Classifier, Recipe
from sssd_hpc.evaluate.inspection import Inspection
from sssd_hpc.evaluate.protocols import evaluate, open_store_or_root

StoreMaker = Callable[..., Store]


@pytest.fixture(autouse=True)
def _without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw, measure and write nothing: these tests look at the classifiers' numbers."""
    monkeypatch.setattr(protocols, "inspect", lambda *a, **k: Inspection({}, {}))
    monkeypatch.setattr(protocols, "summary", lambda report: [])
    monkeypatch.setattr(protocols.report, "write", lambda *arguments: None)


def _auc(report: dict[str, Any]) -> dict[str, float | None]:
    return {name: row["metrics"]["roc_auc"]["value"] for name, row in report["protocols"].items()}


def _relabelled(store: Store, labels: np.ndarray) -> Store:
    return dataclasses.replace(store, labels=labels.astype(np.uint8))


def test_a_planted_sign_is_found_on_both_sides(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real"), make_store("synthetic", seed=1)
    report = evaluate(real, synthetic, tmp_path / "out", recipe=tiny)
    assert report["label"] == "NORM"
    assert all(value > 0.95 for value in _auc(report).values())
    for row in report["protocols"].values():
        assert 0 < row["thresholds"][0] < 1
        assert row["metrics"]["g_mean"]["value"] > 0.8
    assert report["protocols"]["TSTR"]["num_test"] == 20


def test_a_synthetic_set_with_swapped_labels_is_exposed(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real"), make_store("synthetic", seed=1)
    swapped = _relabelled(synthetic, 1 - synthetic.labels)
    auc = _auc(evaluate(real, swapped, tmp_path / "out", recipe=tiny))
    assert auc["TRTR"] > 0.95
    assert auc["TSTR"] < 0.05
    assert auc["TRTS"] < 0.05


def test_scores_of_the_report_reproduce_its_numbers(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synthetic = make_store("real", num_records=80), make_store("synthetic", seed=1)
    predict = Classifier.predict
    # An unsure classifier's scores lie close together; rounded, they would be ties.
    monkeypatch.setattr(Classifier, "predict", lambda self, x: 1e-7 * predict(self, x))
    report = evaluate(real, synthetic, tmp_path / "out", recipe=tiny, epochs=1)
    for row in report["protocols"].values():
        labels, scores = np.array(row["test"]["label"]), np.array(row["test"]["scores"][0])
        values = {name: metric["value"] for name, metric in row["metrics"].items()}
        for name, metric in metrics.METRICS.items():
            assert values[name] == metric(labels, scores, row["thresholds"][0]), name
    auc, gap = _auc(report), report["trtr_minus_tstr"]["roc_auc"]
    assert gap["value"] == pytest.approx(auc["TRTR"] - auc["TSTR"])


def test_identical_sets_score_alike_and_every_copy_is_counted(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real = make_store("real", num_records=60)
    with pytest.raises(UserError, match=r"60 synthetic record.* copy a real one"):
        evaluate(real, real, tmp_path / "out", recipe=tiny)
    report = evaluate(real, real, tmp_path / "out", recipe=tiny, epochs=2, allow_leakage=True)
    rows = report["protocols"]
    assert rows["TRTR"]["metrics"] == rows["TSTR"]["metrics"] == rows["TRTS"]["metrics"]
    assert report["trtr_minus_tstr"]["roc_auc"]["value"] == 0


def test_a_set_collapsed_to_its_mean_teaches_nothing(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real"), make_store("synthetic", seed=1)
    mean = np.broadcast_to(synthetic.signals.mean(0).round(), synthetic.signals.shape)
    collapsed = dataclasses.replace(synthetic, signals=mean.astype(np.int16))
    report = evaluate(real, collapsed, tmp_path / "out", recipe=tiny, allow_leakage=True)
    rows = report["protocols"]
    assert rows["TRTR"]["metrics"]["roc_auc"]["value"] > 0.95
    assert rows["TRTS"]["metrics"]["roc_auc"]["value"] is None
    assert "the same score" in rows["TRTS"]["metrics"]["roc_auc"]["reason"]
    # Any threshold calls every collapsed record alike.
    assert "the same score" in rows["TSTR"]["metrics"]["g_mean"]["reason"]


def test_labels_that_say_nothing_score_near_one_half(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    sides = []
    for seed, name in enumerate(("real", "synthetic")):
        store = make_store(name, num_records=800, seed=seed)
        shuffled = np.random.default_rng(seed).permutation(store.labels)
        sides.append(_relabelled(store, shuffled))
    report = evaluate(sides[0], sides[1], tmp_path / "out", recipe=tiny, epochs=1)
    # 80 test records: the standard error is 0.065.
    assert all(0.3 < value < 0.7 for value in _auc(report).values())
    for row in report["protocols"].values():
        assert row["metrics"]["roc_auc"]["low"] < 0.5 < row["metrics"]["roc_auc"]["high"]


def test_the_same_seed_gives_the_same_report(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real", num_records=60), make_store("synthetic", num_records=60)
    synthetic = dataclasses.replace(synthetic, signals=synthetic.signals // 2)
    reports = [
        evaluate(real, synthetic, tmp_path / "out", recipe=tiny, epochs=1, seed=seed)
        for seed in (4, 4, 5)
    ]
    assert reports[0]["protocols"] == reports[1]["protocols"]
    assert reports[0]["protocols"] != reports[2]["protocols"]
    assert reports[0]["recipe"]["epochs"] == 1


def test_test_records_change_neither_threshold_nor_classifier(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real", num_records=80), make_store("synthetic", num_records=80)
    synthetic = dataclasses.replace(synthetic, signals=synthetic.signals // 2)
    test = real.indices([10])
    signals, labels = np.array(real.signals), np.array(real.labels)
    signals[test] *= 5
    labels[test] = 1 - labels[test]
    other = dataclasses.replace(_relabelled(real, labels), signals=signals)
    rows = [
        evaluate(store, synthetic, tmp_path / "out", recipe=tiny, epochs=2)["protocols"]
        for store in (real, other)
    ]
    assert rows[0]["TRTR"]["test"]["scores"] != rows[1]["TRTR"]["test"]["scores"]
    assert rows[0]["TRTR"]["thresholds"] == rows[1]["TRTR"]["thresholds"]
    assert rows[0]["TRTS"] == rows[1]["TRTS"]


def test_threshold_and_training_come_from_the_same_side(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real", num_records=80), make_store("synthetic", num_records=80)
    synthetic = dataclasses.replace(synthetic, signals=synthetic.signals // 2)
    rows = evaluate(real, synthetic, tmp_path / "out", recipe=tiny, epochs=2)["protocols"]
    assert rows["TRTR"]["thresholds"] == rows["TRTS"]["thresholds"] != rows["TSTR"]["thresholds"]


def test_a_synthetic_set_of_folds_1_to_8_gives_roc_auc_of_tstr_alone(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real = make_store("real", num_records=80)
    synthetic = make_store("synthetic", num_records=80, seed=1, folds=tuple(range(1, 9)))
    rows = evaluate(real, synthetic, tmp_path / "out", recipe=tiny, epochs=2)["protocols"]
    assert rows["TSTR"]["metrics"]["roc_auc"]["value"] is not None
    assert rows["TSTR"]["thresholds"] == [None]
    assert rows["TSTR"]["metrics"]["g_mean"]["value"] is None
    assert "synthetic fold 9" in rows["TSTR"]["metrics"]["g_mean"]["reason"]
    assert "synthetic fold 10" in rows["TRTS"]["reason"]
    assert "sample with --folds 1-10" in rows["TRTS"]["reason"]
    assert {metric["value"] for metric in rows["TRTS"]["metrics"].values()} == {None}
    assert rows["TRTR"]["reason"] is None


@pytest.mark.parametrize("positives", [0, 1])
@pytest.mark.parametrize("fold", [1, 9, 10])
def test_too_few_positives_in_a_split_are_nan_with_a_reason(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe, positives: int, fold: int
) -> None:
    real, synthetic = (
        make_store("real", num_records=60),
        make_store("synthetic", num_records=60, seed=1),
    )
    labels = np.array(real.labels)
    rows = real.indices(range(1, 9) if fold == 1 else [fold])
    labels[rows, 1] = 0
    labels[rows[:positives], 1] = 1
    changed = _relabelled(real, labels)
    report = evaluate(changed, synthetic, tmp_path / "out", recipe=tiny, epochs=1)
    trtr = report["protocols"]["TRTR"]
    metric = "g_mean" if fold == 9 else "roc_auc"
    assert trtr["metrics"][metric]["value"] is None
    assert f"{positives} positive" in trtr["metrics"][metric]["reason"]
    tstr = report["protocols"]["TSTR"]["metrics"]["roc_auc"]["value"]
    assert (tstr is None) == (fold == 10)


def test_the_label_asked_for_is_used_and_an_unknown_one_is_refused(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe
) -> None:
    real, synthetic = make_store("real", num_records=60), make_store("s", num_records=60, seed=1)
    report = evaluate(real, synthetic, tmp_path / "out", label="MI", recipe=tiny, epochs=1)
    assert report["label"] == "MI"
    with pytest.raises(UserError, match="'NROM' is not in real; close ones: NORM"):
        evaluate(real, synthetic, tmp_path / "out", label="NROM")


def test_without_norm_the_label_nearest_to_balance_is_taken_and_said(
    make_store: StoreMaker, tmp_path: Path, tiny: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("AFIB", "MI", "PVC")
    stores = [
        make_store(name, num_records=60, seed=seed, label_names=names)
        for seed, name in enumerate(("real", "synthetic"))
    ]
    labels = np.zeros_like(stores[0].labels)
    labels[::10, 0], labels[::2, 1], labels[:, 2] = 1, 1, 1
    labels[5::20, 1] = 1
    real = _relabelled(stores[0], labels)
    with caplog.at_level("INFO"):
        report = evaluate(real, stores[1], tmp_path / "out", recipe=tiny, epochs=1)
    assert report["label"] == "MI"
    assert "no NORM" in report["label_choice"]
    assert "label MI: nearest to balance" in caplog.text


def test_no_epoch_at_all_is_refused(make_store: StoreMaker, tmp_path: Path) -> None:
    real, synthetic = make_store("real", num_records=20), make_store("s", num_records=20, seed=1)
    with pytest.raises(UserError, match="epochs is 0"):
        evaluate(real, synthetic, tmp_path / "out", epochs=0)


@pytest.mark.parametrize(("option", "value"), [("seed", -1), ("seeds", 0)])
def test_impossible_seeds_are_refused_before_any_work(
    make_store: StoreMaker, tmp_path: Path, option: str, value: int
) -> None:
    real, synthetic = make_store("real", num_records=20), make_store("s", num_records=20, seed=1)
    with pytest.raises(UserError, match=f"{option} is {value}"):
        evaluate(real, synthetic, tmp_path / "out", **{option: value})


def test_a_root_is_prepared_like_the_real_store_and_only_once(tmp_path: Path) -> None:
    simulate(tmp_path / "root", num_records=20, seed=0)
    like = prepare(tmp_path / "root", tmp_path / "store", labels="rhythm")
    opened = open_store_or_root(tmp_path / "root", tmp_path / "out", like)
    assert opened.label_names == like.label_names
    assert np.array_equal(opened.signals, like.signals)
    stamp = (opened.path / "manifest.json").stat().st_mtime_ns
    again = open_store_or_root(tmp_path / "root", tmp_path / "out", like)
    assert (again.path / "manifest.json").stat().st_mtime_ns == stamp
    assert open_store_or_root(like.path, tmp_path / "out", like).path == like.path


def test_a_store_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    simulate(tmp_path / "root", num_records=12, seed=0)
    like = prepare(tmp_path / "root", tmp_path / "store")
    signals = bytearray((like.path / "signals.npy").read_bytes())
    signals[-1] ^= 1
    (like.path / "signals.npy").write_bytes(signals)
    with pytest.raises(UserError, match=r"signals\.npy is damaged"):
        open_store_or_root(like.path, tmp_path / "out", like)


def test_a_root_made_anew_under_the_same_name_is_prepared_anew(tmp_path: Path) -> None:
    opened = []
    for seed in (0, 1):
        root = tmp_path / str(seed) / "root"
        simulate(root, num_records=12, seed=seed)
        like = prepare(root, tmp_path / f"store{seed}")
        opened.append(open_store_or_root(root, tmp_path / "out", like))
    assert opened[0].path != opened[1].path
    assert not np.array_equal(opened[0].signals, opened[1].signals)


def test_a_root_is_known_by_its_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    simulate(root, num_records=12, seed=0)
    like = prepare(root, tmp_path / "store")
    first = open_store_or_root(root, tmp_path / "out", like).path
    record = next(root.rglob("*_lr.dat"))
    record.write_bytes(record.read_bytes())
    assert open_store_or_root(root, tmp_path / "out", like).path != first


def test_what_is_neither_store_nor_root_is_refused(make_store: StoreMaker, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is neither a store .* nor a WFDB root"):
        open_store_or_root(tmp_path / "empty", tmp_path / "out", make_store("real"))


def test_real_records_go_through_stores_and_protocols(
    ptbxl_root: Path, tmp_path: Path, tiny: Recipe
) -> None:
    real = prepare(ptbxl_root, tmp_path / "real")
    simulate(tmp_path / "root", num_records=100, seed=0)
    synthetic = open_store_or_root(tmp_path / "root", tmp_path / "out", real)
    report = evaluate(real, synthetic, tmp_path / "out", recipe=tiny, epochs=2)
    assert report["label"] == "NORM"
    assert all(check["ok"] for check in report["checks"])
    assert report["sides"]["real"]["splits"]["test"] == {"records": 66, "positive": 36}
    assert all(row["reason"] is None for row in report["protocols"].values())
    assert report["protocols"]["TRTR"]["metrics"]["roc_auc"]["value"] > 0.6
