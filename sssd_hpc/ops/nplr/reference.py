"""The textbook kernel in complex arithmetic: the truth that other backends are tested against.

It shares no code with them, keeps no memory in mind, and is slow.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def run(
    w: Complex[Tensor, "H N2"],
    P: Complex[Tensor, "H N2"],
    Q: Complex[Tensor, "H N2"],
    B: Complex[Tensor, "H N2"],
    C: Complex[Tensor, "channels H N2"],
    log_dt: Float[Tensor, " H"],
    L: int,
    half: bool,
    nodes: tuple[Complex[Tensor, " F"], Complex[Tensor, " F"]] | None = None,
) -> Float[Tensor, "channels H L"]:
    """Evaluate the generating function at the roots of unity and invert it.

    With omega = exp(-2 pi i j / L) and z = 2 (1 - omega) / (1 + omega):
    k_f = 2 / (1 + omega) (r_BC - r_BQ r_PC / (1 + r_PQ)), r_XY = dt sum_n X_n Y_n / (z - dt w_n)
    plus, unless `half`, the same over the conjugate states. Where omega is -1 (even L) z has a pole
    and the limit is taken: dt Re sum_n B_n C_n, half of it for `half`.

    Args:
        w, P, Q, B, C, log_dt, L, half: as in `nplr_kernel`.
        nodes: (omega, z) to use instead of the exact ones, as stored in public checkpoints; their
            rounded omega never reaches -1, so no limit is taken.

    Source: S4 (arXiv:2111.00396), Algorithm 1 and appendix C.3.
    """
    dt = log_dt.exp()[:, None]
    if nodes is None:
        index = torch.arange(L // 2 + 1, dtype=torch.float64, device=w.device)
        omega = torch.polar(torch.ones_like(index), -2 * math.pi * index / L)
        if L % 2 == 0:
            omega = omega[:-1]
        z = 2 * (1 - omega) / (1 + omega)
    else:
        omega, z = nodes
    omega, z = omega.to(w.dtype), z.to(w.dtype)

    def r(X: Tensor, Y: Tensor) -> Tensor:
        v = (X * Y)[..., None]
        pole = (w * dt)[..., None]
        total = v / (z - pole)
        if not half:
            total = total + v.conj() / (z - pole.conj())
        return dt * total.sum(-2)

    k_f = 2 / (1 + omega) * (r(B, C) - r(B, Q) * r(P, C) / (1 + r(P, Q)))
    if nodes is None and L % 2 == 0:
        limit = dt[:, 0] * (B * C).sum(-1).real * (0.5 if half else 1.0)
        k_f = torch.cat([k_f, limit[..., None].to(k_f.dtype)], dim=-1)
    k: Tensor = torch.fft.irfft(k_f, n=L)
    return k
