"""Generators whose truth is known: the page says what results do, each is what it is called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import truth
from bench.scaling_page import between
from sssd_hpc.ecg.store import Store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    work: Path = tmp_path_factory.mktemp("truth")
    return truth.simulated(work, 40, 0), truth.simulated(work, 40, 1)


def test_the_page_is_what_the_results_say() -> None:
    results = json.loads((truth.RESULTS / "truth.json").read_text())
    text = truth.PAGE.read_text()
    assert between(text, truth.MARK, truth.section(results)) == text
    assert set(results["generators"]) == set(truth.GENERATORS)


def test_each_generator_is_what_it_is_called(stores: tuple[Store, Store]) -> None:
    real, fresh = stores
    made = {name: make(real, fresh) for name, make in truth.GENERATORS.items()}
    assert made["oracle"] is fresh
    assert np.array_equal(made["blind"].signals, fresh.signals)
    assert not np.array_equal(made["blind"].labels, fresh.labels)
    training = {record.tobytes() for record in real.signals[real.indices(range(1, 9))]}
    assert all(record.tobytes() in training for record in made["copies"].signals)
    assert not any(record.tobytes() in training for record in made["disguised"].signals)
    for row, record in enumerate(made["collapsed"].signals):
        same = (fresh.labels == fresh.labels[row]).all(axis=1)
        assert np.abs(record - fresh.signals[same].mean(axis=0)).max() <= 0.5
