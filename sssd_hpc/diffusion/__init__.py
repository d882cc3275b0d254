"""Denoising diffusion on ECGs: noise schedule, losses and samplers as pure functions of a denoiser.

Knows no network: a denoiser is any callable `eps_hat = denoiser(x_t, t, labels)`.
"""

from sssd_hpc.diffusion.capture import captured
from sssd_hpc.diffusion.denoiser import Denoiser, from_velocity, guided
from sssd_hpc.diffusion.distill import distillation_loss
from sssd_hpc.diffusion.grid import timesteps
from sssd_hpc.diffusion.loss import epsilon_loss, velocity_loss
from sssd_hpc.diffusion.samplers import ancestral_sample, ddim_sample, dpmpp_sample, plms_sample
from sssd_hpc.diffusion.schedule import NoiseSchedule, q_sample
from sssd_hpc.diffusion.splitting import split_sample

__all__ = [
    "Denoiser",
    "NoiseSchedule",
    "ancestral_sample",
    "captured",
    "ddim_sample",
    "distillation_loss",
    "dpmpp_sample",
    "epsilon_loss",
    "from_velocity",
    "guided",
    "plms_sample",
    "q_sample",
    "split_sample",
    "timesteps",
    "velocity_loss",
]
