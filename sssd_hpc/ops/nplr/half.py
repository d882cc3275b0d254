"""The kernel of the stored states without their conjugates, in plain torch with autograd.

It is another function than the S4 kernel: the one that the public code computes without its CUDA
extension. For old checkpoints only. The same removal of the pole as in plain.py, with
1/d = p + i q of a single state: R = sum_n v / d, d = 2 i s - c w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.ops.nplr.nodes import half_angles


def run(w: Tensor, P: Tensor, Q: Tensor, B: Tensor, C: Tensor, log_dt: Tensor, L: int) -> Tensor:
    """Generate the kernels (channels, H, L); arguments as in `nplr_kernel`."""
    dt = log_dt.exp()[:, None]
    c, s = half_angles(L, dt.dtype, dt.device)
    # (2, channels + 1, H, N2): the products of B and of P with every C and with Q.
    v = torch.stack([B * dt, P * dt])[:, None] * torch.cat([C, Q[None]])
    pole = (w * dt)[..., None]
    dr, di = -c * pole.real, 2 * s - c * pole.imag
    inverse = torch.complex(dr, -di) / (dr.square() + di.square())
    rows = v.flatten(0, 1).transpose(0, 1)
    R = (rows @ inverse).transpose(0, 1).unflatten(0, v.shape[:2])
    k_f = torch.complex(c, s) * (R[0, :-1] - c * R[0, -1] / (1 + c * R[1, -1]) * R[1, :-1])
    k: Tensor = torch.fft.irfft(k_f, n=L)
    return k
