"""The convolution by the compiled extension, on the processor; csrc/fftconv.cpp.

K holds, per group of features and frequency, the half-length spectra of the even and of the odd
samples of the kernel on its circle, side by side in lanes of one value a feature.
"""

from __future__ import annotations

from torch import Tensor

from sssd_hpc.ops import native
from sssd_hpc.ops.fftconv.plain import circle


def spectrum_shape(H: int, L: int) -> tuple[int, ...]:
    """Return the shape of K: groups of 16 features, frequencies, planes of even and odd, lanes.

    A group is 16 lanes of float32; of float64 it is two groups of 8 lanes, one after the other.
    """
    return -(-H // 16), circle(L) // 4 + 1, 4, 16


def prepare(k: Tensor, D: Tensor) -> Tensor:
    """Return the spectrum K of both kernels (2, H, L) and the skip (H,)."""
    K: Tensor = native.load().fftconv_prepare(k, D)
    return K


def prepare_backward(dK: Tensor, H: int, L: int) -> tuple[Tensor, Tensor]:
    """Return (dk (2, H, L), dD (H,)): the adjoint of `prepare`."""
    gradients: tuple[Tensor, Tensor] = native.load().fftconv_prepare_backward(dK, H, L)
    return gradients


def forward(u: Tensor, K: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (y, pre); arguments as in plain.py."""
    outputs: tuple[Tensor, Tensor] = native.load().fftconv_forward(u, K, activation == "gelu", keep)
    return outputs


def backward(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return (du, dK); arguments as in plain.py."""
    gradients: tuple[Tensor, Tensor] = native.load().fftconv_backward(
        dy, u, K, pre, activation == "gelu"
    )
    return gradients
