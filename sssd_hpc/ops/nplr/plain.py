"""The kernel's spectrum in plain torch: real arithmetic without poles, forward and backward.

With w, B, P scaled by dt, v_ij = X_i Y_j, a = 2 Re v, b = 2 Re(v conj w) and the node's cosine and
sine c, s of theta/2, one reciprocal p + i q = 1/d serves every product of a state:

    d = (c wr)^2 + (c wi - 2 s)(c wi + 2 s) - 4 i s c wr
    R_ij = sum_n (-c b p - 2 s a q) + i (2 s a p - c b q)
    k_f = (c + i s)(R_BC - gamma R_PC),   gamma = c R_BQ / (1 + c R_PQ)

That all share it, to the last bit, is what keeps k_f accurate near the resonance c wi = 2 s:
docs/math.md, section 3; it derives both directions. Features are taken a few at a time, so that 1/d
of all states stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Not tensor.conj(): its lazy mark is lost inside a custom op under torch.compile.
conj = torch.conj_physical
# Elements of p and q each that are in flight at once.
BLOCK = 1 << 18


def forward(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return k_f (channels, H, F, 2).

    Args:
        a, b: (2, rows, H, N2), products of B and of P with every C and, unless gamma is given, Q.
        wr, wi: (H, N2) real and imaginary part of w dt.
        c, s: (F,) as `half_angles` returns them.
        gamma: the Woodbury factor (H, F, 2), or None to compute it from the rows of Q.
    """
    blocks = [
        torch.view_as_real(_spectrum(a[:, :, h], b[:, :, h], wr[h], wi[h], c, s, _at(gamma, h))[-1])
        for h in _blocks(wr, c)
    ]
    return torch.cat(blocks, dim=1)


def backward(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    wr: Tensor,
    wi: Tensor,
    c: Tensor,
    s: Tensor,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (da, db, dwr, dwi) from g = dL/dRe k_f, dL/dIm k_f; the last two empty with gamma."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    dwr = torch.empty_like(wr) if gamma is None else wr.new_empty(0)
    dwi = torch.empty_like(wi) if gamma is None else wi.new_empty(0)
    for h in _blocks(wr, c):
        a_h, b_h, wr_h, wi_h = a[:, :, h], b[:, :, h], wr[h], wi[h]
        p, q, R, factor, _ = _spectrum(a_h, b_h, wr_h, wi_h, c, s, _at(gamma, h))
        G_BC = torch.view_as_complex(g[:, h]) * torch.complex(c, -s)
        G = torch.stack([G_BC, -conj(factor) * G_BC])
        if gamma is None:
            u = 1 / (1 + c * R[1, -1])
            G_gamma = -(conj(R[1, :-1]) * G_BC).sum(0)
            G_Q = torch.stack([c * conj(u) * G_gamma, -c * conj(factor * u) * G_gamma])
            G = torch.cat([G, G_Q[:, None]], dim=1)
        sG, cG = 2 * s * G, c * G
        # (h, rows, F) against (h, F, N2): every sum over nodes is one small matrix product.
        left = torch.stack([sG.imag, sG.real, cG.real, cG.imag]).flatten(0, 2).transpose(0, 1)
        on_p, on_q = left @ p.mT, left @ q.mT
        shape = (4, *G.shape[:2])
        on_p = on_p.transpose(0, 1).unflatten(0, shape)
        on_q = on_q.transpose(0, 1).unflatten(0, shape)
        da[:, :, h] = on_p[0] - on_q[1]
        db[:, :, h] = -(on_p[2] + on_q[3])
        if gamma is None:
            dwr[h], dwi[h] = _pole_gradients(G, a_h, b_h, wr_h, wi_h, c, s, p, q)
    return da, db, dwr, dwi


def _spectrum(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return p, q (H, N2, F), R (2, rows, H, F), gamma (H, F) and k_f (channels, H, F)."""
    p, q, R = _sums(a, b, wr, wi, c, s)
    if gamma is None:
        factor, C = c * R[0, -1] / (1 + c * R[1, -1]), R[:, :-1]
    else:
        factor, C = torch.view_as_complex(gamma), R
    return p, q, R, factor, torch.complex(c, s) * (C[0] - factor * C[1])


def _sums(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    cw, cv = c * wr[..., None], c * wi[..., None]
    dr = cw.square() + (cv - 2 * s) * (cv + 2 * s)
    di = -4 * s * cw
    inverse = 1 / (dr.square() + di.square())
    p, q = dr * inverse, -di * inverse
    rows = torch.stack([a, b]).flatten(0, 2).transpose(0, 1)
    shape = (2, *a.shape[:2])
    ap, bp = (rows @ p).transpose(0, 1).unflatten(0, shape)
    aq, bq = (rows @ q).transpose(0, 1).unflatten(0, shape)
    return p, q, torch.complex(-c * bp - 2 * s * aq, 2 * s * ap - c * bq)


def _pole_gradients(
    G: Tensor,
    a: Tensor,
    b: Tensor,
    wr: Tensor,
    wi: Tensor,
    c: Tensor,
    s: Tensor,
    p: Tensor,
    q: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return dwr, dwi (H, N2): the gradient of every sum through d."""
    # x = sum_j conj(2 i s a_j - c b_j) G_j, one small matrix product a feature.
    GT = G.flatten(0, 1).transpose(0, 1)
    aT, bT = (t.flatten(0, 1).permute(1, 2, 0).to(GT.dtype) for t in (a, b))
    x = -2j * s * (aT @ GT) - c * (bT @ GT)
    dd = -conj(torch.complex(p, q)).square() * x
    dwr = (2 * c.square() * wr[..., None] * dd.real - 4 * s * c * dd.imag).sum(-1)
    dwi = (2 * c.square() * wi[..., None] * dd.real).sum(-1)
    return dwr, dwi


def _blocks(wr: Tensor, c: Tensor) -> list[slice]:
    """Cut the features into blocks of about BLOCK elements of p."""
    H, N2 = wr.shape
    rows = max(BLOCK // (N2 * c.numel()), 1)
    return [slice(start, start + rows) for start in range(0, H, rows)]


def _at(gamma: Tensor | None, h: slice) -> Tensor | None:
    return None if gamma is None else gamma[h]
