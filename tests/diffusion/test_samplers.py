from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sssd_hpc.diffusion import NoiseSchedule, ancestral_sample, guided

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
