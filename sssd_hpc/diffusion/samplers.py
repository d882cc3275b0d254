"""Reverse processes as pure functions of a denoiser; they know no network and no file.

All walk from x_T (pure noise) to x_0 over the levels of `timesteps`. Legend: z is standard normal
noise and, with s_t = sqrt(alpha_bar_t) and n_t = sqrt(1 - alpha_bar_t), x_t = s_t x_0 + n_t eps.
Step -1 is x_0. Scalars are float64, signals what x_T is. `docs/samplers.md` compares the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser
from sssd_hpc.diffusion.grid import adams_bashforth, intervals, timesteps
from sssd_hpc.diffusion.schedule import NoiseSchedule
from sssd_hpc.diffusion.walk import (
    Noise,
    check_eta,
    ddim_step,
    noise_source,
    predict,
    pseudo_step,
    steps_like,
)


@torch.no_grad()
def ancestral_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    noise: Float[Tensor, "num_steps batch lead length"] | Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch lead length"]:
    """Walk from x_T (pure noise) to x_0 over every level, one network call a step.

    x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_t) + sigma_t z.

    `noise[i]` (a tensor), or `noise(i)` (a function, so that not all steps are held at once), is
    the z added in the step from t = num_steps - i, for i = 1 .. num_steps - 1; a tensor's first
    entry is x_T and is not read. Without it z comes from `generator`, on the generator's device.

    Source: DDPM, Algorithm 2 (arXiv 2006.11239).
    """
    draw = noise_source(x_T, schedule.num_steps, noise, generator)
    schedule, on_device = schedule.to("cpu"), schedule.to(x_T.device)
    x = x_T
    for t in range(schedule.num_steps - 1, -1, -1):
        if schedule.alpha_bar_at(t) == 0.0:
            # The same posterior mean, written with x_0: no signal is left to divide by.
            x_0, _ = predict(denoiser, x, t, labels, schedule)
            x = on_device.alpha_bar[t - 1].sqrt() * x_0
        else:
            eps_hat = denoiser(x, steps_like(x, t), labels)
            weight = (1.0 - on_device.alpha[t]) / (1.0 - on_device.alpha_bar[t]).sqrt()
            x = (x - weight * eps_hat) / on_device.alpha[t].sqrt()
        if t > 0:
            x = x + on_device.sigma[t] * draw(schedule.num_steps - t)
    return x


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    eta: float = 0.0,
    noise: Noise = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch lead length"]:
    """Walk over `steps` levels, one network call each; with t' the level after t:

    x_t' = s_t' x0_hat + sqrt(n_t'^2 - sigma^2) eps_hat + sigma z,
    sigma = eta n_t' / n_t sqrt(1 - alpha_bar_t / alpha_bar_t').

    With eta 0 nothing is drawn and the method is of order 1; eta 1 over every level is
    `ancestral_sample`. `noise[i]`, i = 1 .. steps - 1, as there.

    Source: Song et al., DDIM (arXiv 2010.02502), equations 12 and 16.

    Raises:
        ValueError: not 1 <= steps <= num_steps, or eta outside [0, 1].
    """
    check_eta(eta)
    draw = noise_source(x_T, steps, noise, generator)
    schedule = schedule.to("cpu")
    x = x_T
    for number, (t, after) in enumerate(intervals(timesteps(schedule.num_steps, steps)), 1):
        x_0, eps_hat = predict(denoiser, x, t, labels, schedule)
        here, there = schedule.alpha_bar_at(t), schedule.alpha_bar_at(after)
        sigma = eta * math.sqrt((1.0 - there) / (1.0 - here) * (1.0 - here / there))
        x = math.sqrt(there) * x_0 + math.sqrt(max(0.0, 1.0 - there - sigma**2)) * eps_hat
        if sigma > 0.0:
            x = x + sigma * draw(number)
    return x


@torch.no_grad()
def dpmpp_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    eta: float = 0.0,
    noise: Noise = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch lead length"]:
    """Walk over `steps` levels by DPM-Solver++(2M), one network call each.

    With lambda = log(s / n), h = lambda_t' - lambda_t, h_0 the h of the step before and D_0 the
    x0_hat of the step before:

    x_t' = n_t' / n_t exp(-eta h) x_t + s_t' (1 - exp(-(1 + eta) h)) (x0_hat + h / (2 h_0) (x0_hat
    - D_0)) + n_t' sqrt(1 - exp(-2 eta h)) z.

    The first step has no step before; the last one ends at lambda = infinity, where h / h_0 says
    nothing: both are of first order (the last gives x0_hat). With eta 0 nothing is drawn and the
    method is of order 2; eta 1 is the solver of the reverse SDE. `noise[i]`, i = 1 .. steps - 1,
    as in `ancestral_sample`.

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), Algorithm 2 and appendix B.

    Raises:
        ValueError: not 1 <= steps <= num_steps, or eta outside [0, 1].
    """
    check_eta(eta)
    draw = noise_source(x_T, steps, noise, generator)
    schedule = schedule.to("cpu")
    x, before, h_before = x_T, x_T, math.inf
    for number, (t, after) in enumerate(intervals(timesteps(schedule.num_steps, steps)), 1):
        x_0, _ = predict(denoiser, x, t, labels, schedule)
        here, there = schedule.alpha_bar_at(t), schedule.alpha_bar_at(after)
        h = schedule.half_log_snr(after) - schedule.half_log_snr(t)
        # From a level without signal h_before is infinite as well, and the weight zero.
        look_back = 0.5 * h / h_before if math.isfinite(h) else 0.0
        decay = eta * h if eta else 0.0
        kept = math.sqrt((1.0 - there) / (1.0 - here)) * math.exp(-decay)
        pull = -math.sqrt(there) * math.expm1(-h - decay)
        x = kept * x + pull * (x_0 + look_back * (x_0 - before))
        if eta and after >= 0:
            x = x + math.sqrt((there - 1.0) * math.expm1(-2.0 * decay)) * draw(number)
        before, h_before = x_0, h
    return x


@torch.no_grad()
def plms_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    *,
    steps: int,
) -> Float[Tensor, "batch lead length"]:
    """Walk with `steps` network calls by the pseudo linear multistep method.

    DDIM's step, with eps_hat replaced by the mean over the step of the cubic in t through the last
    four eps_hat (Adams-Bashforth; fewer at the start). The first step takes the mean of eps_hat at
    both of its ends and so a second call: `steps` calls visit steps - 1 levels. With one or two
    steps, or a first level without signal, the first step is DDIM's, and as many levels are
    visited. Of order 2: a mean over t is not the mean over the noise level that the ODE asks for.

    Source: Liu et al., PNDM (arXiv 2202.09778), equations 11 and 12; this start instead of
    Runge-Kutta is that of latent diffusion's code.

    Raises:
        ValueError: not 1 <= steps <= num_steps.
    """
    schedule = schedule.to("cpu")
    grid = timesteps(schedule.num_steps, steps)
    two_ended = steps > 2 and schedule.alpha_bar_at(grid[0]) > 0.0
    if two_ended:
        grid = timesteps(schedule.num_steps, steps - 1)
    x = x_T
    history: list[tuple[int, Tensor]] = []
    for number, (t, after) in enumerate(intervals(grid)):
        x_0, eps_hat = predict(denoiser, x, t, labels, schedule)
        history = [(t, eps_hat), *history[:3]]
        if number == 0:
            ahead = ddim_step(x_0, eps_hat, after, schedule)
            if two_ended:
                _, eps_ahead = predict(denoiser, ahead, after, labels, schedule)
                ahead = pseudo_step(x, 0.5 * (eps_hat + eps_ahead), t, after, schedule)
            x = ahead
        else:
            weights = adams_bashforth([float(node) for node, _ in history], float(after))
            mean = torch.stack([w * eps for w, (_, eps) in zip(weights, history, strict=True)])
            x = pseudo_step(x, mean.sum(0), t, after, schedule)
    return x
