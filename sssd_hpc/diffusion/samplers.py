"""Reverse processes as pure functions of a denoiser; they know no network and no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.schedule import NoiseSchedule

Denoiser: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""eps_hat = denoiser(x_t (B, leads, L), t (B,) int64, labels (B, num_labels) int64)."""


@torch.no_grad()
def ancestral_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    noise: Float[Tensor, "num_steps batch lead length"] | Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch lead length"]:
    """Walk from x_T (pure noise) to x_0, one network call a step.

    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t) + sigma_t z.

    `noise[i]` (a tensor), or `noise(i)` (a function, so that not all steps are held at once), is
    the z added in the step from t = num_steps - i, for i = 1 .. num_steps - 1; a tensor's first
    entry is x_T and is not read. Without it z comes from `generator`, on the generator's device.

    Source: DDPM, Algorithm 2 (arXiv 2006.11239).
    """
    draw = _noise_source(x_T, schedule, noise, generator)
    schedule = schedule.to(x_T.device)
    x = x_T
    for t in range(schedule.num_steps - 1, -1, -1):
        step = torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)
        eps_hat = denoiser(x, step, labels)
        weight = (1.0 - schedule.alpha[t]) / (1.0 - schedule.alpha_bar[t]).sqrt()
        x = (x - weight * eps_hat) / schedule.alpha[t].sqrt()
        if t > 0:
            x = x + schedule.sigma[t] * draw(schedule.num_steps - t)
    return x


def guided(denoiser: Denoiser, weight: float) -> Denoiser:
    """Return a denoiser with classifier-free guidance: (1 + w) eps(labels) - w eps(unknown).

    Both estimates come from one call on a doubled batch, with every label unknown (-1) in the
    second half. Weight 0 is the denoiser itself.

    Source: Ho and Salimans, Classifier-free diffusion guidance (arXiv 2207.12598), equation 6.
    """
    if weight == 0.0:
        return denoiser

    def guided_denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, -1)])
        known, unknown = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return (1.0 + weight) * known - weight * unknown

    return guided_denoiser


def from_velocity(network: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """Return the denoiser of a network trained by `velocity_loss`.

    eps_hat = sqrt(alpha_bar_t) v_hat + sqrt(1 - alpha_bar_t) x_t.

    Source: Salimans and Ho, Progressive distillation (arXiv 2202.00512), appendix D.
    """

    def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar.to(x_t.device)[t][:, None, None]
        return alpha_bar.sqrt() * network(x_t, t, labels) + (1.0 - alpha_bar).sqrt() * x_t

    return denoiser


def _noise_source(
    x: Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | Callable[[int], Tensor] | None,
    generator: torch.Generator | None,
) -> Callable[[int], Tensor]:
    if callable(noise):
        return noise
    if noise is not None:
        if noise.shape != (schedule.num_steps, *x.shape):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; "
                f"{schedule.num_steps} steps from x_T need {(schedule.num_steps, *x.shape)}"
            )
        return noise.__getitem__
    drawn_on = generator.device if generator is not None else x.device
    return lambda _: torch.randn(x.shape, generator=generator, device=drawn_on, dtype=x.dtype).to(
        x.device
    )
