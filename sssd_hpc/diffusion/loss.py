"""The training losses: predict the noise that was added, or the velocity. They know no network."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import mse_loss

from sssd_hpc.diffusion.denoiser import Denoiser
from sssd_hpc.diffusion.schedule import NoiseSchedule, q_sample


def epsilon_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    generator: torch.Generator | None = None,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error between eps and the denoiser's estimate of it.

    Each sample has one t, uniform over the schedule and shared by all its leads. t and eps are
    drawn on the generator's device, so that a CPU generator gives the same draws on every device;
    who has drawn them already gives (t, eps) as `drawn`.

    Source: DDPM, Algorithm 1 (arXiv 2006.11239).
    """
    t, eps = _draw(x0, schedule, generator) if drawn is None else drawn
    return mse_loss(denoiser(q_sample(x0, t, eps, schedule), t, labels), eps)


def velocity_loss(
    network: Denoiser,
    x0: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    generator: torch.Generator | None = None,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.

    It equals the squared error of eps divided by alpha_bar: the noisiest steps, where eps is nearly
    the input, count for what they decide. Draws are those of `epsilon_loss`.

    Source: Salimans and Ho, Progressive distillation (arXiv 2202.00512), appendix D.
    """
    t, eps = _draw(x0, schedule, generator) if drawn is None else drawn
    alpha_bar = schedule.alpha_bar[t][:, None, None]
    v = alpha_bar.sqrt() * eps - (1.0 - alpha_bar).sqrt() * x0
    return mse_loss(network(q_sample(x0, t, eps, schedule), t, labels), v)


def _draw(
    x0: Tensor, schedule: NoiseSchedule, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw t (batch,) and eps like x0."""
    drawn_on = generator.device if generator is not None else x0.device
    t = torch.randint(schedule.num_steps, x0.shape[:1], generator=generator, device=drawn_on)
    eps = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype)
    return t.to(x0.device), eps.to(x0.device)
