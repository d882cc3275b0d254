"""The noise schedule and the forward (noising) process.

Refuses schedules that are not a valid variance-preserving chain; holds numbers only.

Legend: t counts 0..num_steps-1, alpha = 1 - beta, alpha_bar = running product of alpha,
sigma = standard deviation of the reverse step. Source: Ho et al., DDPM (arXiv 2006.11239).
"""

from __future__ import annotations

import math
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
        cls,
        *,
        num_steps: int = 200,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Build the paper's schedule: beta linear from `beta_start` to `beta_end`, both included.

        sigma^2 is the posterior variance beta (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); at t = 0,
        where no noise is added, sigma is sqrt(beta_0) as in the public code.

        With `zero_terminal_snr` the last step is pure noise, as sampling assumes: sqrt(alpha_bar)
        is shifted to end at 0 and scaled to keep its first value (Lin et al., arXiv 2305.08891,
        algorithm 1). The noise says nothing of x_0 there, so the network must predict velocity.

        Raises:
            ValueError: num_steps < 1, or not 0 < beta_start <= beta_end < 1; or a single step that
                is to be pure noise.
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
        schedule = cls(beta=beta, alpha=alpha, alpha_bar=alpha_bar, sigma=variance.sqrt())
        return schedule._to_zero_snr() if zero_terminal_snr else schedule

    def _to_zero_snr(self) -> NoiseSchedule:
        if self.num_steps < 2:
            raise ValueError("num_steps is 1; zero terminal SNR needs at least 2 steps")
        signal = self.alpha_bar.double().sqrt()
        first, last = signal[0], signal[-1]
        alpha_bar = ((signal - last) * first / (first - last)).square()
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        alpha = alpha_bar / before
        variance = (1.0 - alpha) * (1.0 - before) / (1.0 - alpha_bar)
        variance[0] = 1.0 - alpha[0]
        return NoiseSchedule(
            beta=(1.0 - alpha).float(),
            alpha=alpha.float(),
            alpha_bar=alpha_bar.float(),
            sigma=variance.sqrt().float(),
        )

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

    def alpha_bar_at(self, t: int) -> float:
        """Return alpha_bar_t in float64; step -1 stands for x_0, where it is 1."""
        return 1.0 if t < 0 else float(self.alpha_bar[t])

    def noise_level(self, t: int) -> float:
        """Return sqrt((1 - alpha_bar_t) / alpha_bar_t): the noise on a signal of unit scale.

        Step -1 stands for x_0, of level 0; a step of pure noise has the level infinity.
        """
        alpha_bar = self.alpha_bar_at(t)
        return math.sqrt((1.0 - alpha_bar) / alpha_bar) if alpha_bar else math.inf

    def half_log_snr(self, t: int) -> float:
        """Return lambda_t = log(sqrt(alpha_bar_t / (1 - alpha_bar_t))), infinite at x_0."""
        level = self.noise_level(t)
        return -math.log(level) if level else math.inf

    def steps_within(self, low: float, high: float) -> range:
        """Return the steps t whose noise level lies in [low, high].

        Raises:
            ValueError: not 0 <= low <= high, or no step lies there.
        """
        if not 0.0 <= low <= high:
            raise ValueError(f"the interval is {low:g} {high:g}; it must be 0 <= LOW <= HIGH")
        levels = [self.noise_level(t) for t in range(self.num_steps)]
        inside = [t for t, level in enumerate(levels) if low <= level <= high]
        if not inside:
            raise ValueError(
                f"no step's noise level lies in the interval {low:g} {high:g}; this schedule's "
                f"run from {levels[0]:.3g} to {levels[-1]:.3g}"
            )
        return range(inside[0], inside[-1] + 1)

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
