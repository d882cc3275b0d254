"""The kernel's spectrum by the compiled extension, on the processor; csrc/nplr.cpp."""

from __future__ import annotations

from torch import Tensor

from sssd_hpc.ops import native


def forward(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return k_f (channels, H, F, 2); arguments as in plain.py."""
    k_f: Tensor = native.load().nplr_forward(a, b, wr, wi, c, s, gamma)
    return k_f


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
    """Return (da, db, dwr, dwi); arguments as in plain.py."""
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = native.load().nplr_backward(
        g, a, b, wr, wi, c, s, gamma
    )
    return gradients
