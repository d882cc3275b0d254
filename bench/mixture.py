"""A diffusion problem whose answer is known: labelled Gaussian mixtures with their exact noise.

The signals are points in the plane, x (B, 1, 2). Label 1 asks for the components of class 1, label
0 for the others, -1 (unknown) for all; the estimate of the noise is the true conditional mean, so
that whatever a sampler gets wrong is its own error.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from sssd_hpc.diffusion import Denoiser, NoiseSchedule


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians: `means` (C, 2), `stds`, `shares` and `classes` (0 or 1), C each."""

    means: tuple[tuple[float, float], ...]
    stds: tuple[float, ...]
    shares: tuple[float, ...]
    classes: tuple[int, ...]

    def eps(self, x: Tensor, alpha_bar: float, labels: Tensor) -> Tensor:
        """Return E[eps | x_t = x], labels (B, 1), computed in float64 and returned like x."""
        means, stds, shares = (
            torch.tensor(column, dtype=torch.float64)
            for column in (self.means, self.stds, self.shares)
        )
        variance = alpha_bar * stds.square() + 1.0 - alpha_bar
        distance = x.double() - math.sqrt(alpha_bar) * means
        exponent = -distance.square().sum(-1) / (2.0 * variance)
        log_density = shares.log() - variance.log() + exponent
        wanted = (labels == torch.tensor(self.classes)) | (labels < 0)
        weights = log_density.masked_fill(~wanted, -math.inf).softmax(1)[..., None]
        pull = (weights * distance / variance[:, None]).sum(1, keepdim=True)
        return (math.sqrt(1.0 - alpha_bar) * pull).to(x.dtype)

    def denoiser(self, schedule: NoiseSchedule) -> Denoiser:
        """Return the exact denoiser; all rows have one t."""
        levels = schedule.alpha_bar.double().tolist()
        return lambda x_t, t, labels: self.eps(x_t, levels[int(t[0])], labels)

    def solution(
        self, x_T: Tensor, labels: Tensor, schedule: NoiseSchedule, weight: float = 0.0, t: int = -1
    ) -> Tensor:
        """Return x_t (x_0 for t = -1) of the guided probability-flow ODE, in float64.

        dy/dr = eps in y = x / sqrt(alpha_bar) and the noise level r, by Dormand and Prince's
        method of order 8 with a relative tolerance of 1e-11.
        """
        first = schedule.num_steps - 1

        def slope(level: float, flat: NDArray[np.float64]) -> NDArray[np.float64]:
            alpha_bar = 1.0 / (1.0 + level**2)
            x = math.sqrt(alpha_bar) * torch.from_numpy(flat).view(x_T.shape)
            eps = self.eps(x, alpha_bar, labels)
            if weight != 0.0:
                unknown = self.eps(x, alpha_bar, torch.full_like(labels, -1))
                eps = eps + weight * (eps - unknown)
            return np.asarray(eps.numpy()).ravel()

        span = (schedule.noise_level(first), schedule.noise_level(t))
        begin = (x_T.double() / math.sqrt(schedule.alpha_bar_at(first))).numpy().ravel()
        path = solve_ivp(slope, span, begin, method="DOP853", rtol=1e-11, atol=1e-12)
        y = torch.from_numpy(path.y[:, -1]).view(x_T.shape)
        return math.sqrt(schedule.alpha_bar_at(t)) * y


# Three blobs, the first a class of its own.
THREE = Mixture(
    means=((1.0, 0.3), (-0.8, 0.6), (0.2, -1.0)),
    stds=(0.35, 0.5, 0.4),
    shares=(0.5, 0.3, 0.2),
    classes=(1, 0, 0),
)
