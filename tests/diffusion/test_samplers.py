from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.mixture import THREE
from sssd_hpc.diffusion import (
    NoiseSchedule,
    ancestral_sample,
    ddim_sample,
    dpmpp_sample,
    from_velocity,
    guided,
    plms_sample,
    split_sample,
)

PARITY = Path(__file__).parents[1] / "data" / "parity"
LABELS = torch.tensor([[1, 0], [0, 1]])


@pytest.mark.parametrize("kernel", ["slow", "conj"])
@pytest.mark.parametrize("as_function", [False, True], ids=["tensor", "function"])
def test_the_trajectory_equals_the_public_codes(kernel: str, as_function: bool) -> None:
    data = np.load(PARITY / "ddpm_ecg_T10.npz")
    stored_eps = torch.from_numpy(data[f"{kernel}/eps"])
    noise = torch.from_numpy(data["in/noise"])
    visited: list[Tensor] = []

    def replay(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        visited.append(x_t)
        assert t.tolist() == [10 - len(visited)] * 2
        return stored_eps[len(visited) - 1]

    x_0 = ancestral_sample(
        replay,
        noise[0],
        torch.from_numpy(data["in/label"]),
        NoiseSchedule.linear(num_steps=10),
        noise=(lambda i: noise[i]) if as_function else noise,
    )
    trajectory = torch.stack([*visited, x_0]).numpy()
    np.testing.assert_allclose(trajectory, data[f"{kernel}/x_t"], rtol=1e-6, atol=2e-6)


def test_a_known_gaussian_denoiser_recovers_mean_and_variance() -> None:
    # Data N(m, s^2) per sample: E[eps | x_t] = sqrt(1 - alpha_bar) (x_t - sqrt(alpha_bar) m) / v_t.
    mean, std, draws = 0.7, 0.3, 40_000
    schedule = NoiseSchedule.linear(num_steps=500, beta_end=0.05)
    assert schedule.terminal_snr < 1e-4

    def posterior_eps(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t][:, None, None]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance

    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, draws // 2, generator=generator)
    x_0 = ancestral_sample(posterior_eps, x_t, LABELS, schedule, generator=generator)
    # Four standard errors, plus the bias of 500 discrete steps in the variance.
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * std / draws**0.5)
    assert x_0.std().item() == pytest.approx(std, rel=4 / (2 * draws) ** 0.5 + 0.01)


