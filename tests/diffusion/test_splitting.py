"""What the splitting sampler asks of the network, and how it treats the interval of guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.mixture import THREE
from sssd_hpc.diffusion import NoiseSchedule, from_velocity, split_sample

SCHEDULE = NoiseSchedule.linear(num_steps=40, beta_end=0.1)
X_T = torch.randn(3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1], [0], [1]])


class Asked:
    """The exact denoiser, noting the step and the rows of every call."""

    def __init__(self, schedule: NoiseSchedule = SCHEDULE) -> None:
        self.calls: list[tuple[int, int]] = []
        self.exact = THREE.denoiser(schedule)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((int(t[0]), len(x_t)))
        return self.exact(x_t, t, labels)


def test_a_guided_level_costs_two_doubled_calls_and_another_one_plain_call() -> None:
    asked = Asked()
    split_sample(asked, X_T, LABELS, SCHEDULE, steps=4, weight=2.0, interval=range(15, 35))
    assert asked.calls == [(39, 3), (29, 6), (29, 6), (19, 6), (19, 6), (9, 3)]


def test_without_weight_or_within_no_level_guidance_changes_nothing() -> None:
    asked = Asked()
    plain = split_sample(asked, X_T, LABELS, SCHEDULE, steps=8, weight=0.0)
    assert asked.calls == [(t, 3) for t in range(39, 0, -5)]
    outside = split_sample(asked, X_T, LABELS, SCHEDULE, steps=8, weight=2.0, interval=range(0, 1))
    assert torch.equal(plain, outside)


def test_a_single_step_is_solved_with_all_of_the_guidance() -> None:
    # One level: the guidance by Heun over the whole way down, then the plain ODE by Euler.
    level, signal = SCHEDULE.noise_level(39), SCHEDULE.alpha_bar_at(39) ** 0.5
    asked = Asked()
    x_0 = split_sample(asked, X_T, LABELS, SCHEDULE, steps=1, weight=2.0)
    at, unknown = torch.full((3,), 39), torch.full_like(LABELS, -1)

    def guidance(y: Tensor) -> Tensor:
        known = asked.exact(signal * y, at, LABELS)
        return 2.0 * (known - asked.exact(signal * y, at, unknown))

    y = X_T / signal
    ahead = y - level * guidance(y)
    e = asked.exact(signal * ahead, at, LABELS)
    expected = y - level / 2 * (guidance(y) + guidance(ahead)) - level * e
    torch.testing.assert_close(x_0, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_it_starts_from_pure_noise_and_stays_finite(steps: int) -> None:
    schedule = NoiseSchedule.linear(num_steps=40, zero_terminal_snr=True)

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(x_t) + 0.1 * labels[:, None]

    denoiser = from_velocity(network, schedule)
    x_0 = split_sample(denoiser, X_T, LABELS, schedule, steps=steps, weight=2.0)
    assert torch.isfinite(x_0).all()


@pytest.mark.parametrize("steps", [0, 41])
def test_a_wrong_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        split_sample(Asked(), X_T, LABELS, SCHEDULE, steps=steps, weight=1.0)
