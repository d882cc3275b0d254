"""Denoising diffusion on ECGs: noise schedule, loss and sampler as pure functions of a denoiser.

Knows no network: a denoiser is any callable `eps_hat = denoiser(x_t, t, labels)`.
"""

from sssd_hpc.diffusion.capture import captured
from sssd_hpc.diffusion.loss import epsilon_loss, velocity_loss
from sssd_hpc.diffusion.samplers import Denoiser, ancestral_sample, from_velocity, guided
from sssd_hpc.diffusion.schedule import NoiseSchedule, q_sample

__all__ = [
    "Denoiser",
    "NoiseSchedule",
    "ancestral_sample",
    "captured",
    "epsilon_loss",
    "from_velocity",
    "guided",
    "q_sample",
    "velocity_loss",
]
