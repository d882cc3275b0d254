"""Orders of convergence on distributions whose score, and so whose ODE, is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.mixture import THREE, Mixture
from sssd_hpc.diffusion import (
    NoiseSchedule,
    ancestral_sample,
    ddim_sample,
    dpmpp_sample,
    guided,
    plms_sample,
    split_sample,
)

# Enough levels for 320 steps of one length, and a first beta so small that levels are smooth in t.
SCHEDULE = NoiseSchedule.linear(num_steps=1920, beta_start=1e-6, beta_end=0.01)
# A level that every grid of 5 m steps visits. At x_0 itself the last step is of first order.
LEVEL = SCHEDULE.num_steps // 5 - 1
X_T = torch.randn(8, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CLASS_1 = torch.ones(8, 1, dtype=torch.int64)
MIXED = torch.tensor([[1], [0], [-1], [1]] * 2)
WEIGHT = 1.5

Walk = Callable[[Tensor, Tensor, int, Callable[[int, Tensor], None]], Tensor]


def plain(sampler: Callable[..., Tensor], weight: float = 0.0, extra: int = 0) -> Walk:
    """Return a walk that tells each state that the network is asked about."""

    def walk(x: Tensor, labels: Tensor, steps: int, tell: Callable[[int, Tensor], None]) -> Tensor:
        inner = guided(THREE.denoiser(SCHEDULE), weight)

        def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            tell(int(t[0]), x_t)
            return inner(x_t, t, labels)

        return sampler(denoiser, x, labels, SCHEDULE, steps=steps + extra)

    return walk


WALKS = {
    "ddim": (plain(ddim_sample), 1, 0.0),
    "dpmpp": (plain(dpmpp_sample), 2, 0.0),
    # One call more than levels.
    "plms": (plain(plms_sample, extra=1), 2, 0.0),
    "ddim guided": (plain(ddim_sample, WEIGHT), 1, WEIGHT),
    "dpmpp guided": (plain(dpmpp_sample, WEIGHT), 2, WEIGHT),
    "plms guided": (plain(plms_sample, WEIGHT, extra=1), 2, WEIGHT),
}


@pytest.mark.parametrize("name", WALKS)
def test_the_order_between_levels_is_the_methods(name: str) -> None:
    walk, order, weight = WALKS[name]
    labels = CLASS_1 if weight else MIXED
    exact = THREE.solution(X_T, labels, SCHEDULE, weight, LEVEL)
    errors = []
    for steps in (80, 160, 320):
        seen: dict[int, Tensor] = {}
        walk(X_T, labels, steps, lambda t, x, seen=seen: seen.setdefault(t, x))  # type: ignore[misc]
        errors.append((seen[LEVEL] - exact).square().mean().sqrt().item())
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    # error = C h^p (1 + c h + ..): what a rate has beyond p halves with h, or is small already.
    assert abs(rates[1] - order) <= max(0.6 * abs(rates[0] - order), 0.02)
    assert abs(rates[1] - order) <= 0.1


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_splitting_is_of_order_2_with_guidance(weight: float) -> None:
    exact = THREE.solution(X_T, CLASS_1, SCHEDULE, weight)
    errors = []
    for steps in (40, 80, 160):
        x_0 = split_sample(
            THREE.denoiser(SCHEDULE), X_T, CLASS_1, SCHEDULE, steps=steps, weight=weight
        )
        errors.append((x_0 - exact).square().mean().sqrt().item())
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    # The last step, split without a second half, adds a term in r^2 of the last level: order 2 too.
    assert rates == pytest.approx([2.0, 2.0], abs=0.25)


def test_splitting_without_guidance_converges_faster_than_order_2() -> None:
    errors = {}
    for steps in (20, 40, 80):
        x_0 = split_sample(THREE.denoiser(SCHEDULE), X_T, MIXED, SCHEDULE, steps=steps, weight=0.0)
        errors[steps] = x_0 - THREE.solution(X_T, MIXED, SCHEDULE)
    norms = [error.square().mean().sqrt().item() for error in errors.values()]
    assert norms[0] > 4 * norms[1] > 16 * norms[2]


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim_sample,
    "dpmpp": dpmpp_sample,
    "plms": plms_sample,
    "split": lambda *args, **options: split_sample(*args, **options, weight=0.0),
}
ONE = Mixture(means=((0.7, -0.2),), stds=(0.3,), shares=(1.0,), classes=(1,))


def closed_form(x_T: Tensor) -> Tensor:
    """x_0 of a Gaussian N(m, s^2): y - m grows as sqrt(s^2 + r^2) with the noise level r."""
    first = SCHEDULE.num_steps - 1
    mean, std = torch.tensor(ONE.means[0], dtype=torch.float64), ONE.stds[0]
    y = x_T / math.sqrt(SCHEDULE.alpha_bar_at(first))
    return mean + (y - mean) * std / math.hypot(std, SCHEDULE.noise_level(first))


def test_the_reference_solution_is_the_closed_form_of_a_gaussian() -> None:
    got = ONE.solution(X_T, CLASS_1, SCHEDULE)
    torch.testing.assert_close(got, closed_form(X_T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_converge_to_the_closed_form_of_a_gaussian(name: str) -> None:
    errors = [
        (SAMPLERS[name](ONE.denoiser(SCHEDULE), X_T, CLASS_1, SCHEDULE, steps=steps))
        .sub(closed_form(X_T))
        .abs()
        .max()
        .item()
        for steps in (15, 240)
    ]
    # Order 1 at least, less a quarter each time; what is left is below the noise of the last level.
    assert errors[0] > 9 * errors[1]
    assert errors[1] < SCHEDULE.noise_level(SCHEDULE.num_steps // 240 - 1)


def test_ddim_of_eta_1_over_all_steps_is_ancestral_sampling() -> None:
    schedule = NoiseSchedule.linear()
    x_T, denoiser = X_T.float(), THREE.denoiser(schedule)
    noise = torch.randn(200, *X_T.shape, generator=torch.Generator().manual_seed(2))
    ancestral = ancestral_sample(denoiser, x_T, MIXED, schedule, noise=noise)
    ddim = ddim_sample(denoiser, x_T, MIXED, schedule, steps=200, eta=1.0, noise=noise)
    # alpha_bar is a float32 product, so that 1 - alpha_bar_t / alpha_bar_{t-1} is beta_t to
    # 2^-23 absolute: relative to beta, at most 2^-23 / 1e-4 = 1.2e-3, half of it in sigma. A step
    # then differs by at most 0.6e-3 sqrt(1e-4) |z| at the start, less for larger beta; 200 such
    # steps at random add up to sqrt(200) times that.
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=0.6e-3 * 0.01 * 4 * 200**0.5)
