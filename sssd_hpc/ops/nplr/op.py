"""The public kernel op: checks at the door, float32 or float64 whatever the autocast.

It refuses to apply the length correction: C comes as C_tilde = C (I - dA^L).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends


def nplr_kernel(
    w: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    log_dt: Tensor,
    L: int,
    backend: str = "auto",
    half: bool = False,
) -> Tensor:
    """Generate the SSM convolution kernels of A = diag(w) - P Q^T, discretised bilinearly by dt.

    k[l] = C dA^l dB for l in 0..L-1, each stored state standing for itself and its conjugate.

    Args:
        w: eigenvalues, complex (H, N2), real part below zero.
        P: low-rank column, complex (H, N2).
        Q: low-rank row, complex (H, N2), not conjugated by this function.
        B: input vector, complex (H, N2).
        C: output vectors, complex (channels, H, N2), already C (I - dA^L) for this very L.
        log_dt: natural logarithm of the step, real (H,).
        L: length in samples, at least 1; a shorter kernel is the head of this one.
        backend: auto, reference, torch, cpp, keops or triton.
        half: sum the stored states without their conjugates. This is another function, the one
            that the public code computes without its CUDA extension; for old checkpoints only.

    Returns:
        Real (channels, H, L), float64 if any input is in double precision, else float32.

    Raises:
        UserError: shapes that do not fit, inputs that are not complex, unusable backend.

    Source: Efficiently Modeling Long Sequences with Structured State Spaces (arXiv:2111.00396),
        Algorithm 1.
    """
    vectors = {"w": w, "P": P, "Q": Q, "B": B, "C": C}
    for name, vector in vectors.items():
        if not vector.is_complex():
            raise UserError(f"nplr_kernel: {name} is {vector.dtype}; it must be complex")
        if vector.shape[-2:] != w.shape or vector.dim() != (3 if name == "C" else 2):
            raise UserError(
                f"nplr_kernel: {name} has shape {tuple(vector.shape)} but w {tuple(w.shape)}; "
                "w, P, Q, B are (H, N/2), C is (channels, H, N/2)"
            )
    if log_dt.shape != w.shape[:1] or log_dt.is_complex():
        raise UserError(
            f"nplr_kernel: log_dt is {log_dt.dtype} {tuple(log_dt.shape)}; "
            f"it must be real ({w.shape[0]},)"
        )
    if L < 1:
        raise UserError(f"nplr_kernel: L is {L}; it must be at least 1")
    double = torch.float64 in (log_dt.dtype, *(vector.real.dtype for vector in vectors.values()))
    dtype = torch.complex128 if double else torch.complex64
    w, P, Q, B, C = (vector.to(dtype) for vector in vectors.values())
    run = backends.choose("nplr", backend)
    with torch.autocast(w.device.type, enabled=False):
        return run(w, P, Q, B, C, log_dt.to(w.real.dtype), L, half)


def one_row(run: backends.Run) -> Tensor:
    """Run the smallest kernel through a backend: one feature, one pair, four samples."""
    one = torch.ones(1, 1, dtype=torch.complex64)
    return run(-0.5 * one + 1j * one, one, one, one, one[None], torch.zeros(1), 4, False)
