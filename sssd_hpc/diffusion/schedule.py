"""The noise schedule and the forward (noising) process.

Refuses schedules that are not a valid variance-preserving chain; holds numbers only.

Legend: t counts 0..num_steps-1, alpha = 1 - beta, alpha_bar = running product of alpha,
sigma = standard deviation of the reverse step. Source: Ho et al., DDPM (arXiv 2006.11239).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """The constants of a diffusion process, each of shape (num_steps,), float32."""

    beta: Float[Tensor, " num_steps"]
    alpha: Float[Tensor, " num_steps"]
    alpha_bar: Float[Tensor, " num_steps"]
    sigma: Float[Tensor, " num_steps"]

    @classmethod
    def linear(
        cls, *, num_steps: int = 200, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Build the paper's schedule: beta linear from `beta_start` to `beta_end`, both included.

        sigma^2 is the posterior variance beta (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); at t = 0,
        where no noise is added, sigma is sqrt(beta_0) as in the public code.

        Raises:
            ValueError: num_steps < 1, or not 0 < beta_start <= beta_end < 1.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; a schedule needs at least 1 step")
        if not 0.0 < beta_start <= beta_end < 1.0:
            raise ValueError(
                f"beta runs from {beta_start} to {beta_end}; needed 0 < beta_start <= beta_end < 1"
            )
        beta = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float32)
        alpha = 1.0 - beta
        alpha_bar = alpha.clone()
        variance = beta.clone()
        # One float32 product after another: torch.cumprod may round in another order.
        for t in range(1, num_steps):
            alpha_bar[t] *= alpha_bar[t - 1]
            variance[t] *= (1.0 - alpha_bar[t - 1]) / (1.0 - alpha_bar[t])
        return cls(beta=beta, alpha=alpha, alpha_bar=alpha_bar, sigma=variance.sqrt())

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps T."""
        return self.beta.shape[0]

    @property
    def terminal_snr(self) -> float:
        """Signal-to-noise power ratio left at the last step, for data of unit variance.

        Sampling starts from pure noise, as if this were 0; the paper's schedule leaves 0.152.
        """
        last = self.alpha_bar[-1].double()
        return float(last / (1.0 - last))

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the schedule with its tensors on `device`."""
        return NoiseSchedule(
            beta=self.beta.to(device),
            alpha=self.alpha.to(device),
            alpha_bar=self.alpha_bar.to(device),
            sigma=self.sigma.to(device),
        )


def q_sample(
    x0: Float[Tensor, "batch lead length"],
    t: Int[Tensor, " batch"],
    eps: Float[Tensor, "batch lead length"],
    schedule: NoiseSchedule,
) -> Float[Tensor, "batch lead length"]:
    """Return x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, one noise level a sample."""
    alpha_bar = schedule.alpha_bar[t][:, None, None]
    return alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * eps
