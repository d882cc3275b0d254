from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.classify import Recipe, fit, window_starts
from sssd_hpc.evaluate.metrics import roc_auc


def _planted(num_records: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (num_records, 1))
    signals = generator.normal(0, 0.1, (num_records, 12, 400)).astype(np.float32)
    signals[labels[:, 0] == 1] += 0.3 * np.sin(np.arange(400) / 3).astype(np.float32)
    return signals, labels


def test_a_planted_wave_is_learned_and_shuffled_labels_are_not(tiny: Recipe) -> None:
    signals, labels = _planted()
    unseen, truth = _planted(seed=1)
    learned = fit(signals, labels, 100, recipe=tiny, seed=0).predict(unseen)
    assert learned.shape == truth.shape
    assert roc_auc(truth[:, 0], learned[:, 0]) > 0.97
    generator = np.random.default_rng(0)
    guessed = fit(signals, generator.permutation(labels), 100, recipe=tiny, seed=0).predict(unseen)
    assert 0.35 < roc_auc(generator.permutation(truth)[:, 0], guessed[:, 0]) < 0.65


def test_the_seed_alone_decides_the_classifier(tiny: Recipe) -> None:
    signals, labels = _planted(40)
    torch.manual_seed(1)
    one = fit(signals, labels, 100, recipe=tiny, seed=5).predict(signals)
    torch.manual_seed(2)
    again = fit(signals, labels, 100, recipe=tiny, seed=5).predict(signals)
    other = fit(signals, labels, 100, recipe=tiny, seed=6).predict(signals)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_the_callers_random_state_is_left_alone(tiny: Recipe) -> None:
    signals, labels = _planted(20)
    before = torch.random.get_rng_state()
    fit(signals, labels, 100, recipe=tiny, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_several_labels_are_scored_at_once(tiny: Recipe) -> None:
    signals, labels = _planted(40)
    scores = fit(signals, np.hstack([labels, 1 - labels, labels]), 100, recipe=tiny, seed=0)
    assert scores.predict(signals[:7]).shape == (7, 3)


def test_a_record_is_scored_alone_as_in_a_batch(tiny: Recipe) -> None:
    signals, labels = _planted(40)
    classifier = fit(signals, labels, 100, recipe=tiny, seed=0)
    together = classifier.predict(signals)
    alone = np.concatenate([classifier.predict(record[None]) for record in signals])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_scaling_comes_from_the_training_records(tiny: Recipe) -> None:
    signals, labels = _planted(20)
    classifier = fit(signals * 3 + 7, labels, 100, recipe=tiny, seed=0)
    assert classifier.mean_mv == pytest.approx((signals * 3 + 7).mean(dtype=np.float64))
    assert classifier.std_mv == pytest.approx((signals * 3 + 7).std(dtype=np.float64))


@pytest.mark.parametrize(
    ("length", "window"), [(1000, 250), (251, 250), (250, 250), (5, 2), (3, 3)]
)
def test_windows_cover_a_record_and_never_leave_it(length: int, window: int) -> None:
    starts = window_starts(length, window, window // 2)
    covered = {sample for start in starts for sample in range(start, start + window)}
    assert covered == set(range(length))
    assert len(set(starts)) == len(starts)


def test_a_ten_second_record_has_seven_windows_or_four_apart() -> None:
    assert window_starts(1000, 250, 125) == [0, 125, 250, 375, 500, 625, 750]
    assert window_starts(1000, 250, 250) == [0, 250, 500, 750]


def test_a_record_shorter_than_a_crop_is_one_window(tiny: Recipe) -> None:
    signals, labels = _planted(20)
    classifier = fit(signals[..., :90], labels, 100, recipe=tiny, seed=0)
    assert classifier.window == 90
    assert np.isfinite(classifier.predict(signals[..., :90])).all()


@pytest.mark.parametrize("count", [2, 17, 33])
def test_no_batch_holds_a_single_record(tiny: Recipe, count: int) -> None:
    signals, labels = _planted(count)
    recipe = dataclasses.replace(tiny, epochs=1)
    fit(signals, labels, 100, recipe=recipe, seed=0)


def test_one_record_is_too_few(tiny: Recipe) -> None:
    signals, labels = _planted(1)
    with pytest.raises(UserError, match="at least 2 training records, 1 given"):
        fit(signals, labels, 100, recipe=tiny, seed=0)


def test_samples_that_are_not_finite_are_refused(tiny: Recipe) -> None:
    signals, labels = _planted(10)
    signals[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fit(signals, labels, 100, recipe=tiny, seed=0)


def test_flat_training_records_do_not_divide_by_zero(tiny: Recipe) -> None:
    _, labels = _planted(10)
    flat = np.zeros((10, 12, 400), dtype=np.float32)
    assert np.isfinite(fit(flat, labels, 100, recipe=tiny, seed=0).predict(flat)).all()
