"""The Cauchy sum in plain torch, all states of a few rows at once, forward and backward.

The two quotients of a pair are not merged: the squared node of the merged form overflows float32
near omega = -1, where |z| reaches 1e16. For the same reason gradients square the reciprocal.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Not tensor.conj(): its lazy mark is lost inside a custom op under torch.compile.
conj = torch.conj_physical
# Quotients in flight at once.
BLOCK = 1 << 20


def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Return r (R, L, 2) of v, w (R, N2, 2) and z (R or 1, L, 2)."""
    v, z, w = (torch.view_as_complex(t) for t in (v, z, w))
    blocks = []
    for rows in _blocks(v, z):
        up, down = _reciprocals(z if z.shape[0] == 1 else z[rows], w[rows])
        v_n = v[rows, :, None]
        blocks.append((v_n * up + conj(v_n) * down).sum(1))
    return torch.view_as_real(torch.cat(blocks))


def backward(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dv, dz, dw) from g (R, L, 2); dz is empty unless `need_z`.

    dv = sum_l g conj(1/(z - w)) + conj(g) / (z - conj w), dw the same with squared reciprocals and
    times conj v; dz is the sum over n of -g times the conjugate derivative.
    """
    G, v, z, w = (torch.view_as_complex(t) for t in (g, v, z, w))
    dv, dw = torch.empty_like(v), torch.empty_like(w)
    dz = torch.zeros_like(z)
    for rows in _blocks(v, z):
        up, down = _reciprocals(z if z.shape[0] == 1 else z[rows], w[rows])
        G_l, v_n = G[rows, None], v[rows, :, None]
        dv[rows] = (G_l * conj(up) + conj(G_l) * down).sum(-1)
        up, down = up.square(), down.square()
        dw[rows] = conj(v[rows]) * (G_l * conj(up) + conj(G_l) * down).sum(-1)
        if need_z:
            slope = -(G_l * conj(v_n * up + conj(v_n) * down)).sum(1)
            if z.shape[0] == 1:
                dz += slope.sum(0)
            else:
                dz[rows] = slope
    slopes = torch.view_as_real(dz) if need_z else g.new_empty(0)
    return torch.view_as_real(dv), slopes, torch.view_as_real(dw)


def _reciprocals(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / (z - w) and 1 / (z - conj w), each (rows, N2, L)."""
    z, w = z[:, None], w[..., None]
    return 1 / (z - w), 1 / (z - conj(w))


def _blocks(v: Tensor, z: Tensor) -> list[slice]:
    rows = max(BLOCK // (v.shape[1] * z.shape[1]), 1)
    return [slice(start, start + rows) for start in range(0, v.shape[0], rows)]
