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
