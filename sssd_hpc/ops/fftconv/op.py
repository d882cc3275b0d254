"""The public convolution op: checks at the door, float32 or float64 whatever the autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends


def bidirectional_conv(
    u: Tensor, k: Tensor, D: Tensor, activation: str | None = "gelu", backend: str = "auto"
) -> Tensor:
    """Convolve each feature with a forward and a backward kernel, add the skip D u, activate.

    y_i = sum_{j <= i} k0_{i-j} u_j + sum_{j > i} k1_{j-i-1} u_j + D u_i; the backward kernel begins
    one sample ahead, and its last entry never reaches the output.

    Args:
        u: input, real (batch, H, L).
        k: forward and backward kernel, real (2, H, L).
        D: skip weight, real (H,).
        activation: "gelu" (exact, by erf) or None.
        backend: auto, reference, torch, cpp, keops or triton.

    Returns:
        Real (batch, H, L), float64 if any input is, else float32.

    Raises:
        UserError: shapes that do not fit, complex input, unknown activation, unusable backend.
    """
    if activation not in ("gelu", None):
        raise UserError(f"bidirectional_conv: activation is {activation!r}; use 'gelu' or None")
    fits = u.dim() == 3 and k.shape == (2, *u.shape[1:]) and D.shape == u.shape[1:2]
    if not fits or u.is_complex() or k.is_complex() or D.is_complex():
        raise UserError(
            f"bidirectional_conv: u {tuple(u.shape)}, k {tuple(k.shape)}, D {tuple(D.shape)} "
            "do not fit; real u (batch, H, L), k (2, H, L), D (H,)"
        )
    dtype = torch.float64 if torch.float64 in (u.dtype, k.dtype, D.dtype) else torch.float32
    run = backends.choose("fftconv", backend)
    with torch.autocast(u.device.type, enabled=False):
        return run(u.to(dtype), k.to(dtype), D.to(dtype), activation)


def one_row(run: backends.Run) -> Tensor:
    """Run the smallest convolution through a backend: one feature of two samples."""
    return run(torch.ones(1, 1, 2), torch.ones(2, 1, 2), torch.ones(1), "gelu")
