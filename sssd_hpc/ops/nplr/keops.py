"""The kernel's spectrum by two KeOps sums, forward and backward; the mathematics is plain.py's.

A KeOps formula is compiled for fixed dimensions. Products go WIDTH at a time, so one formula over
the states and one over the nodes serve any number of channels, with gamma or without.
"""

from __future__ import annotations

import torch
from torch import Tensor, conj_physical
from torch.nn.functional import pad

from sssd_hpc.ops.formulas import Sum

# All six products of two channels; the reciprocal of a state and node costs as much as four.
WIDTH = 6
_PLANES = 2 * WIDTH

# A complex vector is WIDTH real parts, then WIDTH imaginary parts. A node is t = (c, 2 s) in this
# form, WIDTH times each; a state is w = (wr, wi), its products are y = (-b, a): R = sum t y / d,
# where t y multiplies plane by plane.
_C, _S, _WR, _WI = "Elem(t, 0)", f"Elem(t, {WIDTH})", "Elem(w, 0)", "Elem(w, 1)"
_DR = f"Square({_C} * {_WR}) + ({_C} * {_WI} - {_S}) * ({_C} * {_WI} + {_S})"
_DI = f"IntCst(-2) * {_S} * {_C} * {_WR}"
_D = f"Concat({_DR}, {_DI})"
# rho = 1 / conj(d).
_RHO = f"({_D} * Inv(SqNorm2({_D})))"
_SIGMA = f"ComplexMult({_RHO}, Real2Complex(Elem(w, 2)) + Elem(w, 3) * {_RHO})"


def _times_i(z: str) -> str:
    return f"Concat(Minus(Extract({z}, {WIDTH}, {WIDTH})), Extract({z}, 0, {WIDTH}))"


_over_states = Sum(
    f"Elem({_RHO}, 0) * (t * y) - Elem({_RHO}, 1) * {_times_i('(t * y)')}",
    *(f"t = Vi({_PLANES})", f"y = Vj({_PLANES})", "w = Vj(2)"),
)
# The transpose: t (g sigma), where sigma = alpha rho + beta rho^2 and w = (wr, wi, alpha, beta).
_over_nodes = Sum(
    f"t * (Elem({_SIGMA}, 0) * g + Elem({_SIGMA}, 1) * {_times_i('g')})",
    *(f"t = Vj({_PLANES})", f"g = Vj({_PLANES})", "w = Vi(4)"),
)


def forward(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return k_f (channels, H, F, 2); arguments as in plain.py."""
    R = _state_sums(a, b, wr, wi, c, s)
    if gamma is None:
        factor, R = c * R[0, -1] / (1 + c * R[1, -1]), R[:, :-1]
    else:
        factor = torch.view_as_complex(gamma)
    k_f = torch.complex(c, s) * (R[0] - factor * R[1])
    return torch.view_as_real(k_f.contiguous())


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
    """Return (da, db, dwr, dwi); arguments as in plain.py, dwr and dwi empty with gamma."""
    G_BC = torch.view_as_complex(g) * torch.complex(c, -s)
    if gamma is not None:
        G = torch.stack([G_BC, -conj_physical(torch.view_as_complex(gamma)) * G_BC])
        minus_db, da = _node_sums(G, wr, wi, c, s, (1.0, 0.0))
        return da, -minus_db, wr.new_empty(0), wi.new_empty(0)
    R = _state_sums(a, b, wr, wi, c, s)
    u = 1 / (1 + c * R[1, -1])
    factor = c * R[0, -1] * u
    G_gamma = -(conj_physical(R[1, :-1]) * G_BC).sum(0)
    G_Q = torch.stack([c * conj_physical(u) * G_gamma, -c * conj_physical(factor * u) * G_gamma])
    G = torch.cat([torch.stack([G_BC, -conj_physical(factor) * G_BC]), G_Q[:, None]], dim=1)
    minus_db, da = _node_sums(G, wr, wi, c, s, (1.0, 0.0))
    # -dd = sum_m (-c b_m - 2 i s a_m) Z_m with Z = rho^2 G: its moments over the nodes first, then
    # a and b, is cheaper than the reverse order, which has KeOps add within one node. Most of their
    # digits cancel between the moments, which are therefore double: 4 times the error else.
    wide = wr.double(), wi.double(), c.double(), s.double()
    G = G.to(torch.complex128)
    ccc_re, ccs_im = _node_sums(c.square() * G, *wide, (0.0, 1.0))
    css_re, _ = _node_sums(4 * s.square() * G, *wide, (0.0, 1.0))
    on_dr = (a * ccs_im - b * ccc_re).sum((0, 1))
    on_di = -(a * css_re + b * ccs_im).sum((0, 1))
    dwr, dwi = 2 * (on_di - wr * on_dr), -2 * wi * on_dr
    return da, -minus_db, dwr.to(wr.dtype), dwi.to(wi.dtype)


def _state_sums(a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Return R (2, rows, H, F), complex."""
    w = torch.stack([wr, wi], dim=-1)[:, None]
    real, imaginary = _ungroup(_over_states(_nodes(c, s), _group(-b, a), w), a.shape[1])
    R: Tensor = torch.complex(real, imaginary)
    return R


def _node_sums(
    G: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, mix: tuple[float, float]
) -> tuple[Tensor, ...]:
    """Sum c Re and 2 s Im of (alpha rho + beta rho^2) G, two tensors of a's shape."""
    alpha, beta = (torch.full_like(wr, factor) for factor in mix)
    w = torch.stack([wr, wi, alpha, beta], dim=-1)[:, None]
    return _ungroup(_over_nodes(_nodes(c, s), _group(G.real, G.imag), w), G.shape[1])


def _nodes(c: Tensor, s: Tensor) -> Tensor:
    return torch.stack([c, 2 * s], dim=-1).repeat_interleave(WIDTH, -1)[None, None]


def _group(first: Tensor, second: Tensor) -> Tensor:
    """Lay two (2, rows, H, n) out as (H, groups, n, _PLANES), padded with products of zero."""
    flat = torch.stack([first, second]).flatten(1, 2)
    flat = pad(flat, (0, 0, 0, 0, 0, -flat.shape[1] % WIDTH))
    grouped: Tensor = flat.unflatten(1, (-1, WIDTH)).permute(3, 1, 4, 0, 2).flatten(3)
    return grouped.contiguous()


def _ungroup(planes: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Undo `_group`, into storages of their own."""
    flat = planes.unflatten(-1, (2, WIDTH)).permute(3, 1, 4, 0, 2).flatten(1, 2)
    first, second = flat[:, : 2 * rows].unflatten(1, (2, rows))
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (first, second))
