"""The Cauchy sum one state at a time: the truth that other backends are tested against."""

from __future__ import annotations

import torch
from jaxtyping import Complex
from torch import Tensor


def run(
    v: Complex[Tensor, ...], z: Complex[Tensor, ...], w: Complex[Tensor, ...]
) -> Complex[Tensor, ...]:
    """Add the quotients of each pair; arguments as in `cauchy`."""
    v, w = torch.broadcast_tensors(v, w)
    total = torch.zeros((), dtype=z.dtype, device=z.device)
    for n in range(v.shape[-1]):
        v_n, w_n = v[..., n, None], w[..., n, None]
        total = total + v_n / (z - w_n) + v_n.conj() / (z - w_n.conj())
    return total
