"""The Cauchy sum in plain torch, all states at once.

The two quotients of a pair are not merged: the squared node of the merged form overflows float32
near omega = -1, where |z| reaches 1e16.
"""

from __future__ import annotations

from jaxtyping import Complex
from torch import Tensor


def run(
    v: Complex[Tensor, ...], z: Complex[Tensor, ...], w: Complex[Tensor, ...]
) -> Complex[Tensor, ...]:
    """Sum the quotients over the states; arguments as in `cauchy`."""
    v, w, z = v[..., :, None], w[..., :, None], z[..., None, :]
    r: Tensor = (v / (z - w) + v.conj() / (z - w.conj())).sum(-2)
    return r
