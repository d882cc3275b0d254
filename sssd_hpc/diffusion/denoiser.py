"""What a sampler walks with: a callable that estimates noise, and what may be made of a network.

Knows no network. Guidance and velocity are wrappers, so that a sampler sees one denoiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sssd_hpc.diffusion.schedule import NoiseSchedule

Denoiser: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""eps_hat = denoiser(x_t (B, leads, L), t (B,) int64, labels (B, num_labels) int64)."""


@dataclasses.dataclass(frozen=True)
class VelocityDenoiser:
    """The denoiser of a network trained by `velocity_loss`.

    eps_hat = sqrt(alpha_bar_t) v_hat + sqrt(1 - alpha_bar_t) x_t. Samplers take x_0 from v_hat as
    well, so that they can start where alpha_bar is 0 and the noise says nothing of the signal.

    Source: Salimans and Ho, Progressive distillation (arXiv 2202.00512), appendix D.
    """

    network: Denoiser
    schedule: NoiseSchedule

    def __call__(
        self,
        x_t: Float[Tensor, "batch lead length"],
        t: Int[Tensor, " batch"],
        labels: Int[Tensor, "batch label"],
    ) -> Float[Tensor, "batch lead length"]:
        """Return the estimate of the noise in x_t."""
        alpha_bar = self.schedule.alpha_bar.to(x_t.device)[t][:, None, None]
        v_hat = self.network(x_t, t, labels)
        return alpha_bar.sqrt() * v_hat + (1.0 - alpha_bar).sqrt() * x_t


def from_velocity(network: Denoiser, schedule: NoiseSchedule) -> VelocityDenoiser:
    """Return the denoiser of a network trained by `velocity_loss`."""
    return VelocityDenoiser(network, schedule)


def wrapped(denoiser: Denoiser, wrap: Callable[[Denoiser], Denoiser]) -> Denoiser:
    """Apply `wrap` to the network of a denoiser, so that one of velocity stays one of velocity."""
    if isinstance(denoiser, VelocityDenoiser):
        return dataclasses.replace(denoiser, network=wrap(denoiser.network))
    return wrap(denoiser)


def in_bfloat16(network: Denoiser, device: torch.device) -> Denoiser:
    """Return the network with its products taken in bfloat16; what goes in and out is float32."""

    def call(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return network(x_t, t, labels).float()

    return call


def guided(denoiser: Denoiser, weight: float, interval: range | None = None) -> Denoiser:
    """Return a denoiser with classifier-free guidance: (1 + w) eps(labels) - w eps(unknown).

    Both estimates come from one call on a doubled batch, with every label unknown (-1) in the
    second half. Weight 0 is the denoiser itself. With an `interval` of steps t (as from
    `NoiseSchedule.steps_within`) the rest is not guided and not doubled; all rows must then have
    one t, as in every sampler.

    Source: Ho and Salimans, Classifier-free diffusion guidance (arXiv 2207.12598), equation 6;
    Kynkaanniemi et al., Applying guidance in a limited interval (arXiv 2404.07724).
    """
    if weight == 0.0:
        return denoiser

    def wrap(network: Denoiser) -> Denoiser:
        def guided_network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            if interval is not None and int(t[0]) not in interval:
                return network(x_t, t, labels)
            known, unknown = both(network, x_t, t, labels)
            return (1.0 + weight) * known - weight * unknown

        return guided_network

    return wrapped(denoiser, wrap)


def both(network: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a network's outputs for `labels` and for unknown labels, from one doubled call."""
    doubled = torch.cat([labels, torch.full_like(labels, -1)])
    known, unknown = network(torch.cat([x_t, x_t]), torch.cat([t, t]), doubled).chunk(2)
    return known, unknown
