"""Guided sampling by operator splitting: the guidance apart from the ODE that it is added to."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser, both, guided
from sssd_hpc.diffusion.grid import adams_bashforth, intervals, timesteps
from sssd_hpc.diffusion.schedule import NoiseSchedule
from sssd_hpc.diffusion.walk import ddim_step, predict, steps_like


@torch.no_grad()
def split_sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    weight: float,
    interval: range | None = None,
) -> Float[Tensor, "batch lead length"]:
    """Walk over `steps` levels by Strang splitting of the guided ODE; `denoiser` is not guided.

    In y = x / s and the noise level r = n / s the guided ODE is dy/dr = e + g, with
    e = eps(labels) and g = w (eps(labels) - eps(unknown)). A step from r to r' is half a step of
    dy/dr = g with r held, a whole one of dy/dr = e, and half a one of g at r'. Halves that meet
    at a level are taken as one.

    - e goes by Adams-Bashforth of up to four values in r. What the guidance changed in e at a
      level is added to the older values, so that they lie on the flow of e alone: with values from
      the whole walk the guidance would count twice, and the order would be 1.
    - g goes by Heun's rule. Its second half over the last step is taken before that step, since a
      network cannot be asked at x_0.

    Of order 2. A guided level costs two doubled calls, one outside the interval one plain call.
    Weight 0 is the linear multistep method of order 4 in r. A first level without signal is left
    by DDIM's step with ordinary guidance.

    Source: Wizadwongsa and Suwajanakorn, Accelerating guided diffusion sampling with splitting
    numerical methods (arXiv 2301.11558): their STSP4, whose guidance goes by Euler's rule and whose
    history is that of the whole walk, both of which make it of order 1 (`docs/samplers.md`).

    Raises:
        ValueError: not 1 <= steps <= num_steps.
    """
    schedule = schedule.to("cpu")
    walk = intervals(timesteps(schedule.num_steps, steps))
    if schedule.alpha_bar_at(walk[0][0]) == 0.0:
        t, after = walk.pop(0)
        with_guidance = guided(denoiser, weight, interval)
        x_T = ddim_step(*predict(with_guidance, x_T, t, labels, schedule), after, schedule)
        if not walk:
            return x_T
    y = x_T / math.sqrt(schedule.alpha_bar_at(walk[0][0]))
    history: list[tuple[float, Tensor]] = []
    before = 0.0
    for t, after in walk:
        level, signal = schedule.noise_level(t), math.sqrt(schedule.alpha_bar_at(t))
        step = schedule.noise_level(after) - level
        at = steps_like(y, t)
        if weight != 0.0 and (interval is None or t in interval):
            half_after = 0.5 * step if after >= 0 else step
            kick = 0.5 * before + half_after
            known, unknown = both(denoiser, signal * y, at, labels)
            g = weight * (known - unknown)
            e, unknown = both(denoiser, signal * (y + kick * g), at, labels)
            y = y + 0.5 * kick * (g + weight * (e - unknown))
            history = [(node, value + (e - known)) for node, value in history]
        else:
            e = denoiser(signal * y, at, labels)
        history = [(level, e), *history[:3]]
        weights = adams_bashforth([node for node, _ in history], schedule.noise_level(after))
        mean = torch.stack([w * value for w, (_, value) in zip(weights, history, strict=True)])
        y = y + step * mean.sum(0)
        before = step
    return y
