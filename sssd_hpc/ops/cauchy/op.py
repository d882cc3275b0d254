"""The public Cauchy op: checks at the door, float32 or float64 whatever the autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends


def cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
    """Sum v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)) over the stored states n.

    Args:
        v: numerators, complex (..., N2).
        z: nodes, complex (..., L); leading dimensions broadcast against those of v and w.
        w: poles, complex (..., N2), one of each conjugate pair.
        backend: auto, reference, torch, cpp, keops or triton.

    Returns:
        Complex (..., L), complex128 if any input is, else complex64.

    Raises:
        UserError: inputs that are not complex or do not broadcast, unusable backend.

    Source: S4 (arXiv:2111.00396), section 3.2.
    """
    for name, tensor in (("v", v), ("z", z), ("w", w)):
        if not tensor.is_complex() or tensor.dim() < 1:
            raise UserError(
                f"cauchy: {name} is {tensor.dtype} {tuple(tensor.shape)}; "
                "it must be complex with at least one dimension"
            )
    try:
        torch.broadcast_shapes(v.shape, w.shape)
        torch.broadcast_shapes(v.shape[:-1], w.shape[:-1], z.shape[:-1])
    except RuntimeError as error:
        raise UserError(
            f"cauchy: v {tuple(v.shape)}, z {tuple(z.shape)}, w {tuple(w.shape)} do not fit; "
            "v and w are (..., N/2), z is (..., L)"
        ) from error
    double = torch.complex128 in (v.dtype, z.dtype, w.dtype)
    dtype = torch.complex128 if double else torch.complex64
    run = backends.choose("cauchy", backend)
    with torch.autocast(v.device.type, enabled=False):
        return run(v.to(dtype), z.to(dtype), w.to(dtype))


def one_row(run: backends.Run) -> Tensor:
    """Run the smallest sum through a backend: one pair, one node."""
    one = torch.ones(1, dtype=torch.complex64)
    return run(one, 1j * one, -one)
