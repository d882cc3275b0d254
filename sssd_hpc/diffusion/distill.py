"""Progressive distillation: a student learns to do in one step what its teacher does in two.

Knows no network. Legend as in `samplers.py`: s_t = sqrt(alpha_bar_t), n_t = sqrt(1 - alpha_bar_t),
step -1 is x_0. Source: Salimans and Ho, Progressive distillation (arXiv 2202.00512).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser
from sssd_hpc.diffusion.grid import timesteps
from sssd_hpc.diffusion.schedule import NoiseSchedule, q_sample

Prediction = Literal["epsilon", "velocity"]


def distillation_loss(
    student: Denoiser,
    teacher: Denoiser,
    x0: Float[Tensor, "batch lead length"],
    labels: Int[Tensor, "batch label"],
    schedule: NoiseSchedule,
    *,
    steps: int,
    prediction: Prediction,
    drawn: tuple[Int[Tensor, " batch"], Float[Tensor, "batch lead length"]],
) -> Float[Tensor, ""]:
    """Return the mean of max(1, SNR_t) (x0_hat - x0_target)^2 of a student of `steps` DDIM steps.

    Both networks give what `prediction` says. `drawn` is (place, eps): the place of each sample's
    step among the student's, in [0, steps), 0 the noisiest, and its noise. The target is the x_0
    with which one DDIM step of the student ends where two of the teacher's do.

    Source: algorithm 2 and equation 9, "truncated SNR".

    Raises:
        ValueError: 2 steps of the teacher for each of the student are more than the schedule has.
    """
    place, eps = drawn
    levels, between = _grids(schedule, steps)
    t = levels.to(place.device)[place]
    x_t = q_sample(x0, t, eps, schedule)
    with torch.no_grad():
        target = _target(teacher, x_t, place, labels, schedule, levels, between, prediction)
    estimate, _ = _split(student(x_t, t, labels), x_t, t, schedule, prediction)
    signal, noise = _scales(t, schedule)
    weight = (signal / noise).square().clamp(min=1.0)
    return (weight * (estimate - target).square()).mean()


def _target(
    teacher: Denoiser,
    x_t: Tensor,
    place: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    levels: Tensor,
    between: Tensor,
    prediction: Prediction,
) -> Tensor:
    """Return the x_0 towards which one step goes from x_t to where two of the teacher's end."""
    levels, between = levels.to(place.device), between.to(place.device)
    x = x_t
    for t, after in ((levels[place], between[place]), (between[place], levels[place + 1])):
        x_0, eps_hat = _split(teacher(x, t, labels), x, t, schedule, prediction)
        signal, noise = _scales(after, schedule)
        x = signal * x_0 + noise * eps_hat
    (s, n), (s_end, n_end) = _scales(levels[place], schedule), _scales(levels[place + 1], schedule)
    return (x - n_end / n * x_t) / (s_end - n_end / n * s)


def _grids(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """Return the student's levels with -1 at their end, and the teacher's between them."""
    fine = timesteps(schedule.num_steps, 2 * steps)
    # Every other level of the teacher's is one of the student's: both are spaced from the noise.
    assert fine[::2] == timesteps(schedule.num_steps, steps)
    return torch.tensor([*fine[::2], -1]), torch.tensor(fine[1::2])


def _split(
    output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> tuple[Tensor, Tensor]:
    """Return (x0_hat, eps_hat) of a network's output at steps t (batch,)."""
    signal, noise = _scales(t, schedule)
    if prediction == "velocity":
        return signal * x_t - noise * output, signal * output + noise * x_t
    return (x_t - noise * output) / signal, output


def _scales(t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return s_t and n_t, (batch, 1, 1)."""
    # Indexed from the end, step -1 finds x_0's.
    alpha_bar = torch.cat([schedule.alpha_bar, schedule.alpha_bar.new_ones(1)])[t][:, None, None]
    return alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
