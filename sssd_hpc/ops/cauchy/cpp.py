"""The Cauchy sum by the compiled extension, on the processor; csrc/cauchy.cpp."""

from __future__ import annotations

from torch import Tensor

from sssd_hpc.ops import native


def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Return r (R, L, 2); arguments as in plain.py."""
    r: Tensor = native.load().cauchy_forward(v, z, w)
    return r


def backward(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dv, dz, dw); arguments as in plain.py, dz empty unless `need_z`."""
    gradients: tuple[Tensor, Tensor, Tensor] = native.load().cauchy_backward(g, v, z, w, need_z)
    return gradients