def test_the_generator_alone_decides_a_sample() -> None:
    def shrink(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * x_t

    schedule = NoiseSchedule.linear(num_steps=4)
    x_t = torch.randn(2, 8, 20)
    samples = [
        ancestral_sample(
            shrink, x_t, LABELS, schedule, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_the_last_step_adds_no_noise() -> None:
    schedule = NoiseSchedule.linear(num_steps=1)
    x_t = torch.randn(2, 8, 20)
    x_0 = ancestral_sample(lambda x, t, labels: torch.zeros_like(x), x_t, LABELS, schedule)
    torch.testing.assert_close(x_0, x_t / schedule.alpha[0].sqrt())


def test_sampling_records_no_gradient() -> None:
    scale = torch.ones((), requires_grad=True)
    x_0 = ancestral_sample(
        lambda x, t, labels: scale * x,
        torch.randn(2, 8, 20),
        LABELS,
        NoiseSchedule.linear(num_steps=2),
    )
    assert not x_0.requires_grad


def test_noise_for_another_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise has shape \(3, 2, 8, 20\)"):
        ancestral_sample(
            lambda x, t, labels: x,
            torch.randn(2, 8, 20),
            LABELS,
            NoiseSchedule.linear(num_steps=2),
            noise=torch.randn(3, 2, 8, 20),
        )


class CountingDenoiser:
    """eps depends on x, t and the labels row by row; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return x_t * (1.0 + t[:, None, None]) + labels.sum(1)[:, None, None]


def test_guidance_combines_known_and_unknown_labels_in_one_call() -> None:
    denoiser = CountingDenoiser()
    x_t, t = torch.randn(2, 8, 20), torch.tensor([3, 5])
    known = denoiser(x_t, t, LABELS)
    unknown = denoiser(x_t, t, torch.full_like(LABELS, -1))
    denoiser.calls = 0
    eps = guided(denoiser, 1.5)(x_t, t, LABELS)
    torch.testing.assert_close(eps, 2.5 * known - 1.5 * unknown)
    assert denoiser.calls == 1


def test_guidance_of_weight_zero_is_the_plain_denoiser() -> None:
    denoiser = CountingDenoiser()
    assert guided(denoiser, 0.0) is denoiser


def test_guidance_is_on_within_its_interval_alone_and_doubles_nothing_else() -> None:
    rows = []

    def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows.append(len(x_t))
        return x_t + labels.sum(1)[:, None, None]

    x_t = torch.zeros(2, 8, 20)
    within = guided(denoiser, 1.0, range(2, 4))
    for t, told in ((1, 1.0), (2, 4.0), (3, 4.0), (4, 1.0)):
        # (1 + 1) * 1 - 1 * (-2)
        assert torch.equal(within(x_t, torch.full((2,), t), LABELS), torch.full_like(x_t, told))
    assert rows == [2, 4, 4, 2]


def test_guidance_of_velocity_is_guidance_of_the_noise() -> None:
    schedule = NoiseSchedule.linear(num_steps=10, zero_terminal_snr=True)
    network = CountingDenoiser()
    x_t, t = torch.randn(2, 8, 20), torch.tensor([9, 5])
    inside = guided(from_velocity(network, schedule), 1.5)(x_t, t, LABELS)
    velocity = from_velocity(network, schedule)
    known, unknown = velocity(x_t, t, LABELS), velocity(x_t, t, torch.full_like(LABELS, -1))
    torch.testing.assert_close(inside, 2.5 * known - 1.5 * unknown, rtol=1e-5, atol=1e-5)


FAST: dict[str, Callable[..., Tensor]] = {
    "ddim": ddim_sample,
    "dpmpp": dpmpp_sample,
    "plms": plms_sample,
    "split": lambda *args, **options: split_sample(*args, weight=0.0, **options),
}
SCHEDULE = NoiseSchedule.linear(num_steps=40, beta_end=0.1)
POINTS = torch.randn(4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CLASSES = torch.tensor([[1], [0], [-1], [1]])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 13, 40])
@pytest.mark.parametrize("name", FAST)
def test_a_walk_makes_as_many_calls_as_it_has_steps(name: str, steps: int) -> None:
    exact, asked = THREE.denoiser(SCHEDULE), []

    def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return exact(x_t, t, labels)

    x_0 = FAST[name](denoiser, POINTS, CLASSES, SCHEDULE, steps=steps)
    assert torch.isfinite(x_0).all()
    assert len(asked) == steps
    assert asked[0] == 39
    assert asked == sorted(asked, reverse=True)


@pytest.mark.parametrize("name", FAST)
def test_one_step_is_the_networks_estimate_of_x_0(name: str) -> None:
    alpha_bar = SCHEDULE.alpha_bar_at(39)
    eps = THREE.eps(POINTS, alpha_bar, CLASSES)
    x_0 = FAST[name](THREE.denoiser(SCHEDULE), POINTS, CLASSES, SCHEDULE, steps=1)
    expected = (POINTS - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    torch.testing.assert_close(x_0, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAST)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    denoiser = THREE.denoiser(SCHEDULE)
    together = FAST[name](denoiser, POINTS, CLASSES, SCHEDULE, steps=7)
    for row in range(4):
        alone = FAST[name](
            denoiser, POINTS[row : row + 1], CLASSES[row : row + 1], SCHEDULE, steps=7
        )
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [ddim_sample, dpmpp_sample])
def test_noise_is_drawn_by_step_number_and_not_for_the_last_step(
    sampler: Callable[..., Tensor],
) -> None:
    denoiser, numbers = THREE.denoiser(SCHEDULE), []
    noise = torch.randn(7, *POINTS.shape, dtype=torch.float64)

    def draw(number: int) -> Tensor:
        numbers.append(number)
        return noise[number]

    options = {"steps": 7, "eta": 0.5}
    called = sampler(denoiser, POINTS, CLASSES, SCHEDULE, noise=draw, **options)
    assert numbers == [1, 2, 3, 4, 5, 6]
    held = sampler(denoiser, POINTS, CLASSES, SCHEDULE, noise=noise, **options)
    assert torch.equal(called, held)
    other = sampler(denoiser, POINTS, CLASSES, SCHEDULE, noise=2 * noise, **options)
    assert not torch.equal(called, other)
    numbers.clear()
    sampler(denoiser, POINTS, CLASSES, SCHEDULE, steps=7, noise=draw)
    assert numbers == []


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", [ddim_sample, dpmpp_sample])
def test_a_known_gaussian_is_recovered_whatever_the_noise(
    sampler: Callable[..., Tensor], eta: float
) -> None:
    mean, std, draws = 0.7, 0.3, 40_000
    schedule = NoiseSchedule.linear(num_steps=500, beta_end=0.05)

    def posterior_eps(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t][:, None, None]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance

    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, draws // 2, generator=generator)
    x_0 = sampler(posterior_eps, x_t, LABELS, schedule, steps=500, eta=eta, generator=generator)
    # Four standard errors, plus the bias of 500 discrete steps in the variance.
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * std / draws**0.5)
    assert x_0.std().item() == pytest.approx(std, rel=4 / (2 * draws) ** 0.5 + 0.01)


@pytest.mark.parametrize("steps", [-1, 0, 41])
@pytest.mark.parametrize("name", FAST)
def test_a_wrong_number_of_steps_is_refused(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}; .* allows 1 to 40"):
        FAST[name](THREE.denoiser(SCHEDULE), POINTS, CLASSES, SCHEDULE, steps=steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("sampler", [ddim_sample, dpmpp_sample])
def test_an_eta_outside_0_and_1_is_refused(sampler: Callable[..., Tensor], eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta is .*in \[0, 1\]"):
        sampler(THREE.denoiser(SCHEDULE), POINTS, CLASSES, SCHEDULE, steps=4, eta=eta)


ALL: dict[str, Callable[..., Tensor]] = {
    **FAST,
    "dpmpp, eta 1": lambda *args, **options: dpmpp_sample(*args, **options, eta=1.0),
    "ddim, eta 1": lambda *args, **options: ddim_sample(*args, **options, eta=1.0),
    "ddpm": lambda *args, steps, **options: ancestral_sample(*args, **options),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ALL)
def test_from_pure_noise_a_known_gaussian_is_met(name: str, steps: int) -> None:
    # x_T = eps says nothing of x_0, so that v = -mean there; all of it must come from the network.
    schedule = NoiseSchedule.linear(num_steps=10, beta_end=0.3, zero_terminal_snr=True)
    mean, std = 0.7, 1e-3

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar.double()[t][:, None, None]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        eps = (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance
        x_0 = mean + alpha_bar.sqrt() * std**2 * (x_t - alpha_bar.sqrt() * mean) / variance
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0

    x_0 = ALL[name](from_velocity(network, schedule), POINTS, CLASSES, schedule, steps=steps)
    # A point of almost no width: whatever the path, its end is within some widths of the mean.
    torch.testing.assert_close(x_0, torch.full_like(x_0, mean), rtol=0, atol=10 * std)


@pytest.mark.parametrize("name", ["ddim", "dpmpp", "plms", "split", "ddpm"])
def test_pure_noise_needs_a_network_of_velocity(name: str) -> None:
    schedule = NoiseSchedule.linear(num_steps=10, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"alpha_bar is 0 at step 9.*from_velocity"):
        ALL[name](lambda x, t, labels: x, POINTS, CLASSES, schedule, steps=4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_walks_as_a_cpu_does(name: str) -> None:
    schedule = NoiseSchedule.linear(num_steps=10, beta_end=0.3, zero_terminal_snr=True)

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(x_t) * (0.5 + t[:, None, None] / 20) + 0.1 * labels[:, None]

    noise = torch.randn(10, *POINTS.shape, dtype=torch.float64)
    walks = []
    for device in ("cpu", "cuda"):
        denoiser = guided(from_velocity(network, schedule.to(device)), 1.0)
        given, classes = noise.to(device), CLASSES.to(device)
        options = {"noise": given} if name == "ddpm" or "eta" in name else {}
        x_0 = ALL[name](denoiser, given[0], classes, schedule.to(device), steps=10, **options)
        walks.append(x_0.cpu())
    torch.testing.assert_close(*walks, rtol=1e-6, atol=1e-6)
