"""One of the samplers with its options, by name: what a user chooses and a data card tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser, guided
from sssd_hpc.diffusion.grid import timesteps
from sssd_hpc.diffusion.samplers import ancestral_sample, ddim_sample, dpmpp_sample, plms_sample
from sssd_hpc.diffusion.schedule import NoiseSchedule
from sssd_hpc.diffusion.splitting import split_sample
from sssd_hpc.errors import UserError

DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpmpp": 20, "plms": 20, "split": 20}
"""Steps of each sampler unless others are asked for or the schedule has fewer; None: all."""

WITH_ETA = ("ddim", "dpmpp")
"""Samplers that may add noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A sampler and all of its options, for a denoiser that is not guided yet; see `choose`."""

    sampler: str = "ddpm"
    steps: int = 0
    """Levels to visit; 0: all of the schedule's."""
    eta: float = 0.0
    """How much noise a step adds, 0 none, 1 as the reverse SDE; of the samplers in WITH_ETA."""
    guidance: float = 0.0
    guidance_interval: tuple[float, ...] = ()
    """Lowest and highest noise level that is guided; empty: all are."""

    def draw(
        self,
        denoiser: Denoiser,
        x_T: Tensor,
        labels: Tensor,
        schedule: NoiseSchedule,
        noise: Callable[[int], Tensor],
    ) -> Tensor:
        """Walk from x_T (B, leads, L) to x_0, like x_T; `noise(i)` gives the noise of step i."""
        within = schedule.steps_within(*self.guidance_interval) if self.guidance_interval else None
        steps = self.steps or schedule.num_steps
        if self.sampler == "split":
            return split_sample(
                denoiser,
                x_T,
                labels,
                schedule,
                steps=steps,
                weight=self.guidance,
                interval=within,
            )
        arguments = (guided(denoiser, self.guidance, within), x_T, labels, schedule)
        if self.sampler == "ddim":
            return ddim_sample(*arguments, steps=steps, eta=self.eta, noise=noise)
        if self.sampler == "dpmpp":
            return dpmpp_sample(*arguments, steps=steps, eta=self.eta, noise=noise)
        if self.sampler == "plms":
            return plms_sample(*arguments, steps=steps)
        assert self.sampler == "ddpm"
        return ancestral_sample(*arguments, noise=noise)

    def num_calls(self, schedule: NoiseSchedule) -> int:
        """Return how often the network is called, at most."""
        twice = self.sampler == "split" and self.guidance != 0.0
        return (self.steps or schedule.num_steps) * (2 if twice else 1)


def quick(schedule: NoiseSchedule, distilled_steps: int = 0) -> Method:
    """Return the method that validation draws with: few steps, and noise that mends errors.

    DPM-Solver++ of the SDE, 20 steps; a network distilled to so many steps takes its own.
    """
    if distilled_steps:
        return choose(schedule, distilled_steps=distilled_steps)
    return choose(schedule, sampler="dpmpp", eta=1.0)


def choose(
    schedule: NoiseSchedule,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    guidance: float = 0.0,
    guidance_interval: tuple[float, ...] | None = None,
    distilled_steps: int = 0,
) -> Method:
    """Return a method whose options fit each other, the schedule and the network.

    A network distilled to so many steps is for ddim with them; without a sampler others take ddpm.

    Raises:
        UserError: they do not; the message names the flag of `sssd-hpc sample`.
    """
    if distilled_steps:
        if sampler not in (None, "ddim") or steps not in (None, distilled_steps) or eta:
            raise UserError(
                f"the model was distilled to sample by ddim in {distilled_steps} steps without "
                "noise; leave out --sampler, --steps and --eta"
            )
        sampler, steps = "ddim", distilled_steps
    sampler = sampler or "ddpm"
    if sampler not in DEFAULT_STEPS:
        raise UserError(f"--sampler is {sampler!r}; samplers are {', '.join(DEFAULT_STEPS)}")
    num_steps = schedule.num_steps
    if steps is None:
        steps = min(DEFAULT_STEPS[sampler] or num_steps, num_steps)
    if sampler == "ddpm" and steps != num_steps:
        raise UserError(
            f"--steps is {steps}; ddpm takes all {num_steps} steps of the model's schedule: leave "
            f"--steps out, or use --sampler ddim or dpmpp for fewer"
        )
    try:
        timesteps(num_steps, steps)
    except ValueError as error:
        raise UserError(
            f"--steps is {steps}; the model's schedule allows 1 to {num_steps}"
        ) from error
    if eta is not None and sampler not in WITH_ETA:
        raise UserError(
            f"--eta is {eta:g} but {sampler} has no eta; leave it out or use "
            f"{' or '.join(WITH_ETA)}"
        )
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise UserError(
            f"--eta is {eta:g}; it must be in [0, 1] (0 draws no noise, 1 is ancestral)"
        )
    if not (math.isfinite(guidance) and guidance >= 0.0):
        raise UserError(f"--guidance is {guidance}; it must be finite and at least 0 (0 is off)")
    interval = () if guidance_interval is None else tuple(map(float, guidance_interval))
    if interval and guidance == 0.0:
        raise UserError("--guidance-interval is given but --guidance is 0; give both or neither")
    if interval and not all(map(math.isfinite, interval)):
        raise UserError(f"--guidance-interval is {interval}; both ends must be finite")
    if interval:
        try:
            schedule.steps_within(*interval)
        except ValueError as error:
            raise UserError(f"--guidance-interval: {error}") from error
    return Method(
        sampler=sampler,
        steps=steps,
        eta=eta or 0.0,
        guidance=float(guidance),
        guidance_interval=interval,
    )
