from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sssd_hpc.diffusion import NoiseSchedule, epsilon_loss, from_velocity, velocity_loss

SCHEDULE = NoiseSchedule.linear()


class Recorder:
    """A denoiser that keeps what it was given and answers zeros."""

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.x_t, self.t, self.labels = x_t, t, labels
        return torch.zeros_like(x_t)


def labels_for(batch: int) -> Tensor:
    return torch.ones(batch, 2, dtype=torch.int64)


def test_a_perfect_denoiser_has_zero_loss() -> None:
    x0 = torch.randn(6, 8, 50)

    def perfect(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t][:, None, None]
        return (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    loss = epsilon_loss(perfect, x0, labels_for(6), SCHEDULE, torch.Generator().manual_seed(1))
    assert loss.item() < 1e-9


def test_a_denoiser_that_answers_zero_has_unit_loss() -> None:
    loss = epsilon_loss(Recorder(), torch.zeros(64, 8, 50), labels_for(64), SCHEDULE)
    assert loss.item() == pytest.approx(1.0, abs=4 * (2 / (64 * 8 * 50)) ** 0.5)


@pytest.mark.parametrize(("batch", "leads"), [(8, 8), (6, 8), (1, 8), (8, 12)])
def test_the_noise_level_is_one_per_sample_and_shared_by_its_leads(batch: int, leads: int) -> None:
    # A huge constant signal makes sqrt(alpha_bar) readable from x_t, lead by lead.
    scale = 1e6
    seen = Recorder()
    x0 = torch.full((batch, leads, 20), scale)
    epsilon_loss(seen, x0, labels_for(batch), SCHEDULE, torch.Generator().manual_seed(3))
    assert seen.t.shape == (batch,)
    told = SCHEDULE.alpha_bar[seen.t].sqrt()[:, None, None].expand_as(seen.x_t)
    torch.testing.assert_close(seen.x_t / scale, told, rtol=0, atol=1e-5)
    assert batch == 1 or seen.t.unique().numel() > 1


def test_every_step_is_drawn_and_about_equally_often() -> None:
    schedule = NoiseSchedule.linear(num_steps=5)
    seen = Recorder()
    epsilon_loss(seen, torch.zeros(5000, 1, 1), labels_for(5000), schedule)
    counts = torch.bincount(seen.t, minlength=5)
    assert counts.shape == (5,)
    assert counts.min() > 850
    assert counts.max() < 1150


def test_the_generator_alone_decides_the_draws() -> None:
    x0 = torch.randn(4, 8, 20)
    losses = [
        epsilon_loss(Recorder(), x0, labels_for(4), SCHEDULE, torch.Generator().manual_seed(seed))
        for seed in (7, 7, 8)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_labels_reach_the_denoiser_unchanged() -> None:
    seen = Recorder()
    labels = torch.tensor([[1, 0, -1], [0, 0, 1]])
    epsilon_loss(seen, torch.zeros(2, 8, 20), labels, SCHEDULE)
    assert torch.equal(seen.labels, labels)


def test_a_perfect_velocity_has_zero_loss() -> None:
    x0 = torch.randn(6, 8, 50)

    def perfect(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t][:, None, None]
        return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt()

    loss = velocity_loss(perfect, x0, labels_for(6), SCHEDULE, torch.Generator().manual_seed(1))
    assert loss.item() < 1e-8


def test_the_velocity_loss_is_the_epsilon_loss_over_alpha_bar() -> None:
    # One step, so that alpha_bar is one number for the whole batch.
    schedule = NoiseSchedule.linear(num_steps=1, beta_start=0.9, beta_end=0.9)
    x0, labels = torch.randn(6, 8, 50, dtype=torch.float64), labels_for(6)

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x_t.sin()

    velocity = velocity_loss(network, x0, labels, schedule, torch.Generator().manual_seed(1))
    denoiser = from_velocity(network, schedule)
    epsilon = epsilon_loss(denoiser, x0, labels, schedule, torch.Generator().manual_seed(1))
    # alpha_bar is a float32 constant, so 1 - alpha_bar carries its rounding.
    assert epsilon.item() / 0.1 == pytest.approx(velocity.item(), rel=1e-6)
