"""The Cauchy sum by KeOps, forward and backward.

Exchanging nodes and poles turns the sum into its own transpose:
sum_l conj(g_l) / (w - z_l) + g_l / (w - conj z_l) is minus the conjugate of dv, and its derivative
in w gives dw. So one formula for the sum and one for the sum with its derivative serve all.
"""

from __future__ import annotations

import torch
from torch import Tensor, conj_physical

from sssd_hpc.ops.formulas import Sum

_VARIABLES = ("z = Vi(2)", "v = Vj(2)", "w = Vj(2)")


def _inverse(difference: str) -> str:
    return f"(Conj({difference}) * Inv(SqNorm2({difference})))"


_UP, _DOWN = _inverse("(z - w)"), _inverse("(z - Conj(w))")
_R = f"(ComplexMult(v, {_UP}) + ComplexMult(Conj(v), {_DOWN}))"
# The reciprocal is squared, not the difference, which would overflow float32 where |z| is 1e16.
_SLOPE = (
    f"(Minus(ComplexMult(v, ComplexMult({_UP}, {_UP})))"
    f" - ComplexMult(Conj(v), ComplexMult({_DOWN}, {_DOWN})))"
)
_sum = Sum(_R, *_VARIABLES)
_sum_and_slope = Sum(f"Concat({_R}, {_SLOPE})", *_VARIABLES)


def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Return r (R, L, 2); arguments as in plain.py."""
    return _sum(z, v, w)


def backward(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dv, dz, dw); arguments as in plain.py, dz empty unless `need_z`."""
    # Conjugates are taken at once: a lazy one is lost where the op runs in a compiled graph.
    G, v_n = torch.view_as_complex(g), torch.view_as_complex(v)
    transposed = _sum_and_slope(w, torch.view_as_real(conj_physical(G)), z)
    dv, slope = torch.view_as_complex(transposed.unflatten(-1, (2, 2))).unbind(-1)
    dz = z.new_empty(0)
    if need_z:
        slope_z = torch.view_as_complex(_sum_and_slope(z, v, w)[..., 2:].contiguous())
        every = G * conj_physical(slope_z)
        dz = torch.view_as_real(every.sum(0, keepdim=True) if z.shape[0] == 1 else every)
    dv, dw = -conj_physical(dv.contiguous()), -conj_physical(v_n * slope)
    return torch.view_as_real(dv), dz, torch.view_as_real(dw)
