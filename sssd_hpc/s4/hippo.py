"""HiPPO-LegS, its NPLR form and the length correction of C, all in float64.

It knows no layer and draws no random number. Legend: N state size, N2 = N/2 stored states, H
features, V the eigenvectors, Lambda the eigenvalues: A = V (diag(Lambda) - P P^*) V^*.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Complex, Float
from torch import Tensor


class Nplr(NamedTuple):
    """One of each conjugate pair of HiPPO-LegS in the basis of its eigenvectors."""

    w: npt.NDArray[np.complex128]
    """Eigenvalues Lambda, (N2,), real part -1/2, imaginary part positive and rising."""
    P: npt.NDArray[np.complex128]
    """Low-rank column V^* sqrt(n + 1/2), (N2,)."""
    B: npt.NDArray[np.complex128]
    """Input vector V^* sqrt(2n + 1), (N2,)."""
    V: npt.NDArray[np.complex128]
    """Eigenvectors, (N, N2); the other half of them is their conjugate."""


def legs(N: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the dense HiPPO-LegS matrix A (N, N) and input vector B (N,).

    Source: HiPPO (arXiv:2008.07669), theorem 2; S4 (arXiv:2111.00396), equation 2.
    """
    n = np.arange(N, dtype=np.float64)
    root = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1), root


@functools.lru_cache(maxsize=8)
def nplr(N: int) -> Nplr:
    """Return the NPLR form of HiPPO-LegS for an even state size N.

    A + P P^T is -1/2 plus a skew-symmetric matrix, so i times the skew part is Hermitian: its
    eigenvectors are orthonormal to rounding, which the general eigenproblem would not promise.

    Source: S4 (arXiv:2111.00396), theorem 1 and appendix C.1.
    """
    assert N > 0
    assert N % 2 == 0
    A, B = legs(N)
    P = np.sqrt(np.arange(N) + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(N)
    frequency, V = np.linalg.eigh(-1j * skew)
    # Ascending, in pairs of opposite sign: the upper half is one of each pair.
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    to_modes = V.conj().T.astype(np.complex128)
    return Nplr(-0.5 + 1j * frequency, to_modes @ P, to_modes @ B, V)


def correct_length(
    C: Complex[Tensor, "channels H N2"], log_dt: Float[Tensor, " H"], L: int
) -> Complex[Tensor, "channels H N2"]:
    """Return C_tilde = C (I - dA^L), dA the bilinear discretisation of HiPPO-LegS by exp(log_dt).

    The pairs C and conj(C) are one real vector in the basis of the dense matrix, where the power
    is taken in real float64 arithmetic.

    Source: S4 (arXiv:2111.00396), algorithm 1 step 1 and appendix C.3.
    """
    N = 2 * C.shape[-1]
    V = torch.tensor(nplr(N).V, device=C.device)
    A = torch.tensor(legs(N)[0], device=C.device)
    half_step = 0.5 * log_dt.double().exp()[:, None, None] * A
    eye = torch.eye(N, dtype=torch.float64, device=C.device)
    # LegS is lower triangular, and so are dA and its powers.
    dA = torch.linalg.solve_triangular(eye - half_step, eye + half_step, upper=False)
    dense = 2 * (C.to(torch.complex128) @ V.mH).real
    moved = dense.transpose(0, 1)
    power, remaining = dA, L
    while remaining:
        if remaining & 1:
            moved = moved @ power
        remaining >>= 1
        if remaining:
            power = power @ power
    corrected: Tensor = (dense - moved.transpose(0, 1)).to(V.dtype) @ V
    return corrected
