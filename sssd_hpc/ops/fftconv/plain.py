"""The convolution by torch.fft, with the skip folded into the kernel's spectrum.

The circle has n >= 2L - 1 samples: the forward kernel at lags 0..L-1, the backward kernel from the
end at lags -1..-(L-1). A delta of weight D at lag 0 is the constant D in the spectrum.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import gelu


def run(
    u: Float[Tensor, "batch H L"],
    k: Float[Tensor, "2 H L"],
    D: Float[Tensor, " H"],
    activation: str | None,
) -> Float[Tensor, "batch H L"]:
    """Convolve; arguments as in `bidirectional_conv`."""
    return convolve(u, spectrum(k, D), activation)


def spectrum(k: Float[Tensor, "2 H L"], D: Float[Tensor, " H"]) -> Complex[Tensor, "H F"]:
    """Return the spectrum of both kernels and the skip on one circle of `circle(L)` samples."""
    forward, backward = k
    L = k.shape[-1]
    gap = forward.new_zeros(forward.shape[0], circle(L) - (2 * L - 1))
    both = torch.cat([forward, gap, backward[:, : L - 1].flip(-1)], dim=-1)
    kernel: Tensor = torch.fft.rfft(both) + D[:, None]
    return kernel


def convolve(
    u: Float[Tensor, "batch H L"], kernel: Complex[Tensor, "H F"], activation: str | None
) -> Float[Tensor, "batch H L"]:
    """Convolve with a spectrum made by `spectrum` for the same L."""
    L = u.shape[-1]
    n = circle(L)
    y: Tensor = torch.fft.irfft(torch.fft.rfft(u, n=n) * kernel, n=n)[..., :L]
    return y if activation is None else gelu(y)


def circle(L: int) -> int:
    """Return the smallest even n >= 2L - 1 whose prime factors are 2, 3 and 5."""
    n = 2 * L
    while not _is_smooth(n):
        n += 2
    return n


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1
