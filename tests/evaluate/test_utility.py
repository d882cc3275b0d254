from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate import utility
from sssd_hpc.evaluate.classify import Recipe, fit
from sssd_hpc.evaluate.splits import Split, split
from sssd_hpc.evaluate.utility import Arm, Laboratory

StoreMaker = Callable[..., Store]


@pytest.fixture
def arm(make_store: StoreMaker) -> Arm:
    store = make_store("real", num_records=60)
    return Arm("real", split(store, ["NORM"], "training"), split(store, ["NORM"], "validation"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the classifiers that were trained."""
    seeds: list[int] = []

    def counted(*arguments: object, seed: int, **options: object) -> object:
        seeds.append(seed)
        return fit(*arguments, seed=seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(utility, "fit", counted)
    return seeds


def test_remembered_scores_are_those_of_the_classifier(
    arm: Arm, tiny: Recipe, tmp_path: Path, trained: list[int]
) -> None:
    asked = [arm.validation, arm.training]
    fresh = Laboratory(tiny, (0, 3)).scores(arm, asked)
    first = Laboratory(tiny, (0, 3), tmp_path / "cache").scores(arm, asked)
    assert trained == [0, 3, 0, 3]
    again = Laboratory(tiny, (0, 3), tmp_path / "cache").scores(arm, asked[::-1])
    assert trained == [0, 3, 0, 3]
    for seed in range(2):
        for place in range(2):
            assert np.array_equal(fresh[seed][place], first[seed][place])
            assert np.array_equal(fresh[seed][place], again[seed][1 - place])


def test_a_new_test_set_joins_what_is_remembered(
    arm: Arm, tiny: Recipe, tmp_path: Path, trained: list[int]
) -> None:
    for splits in ([arm.validation], [arm.training], [arm.validation, arm.training]):
        Laboratory(tiny, (0,), tmp_path / "cache").scores(arm, splits)
    assert trained == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_classifier_is_trained_once_for_scores_and_features(
    arm: Arm, tiny: Recipe, tmp_path: Path, trained: list[int]
) -> None:
    nothing = Split(((arm.training.parts[0][0], np.zeros(0, dtype=np.int64)),), np.zeros((0, 1)))
    laboratory = Laboratory(tiny, (0, 1), tmp_path / "cache")
    laboratory.scores(arm, [arm.validation])
    values, empty = laboratory.features(arm, [arm.validation, nothing])
    assert trained == [0, 1]
    assert values.shape == (len(arm.validation), 128)
    assert empty.shape == (0, 128)
    (again,) = Laboratory(tiny, (0,), tmp_path / "cache").features(arm, [arm.validation])
    assert trained == [0, 1]
    assert np.array_equal(values, again)


def test_other_records_labels_recipes_or_seeds_are_other_classifiers(
    arm: Arm, make_store: StoreMaker, tiny: Recipe, tmp_path: Path, trained: list[int]
) -> None:
    other = make_store("other", num_records=60, seed=1)
    flipped = Split(arm.training.parts, 1 - arm.training.labels)
    for training in (arm.training, split(other, ["NORM"], "training"), flipped):
        one = Arm("x", training, arm.validation)
        Laboratory(tiny, (0,), tmp_path / "cache").scores(one, [arm.validation])
    Laboratory(tiny, (1,), tmp_path / "cache").scores(arm, [arm.validation])
    Laboratory(Recipe(epochs=1, num_blocks=(1,), width=8), (0,), tmp_path / "cache").scores(
        arm, [arm.validation]
    )
    assert len(trained) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_what_other_code_said_is_not_remembered(
    arm: Arm, tiny: Recipe, tmp_path: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (utility._code(), ("another", "hash")):
        monkeypatch.setattr(utility, "_code", lambda code=code: code)
        Laboratory(tiny, (0,), tmp_path / "cache").scores(arm, [arm.validation])
    assert trained == [0, 0]


def test_a_cut_file_is_no_memory(
    arm: Arm, tiny: Recipe, tmp_path: Path, trained: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    whole = Laboratory(tiny, (0,), tmp_path / "cache").scores(arm, [arm.validation])
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = Laboratory(tiny, (0,), tmp_path / "cache").scores(arm, [arm.validation])
    assert trained == [0, 0]
    assert np.array_equal(whole[0][0], again[0][0])
    assert "damaged and made again" in caplog.text


def test_splits_add_and_keep_their_positives(make_store: StoreMaker) -> None:
    one, two = make_store("one", num_records=40), make_store("two", num_records=40, seed=1)
    both = split(one, ["NORM"], "training") + split(two, ["NORM"], "training").positives()
    rows = two.indices(range(1, 9))
    carriers = rows[two.labels[rows, 1] == 1]
    assert len(both) == 32 + len(carriers)
    assert both.labels[32:].all()
    signals = both.signals_mv()
    assert np.array_equal(signals[32:], two.signals[carriers] / np.float32(1000))
    assert np.array_equal(both.ecg_id[32:], two.ecg_id[carriers])
    assert both.positives().labels.all()
    assert both.digest != split(one, ["NORM"], "training").digest
