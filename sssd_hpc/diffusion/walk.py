"""What the samplers share: the estimates at a level, steps along an eps, and noise by step number.

Legend: that of `samplers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser, VelocityDenoiser
from sssd_hpc.diffusion.schedule import NoiseSchedule

Noise: TypeAlias = Float[Tensor, "step batch lead length"] | Callable[[int], Tensor] | None
"""z by step number: noise[i] or noise(i) is added in step i = 1, 2 .. of the walk."""


def predict(
    denoiser: Denoiser, x: Tensor, t: int, labels: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """Return the estimates (x0_hat, eps_hat) at step t, like x, from one network call.

    Raises:
        ValueError: alpha_bar_t is 0 and the denoiser knows the noise alone.
    """
    alpha_bar = schedule.alpha_bar_at(t)
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    if isinstance(denoiser, VelocityDenoiser):
        v_hat = denoiser.network(x, steps_like(x, t), labels)
        return signal * x - noise * v_hat, signal * v_hat + noise * x
    if alpha_bar == 0.0:
        raise ValueError(
            f"alpha_bar is 0 at step {t}, where the noise says nothing of x_0; sample a network "
            f"that predicts velocity, by from_velocity(network, schedule)"
        )
    eps_hat = denoiser(x, steps_like(x, t), labels)
    return (x - noise * eps_hat) / signal, eps_hat


def ddim_step(x_0: Tensor, eps: Tensor, after: int, schedule: NoiseSchedule) -> Tensor:
    """Return s x_0 + n eps at step `after`."""
    alpha_bar = schedule.alpha_bar_at(after)
    return math.sqrt(alpha_bar) * x_0 + math.sqrt(1.0 - alpha_bar) * eps


def pseudo_step(x: Tensor, eps: Tensor, t: int, after: int, schedule: NoiseSchedule) -> Tensor:
    """Return DDIM's step from x_t along an eps that need not be the one at x_t."""
    move = schedule.noise_level(after) - schedule.noise_level(t)
    here, there = schedule.alpha_bar_at(t), schedule.alpha_bar_at(after)
    return math.sqrt(there / here) * x + math.sqrt(there) * move * eps


def check_eta(eta: float) -> None:
    """Raise ValueError if eta is outside [0, 1]."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is {eta}; it must be in [0, 1]")


def steps_like(x: Tensor, t: int) -> Tensor:
    """Return t for every row of x, as a denoiser takes it."""
    return torch.full(x.shape[:1], t, dtype=torch.int64, device=x.device)


def noise_source(
    x: Tensor,
    steps: int,
    noise: Tensor | Callable[[int], Tensor] | None,
    generator: torch.Generator | None,
) -> Callable[[int], Tensor]:
    """Return a function that gives z, like x, by step number 1, 2 .. of `steps`.

    Raises:
        ValueError: `noise` is a tensor for another number of steps or of another shape than x.
    """
    if callable(noise):
        return noise
    if noise is not None:
        if noise.shape != (steps, *x.shape):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; "
                f"{steps} steps from x_T need {(steps, *x.shape)}"
            )
        return noise.__getitem__
    drawn_on = generator.device if generator is not None else x.device
    return lambda _: torch.randn(x.shape, generator=generator, device=drawn_on, dtype=x.dtype).to(
        x.device
    )
