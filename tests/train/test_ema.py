from __future__ import annotations

import pytest
import torch

from sssd_hpc.train.ema import MovingAverage, ema_decay


def test_the_old_average_counts_half_after_the_half_life() -> None:
    decay = ema_decay(samples=10_000_000, batch=10, half_life=1000)
    assert decay**100 == pytest.approx(0.5)


def test_early_averages_forget_the_initial_weights() -> None:
    assert ema_decay(samples=8, batch=8, half_life=50_000) == pytest.approx(0.5**20)
    assert ema_decay(samples=1000, batch=10, half_life=50_000) == pytest.approx(0.5 ** (10 / 50))


def test_the_average_is_the_weighted_sum_of_the_weights_seen() -> None:
    weight = torch.tensor([3.0])
    average = MovingAverage({"weight": weight})
    expected = 3.0
    for step, value in enumerate((1.0, 5.0, 2.0), start=1):
        weight.fill_(value)
        average.update(lambda _: weight, samples=400 * step, batch=4, half_life=10)
        decay = ema_decay(samples=400 * step, batch=4, half_life=10)
        expected = decay * expected + (1 - decay) * value
    assert average.weights["weight"].item() == pytest.approx(expected)
    assert weight.item() == 2.0


def test_a_rank_that_averages_nothing_may() -> None:
    MovingAverage({}).update(lambda _: torch.zeros(1), samples=4, batch=4, half_life=10)
