"""The search for copies against brute force, and on real records that are known to be twins."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg import simulate
from sssd_hpc.ecg.wfdb_io import read_record
from sssd_hpc.evaluate import copies


@pytest.fixture(scope="module")
def ready(simulated) -> copies.Prepared:
    return copies.prepare(simulated.signals_mv, 100)


def brute(first: np.ndarray, second: np.ndarray) -> tuple[float, int, float]:
    """Try every shift by whole samples, sample by sample."""
    length = first.shape[1]
    best = (-2.0, 0, 0.0)
    for shift in range(-(length // 2), length // 2 + 1):
        ours = first[:, max(shift, 0) : length + min(shift, 0)]
        theirs = second[:, max(-shift, 0) : length + min(-shift, 0)]
        product, energy = (ours * theirs).sum(), (theirs**2).sum()
        similarity = product / np.sqrt((ours**2).sum() * energy)
        best = max(best, (similarity, shift, product / energy))
    return best


def test_alignment_equals_brute_force_at_whole_samples(monkeypatch) -> None:
    monkeypatch.setattr(copies, "FINER", 1)
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(3, 2, 41))
    others = generator.normal(size=(3, 4, 2, 41))
    others[0, 0] = 0.5 * np.roll(queries[0], -7, axis=1)
    found, shift_s, gain = copies.aligned(queries, others)
    assert found.shape == (3, 4)
    for row in range(3):
        for column in range(4):
            expected = brute(queries[row], others[row, column])
            got = (
                found[row, column],
                round(shift_s[row, column] * copies.RATE_HZ),
                gain[row, column],
            )
            assert got == pytest.approx(expected, abs=1e-5)
    assert (round(shift_s[0, 0] * copies.RATE_HZ), gain[0, 0]) == (7, pytest.approx(2, rel=1e-4))


@pytest.mark.parametrize("shift", [-1.0, -0.13, 0.0, 0.01, 0.5, 2.03, 5.0])
def test_a_shifted_and_scaled_copy_is_found_with_shift_and_gain(
    simulated, ready, shift: float
) -> None:
    rows = np.arange(0, 120, 6)
    moved = 1.7 * np.roll(simulated.signals_mv[rows], round(100 * shift), axis=2) + 0.3
    matches = copies.search(copies.prepare(moved, 100), ready)
    np.testing.assert_array_equal(matches.row, rows)
    assert matches.similarity.min() > 0.98
    # Half a record's shift is the same either way.
    assert np.abs(np.abs(matches.shift_s) - abs(shift)).max() < 0.011
    np.testing.assert_allclose(matches.gain, 1.7, rtol=0.05)
    assert (matches.second < matches.similarity).all()


def test_a_shift_between_samples_costs_little(ready) -> None:
    where = simulate.place(5, 0)
    high, _ = simulate.simulate_record(5, where)
    shifted = np.roll(high / 1000, 52, axis=1)[None, :, 2::5]
    matches = copies.search(copies.prepare(shifted, 100), ready)
    assert matches.row[0] == 0
    assert matches.similarity[0] > 0.98


def test_a_record_at_500_hz_matches_itself_at_100_hz(ready) -> None:
    high, _ = simulate.simulate_record(5, simulate.place(5, 3))
    matches = copies.search(copies.prepare(high[None] / 1000, 500), ready)
    assert matches.row[0] == 3
    assert matches.similarity[0] > 0.99
    assert matches.gain[0] == pytest.approx(1, abs=0.03)


def test_candidates_rarely_hide_the_most_similar_record(ready) -> None:
    queries, base = ready.take(np.arange(40)), ready.take(np.arange(40, 120))
    likely = copies.search(queries, base)
    every = copies.search(queries, base, candidates=80)
    assert (likely.similarity <= every.similarity + 1e-9).all()
    assert np.mean(every.similarity - likely.similarity) < 0.05


def test_exhaustive_search_equals_alignment_of_every_pair(ready) -> None:
    queries, base = ready.take(np.arange(5)), ready.take(np.arange(60, 80))
    every = copies.search(queries, base, candidates=20)
    found, _, _ = copies.aligned(
        queries.signals, np.broadcast_to(base.signals, (5, *base.signals.shape))
    )
    np.testing.assert_array_equal(every.row, found.argmax(axis=1))
    np.testing.assert_allclose(every.similarity, found.max(axis=1))
    np.testing.assert_allclose(every.second, np.sort(found, axis=1)[:, -2])


def test_flat_records_are_like_nothing(ready) -> None:
    flat = copies.prepare(np.ones((2, 12, 1000), np.float32), 100)
    assert (copies.search(flat, ready).similarity == 0).all()
    assert (copies.search(ready.take(np.arange(3)), flat).similarity == 0).all()


def test_small_bases_and_no_queries() -> None:
    generator = np.random.default_rng(0)
    some = copies.prepare(generator.normal(size=(2, 12, 400)), 100)
    one = copies.search(some, some.take(np.array([1])))
    np.testing.assert_array_equal(one.row, [0, 0])
    assert np.isnan(one.second).all()
    none = copies.prepare(np.zeros((0, 12, 400)), 100)
    assert len(copies.search(none, some).similarity) == 0
    with pytest.raises(ValueError, match="no record"):
        copies.search(some, none)


def test_the_twins_among_real_records_are_found_and_no_others(ptbxl_root: Path) -> None:
    with open(ptbxl_root / "ptbxl_database.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    ids = np.array([int(row["ecg_id"]) for row in rows])
    signals = np.stack([read_record(ptbxl_root, row["filename_lr"]).adc / 1000 for row in rows])
    ready = copies.prepare(signals, 100)
    pairs = set()
    for row in (137, 143, 145, 456, 459, 28, 100, 200):
        here = np.flatnonzero(ids == row)
        others = np.flatnonzero(ids != row)
        matches = copies.search(ready.take(here), ready.take(others))
        if matches.similarity[0] > 0.9:
            pairs.add((row, int(ids[others[matches.row[0]]])))
    assert pairs == {(137, 138), (143, 144), (145, 463), (456, 457), (459, 460)}
