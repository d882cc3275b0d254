from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc.diffusion import NoiseSchedule, q_sample

PARITY = Path(__file__).parents[1] / "data" / "parity"
NAMES = {"beta": "Beta", "alpha": "Alpha", "alpha_bar": "Alpha_bar", "sigma": "Sigma"}


@pytest.mark.parametrize("num_steps", [10, 200])
@pytest.mark.parametrize("name", NAMES)
def test_the_linear_schedule_equals_the_public_codes(num_steps: int, name: str) -> None:
    expected = np.load(PARITY / "misc.npz")[f"T{num_steps}/{NAMES[name]}"]
    schedule = NoiseSchedule.linear(num_steps=num_steps)
    assert schedule.num_steps == num_steps
    actual = getattr(schedule, name)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-7, atol=0)


def test_noising_equals_the_public_codes() -> None:
    data = np.load(PARITY / "misc.npz")
    x0, eps = torch.from_numpy(data["qs/x0"]), torch.from_numpy(data["qs/noise"])
    t = torch.from_numpy(data["qs/step"]).flatten()
    x_t = q_sample(x0, t, eps, NoiseSchedule.linear())
    np.testing.assert_allclose(x_t.numpy(), data["qs/xt"], rtol=1e-6, atol=1e-6)


def test_the_papers_schedule_leaves_signal_at_its_last_step() -> None:
    assert NoiseSchedule.linear().terminal_snr == pytest.approx(0.13218 / (1 - 0.13218), rel=1e-4)


def test_a_schedule_may_have_one_step() -> None:
    assert NoiseSchedule.linear(num_steps=1).sigma.tolist() == pytest.approx([0.01])


def test_moving_a_schedule_keeps_its_numbers() -> None:
    schedule = NoiseSchedule.linear(num_steps=5)
    moved = schedule.to("cpu")
    assert all(torch.equal(getattr(schedule, name), getattr(moved, name)) for name in NAMES)


@pytest.mark.parametrize(
    ("num_steps", "beta_start", "beta_end"),
    [(0, 1e-4, 0.02), (10, 0.0, 0.02), (10, 0.02, 1e-4), (10, 1e-4, 1.0), (10, float("nan"), 0.1)],
)
def test_an_impossible_schedule_is_refused(
    num_steps: int, beta_start: float, beta_end: float
) -> None:
    with pytest.raises(ValueError, match=r"num_steps|beta"):
        NoiseSchedule.linear(num_steps=num_steps, beta_start=beta_start, beta_end=beta_end)


@pytest.mark.parametrize("num_steps", [2, 32, 200])
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_level(num_steps: int) -> None:
    usual = NoiseSchedule.linear(num_steps=num_steps)
    schedule = NoiseSchedule.linear(num_steps=num_steps, zero_terminal_snr=True)
    assert schedule.terminal_snr == 0.0
    assert schedule.beta[-1] == 1.0
    assert schedule.alpha_bar[0] == usual.alpha_bar[0]
    assert (schedule.alpha_bar.diff() < 0).all()
    for name in NAMES:
        values = getattr(schedule, name)
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    # Each step's reverse variance is its posterior variance.
    alpha_bar = schedule.alpha_bar.double()
    variance = schedule.beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    torch.testing.assert_close(schedule.sigma[1:].double() ** 2, variance, rtol=1e-3, atol=0)


def test_a_single_step_cannot_be_pure_noise() -> None:
    with pytest.raises(ValueError, match=r"num_steps is 1; .* at least 2"):
        NoiseSchedule.linear(num_steps=1, zero_terminal_snr=True)


def test_noise_levels_rise_from_x_0_to_pure_noise() -> None:
    schedule = NoiseSchedule.linear(num_steps=10, zero_terminal_snr=True)
    levels = [schedule.noise_level(t) for t in range(-1, 10)]
    assert levels == sorted(levels)
    assert levels[0] == 0.0
    assert levels[-1] == float("inf")
    assert schedule.half_log_snr(-1) == float("inf")
    assert schedule.half_log_snr(9) == -float("inf")
    assert schedule.half_log_snr(4) == pytest.approx(-np.log(levels[5]))


def test_an_interval_of_noise_levels_is_a_range_of_steps() -> None:
    schedule = NoiseSchedule.linear(num_steps=10, beta_end=0.3)
    levels = [schedule.noise_level(t) for t in range(10)]
    assert schedule.steps_within(0.0, 1e9) == range(10)
    assert schedule.steps_within(levels[2], levels[5]) == range(2, 6)
    assert schedule.steps_within(levels[3], levels[3]) == range(3, 4)
    with pytest.raises(ValueError, match="0 <= LOW <= HIGH"):
        schedule.steps_within(1.0, 0.5)
    with pytest.raises(ValueError, match=r"no step's noise level lies in .* run from 0.01 to"):
        schedule.steps_within(100.0, 200.0)
