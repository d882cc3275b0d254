"""The kernel in plain torch: real arithmetic without poles, differentiable in every parameter.

Multiplying the Cauchy quotients by c, where omega = exp(-i theta), c = cos(theta/2) and
s = sin(theta/2), removes z = 2 i s / c together with its pole at omega = -1. With w, B, P scaled by
dt, r = c R, and the kernel's spectrum is

    k_f = e^{i theta/2} (R_BC - c R_BQ R_PC / (1 + c R_PQ)).

For a conjugate pair, with a = 2 Re v and b = 2 Re(v conj w):
    R = sum_n (2 i s a - c b) / d,   d = (c wr)^2 + (c wi - 2 s)(c wi + 2 s) - 4 i s c wr,
where the product form of d keeps its digits near the resonance c wi = 2 s. For a single state:
    R = sum_n v / d,   d = 2 i s - c w.
Either way the nodes enter by 1/d = p + i q alone, and every R is a product of small matrices.
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
) -> Float[Tensor, "channels H L"]:
    """Generate the kernels; arguments as in `nplr_kernel`."""
    dt = log_dt.exp()[:, None]
    w = w * dt
    rows = torch.cat([C, Q[None]])
    # (2, channels + 1, H, N2): the products of B and of P with every C and with Q.
    v = torch.stack([B * dt, P * dt])[:, None] * rows
    c, s = half_angles(L, w.real.dtype, w.device)
    R = _single_sums(v, w, c, s) if half else _pair_sums(v, w, c, s)
    R_BC, R_BQ, R_PC, R_PQ = R[0, :-1], R[0, -1], R[1, :-1], R[1, -1]
    k_f = torch.complex(c, s) * (R_BC - c * R_BQ / (1 + c * R_PQ) * R_PC)
    k: Tensor = torch.fft.irfft(k_f, n=L)
    return k


def half_angles(
    L: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
    """Return cos and sin of theta/2 = pi j / L for j = 0..L/2, rounded from float64."""
    angle = math.pi / L * torch.arange(L // 2 + 1, dtype=torch.float64, device=device)
    c, s = angle.cos(), angle.sin()
    if L % 2 == 0:
        # pi/2 is not a float64: the Nyquist node would miss c = 0 by 6e-17.
        c[-1] = 0.0
    return c.to(dtype), s.to(dtype)


def _pair_sums(v: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    wr, wi = w.real[..., None], w.imag[..., None]
    dr = (c * wr).square() + (c * wi - 2 * s) * (c * wi + 2 * s)
    di = -4 * s * c * wr
    ap, aq, bp, bq = _products(2 * v.real, 2 * (v * w.conj()).real, dr, di)
    return torch.complex(-c * bp - 2 * s * aq, 2 * s * ap - c * bq)


def _single_sums(v: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
    dr = -c * w.real[..., None]
    di = 2 * s - c * w.imag[..., None]
    ap, aq, bp, bq = _products(v.real, v.imag, dr, di)
    return torch.complex(ap - bq, aq + bp)


def _products(a: Tensor, b: Tensor, dr: Tensor, di: Tensor) -> tuple[Tensor, ...]:
    """Sum a and b (2, J, H, N2) over the states against p + i q = 1 / (dr + i di) (H, N2, F)."""
    inverse = 1 / (dr.square() + di.square())
    p, q = dr * inverse, -di * inverse
    # Features first, so that each sum is one small matrix product a feature.
    ab = torch.stack([a, b]).flatten(0, 2).transpose(0, 1)
    shape = (2, *a.shape[:2])
    out_p = (ab @ p).transpose(0, 1).unflatten(0, shape)
    out_q = (ab @ q).transpose(0, 1).unflatten(0, shape)
    return out_p[0], out_q[0], out_p[1], out_q[1]
