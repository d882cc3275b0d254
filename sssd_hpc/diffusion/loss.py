"""The training loss: predict the noise that was added. Draws t and eps, knows no network."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.samplers import Denoiser
from sssd_hpc.diffusion.schedule import NoiseSchedule, q_sample


def epsilon_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error between eps and the denoiser's estimate of it.

    Each sample has one t, uniform over the schedule and shared by all its leads. t and eps are
    drawn on the generator's device, so that a CPU generator gives the same draws on every device.

    Source: DDPM, Algorithm 1 (arXiv 2006.11239).
    """
    drawn_on = generator.device if generator is not None else x0.device
    t = torch.randint(schedule.num_steps, x0.shape[:1], generator=generator, device=drawn_on)
    eps = torch.randn(x0.shape, generator=generator, device=drawn_on, dtype=x0.dtype)
    t, eps = t.to(x0.device), eps.to(x0.device)
    eps_hat = denoiser(q_sample(x0, t, eps, schedule), t, labels)
    return torch.nn.functional.mse_loss(eps_hat, eps)
