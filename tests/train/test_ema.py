from __future__ import annotations

import pytest
import torch
from torch import nn

from sssd_hpc.train.ema import MovingAverage, ema_decay


def test_the_old_average_counts_half_after_the_half_life() -> None:
    decay = ema_decay(samples=10_000_000, batch=10, half_life=1000)
    assert decay**100 == pytest.approx(0.5)


def test_early_averages_forget_the_initial_weights() -> None:
    assert ema_decay(samples=8, batch=8, half_life=50_000) == pytest.approx(0.5**20)
    assert ema_decay(samples=1000, batch=10, half_life=50_000) == pytest.approx(0.5 ** (10 / 50))


def test_the_average_is_the_weighted_sum_of_the_weights_seen() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model)
    expected = model.weight.item()
    for step, weight in enumerate((1.0, 5.0, 2.0), start=1):
        nn.init.constant_(model.weight, weight)
        average.update(samples=400 * step, batch=4, half_life=10)
        decay = ema_decay(samples=400 * step, batch=4, half_life=10)
        expected = decay * expected + (1 - decay) * weight
    assert average.weights["weight"].item() == pytest.approx(expected)
    assert model.weight.item() == 2.0


def test_the_state_holds_averaged_parameters_and_the_models_buffers() -> None:
    model = nn.BatchNorm1d(2)
    average = MovingAverage(model)
    nn.init.constant_(model.weight, 7.0)
    state = average.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert state["weight"].tolist() == [1.0, 1.0]


def test_averages_of_another_shape_are_refused() -> None:
    average = MovingAverage(nn.Linear(2, 2, bias=False))
    with pytest.raises(KeyError, match="weight of shape"):
        average.load({"weight": torch.zeros(1, 2)})
