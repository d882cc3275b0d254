"""The convolution by torch.fft, with the skip folded into the kernel's spectrum.

The circle has n >= 2L - 1 samples: the forward kernel at lags 0..L-1, the backward kernel from the
end at lags -1..-(L-1). A delta of weight D at lag 0 is the constant D in the spectrum.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, pad


def run(
    u: Float[Tensor, "batch H L"],
    k: Float[Tensor, "2 H L"],
    D: Float[Tensor, " H"],
    activation: str | None,
) -> Float[Tensor, "batch H L"]:
    """Convolve; arguments as in `bidirectional_conv`."""
    y: Tensor = _Convolution.apply(u, k, D)
    return y if activation is None else gelu(y)


class _Convolution(torch.autograd.Function):
    """The convolution with its backward in real transforms.

    Autograd would differentiate rfft and irfft through complex transforms of the full circle. The
    transposed convolution is one with the conjugate spectrum, the kernel's gradient one circular
    correlation: with G the spectrum of the output's gradient, du = irfft(G conj K) and
    r = irfft(sum_b G conj U), of which lags 0..L-1 are dk0, lags -1..-(L-1) are dk1, lag 0 is dD.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, D: Tensor) -> Tensor:
        L = u.shape[-1]
        U, K = torch.fft.rfft(u, n=circle(L)), spectrum(k, D)
        ctx.save_for_backward(U, K)
        ctx.length = L
        y: Tensor = torch.fft.irfft(U * K, n=circle(L))[..., :L].contiguous()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        U, K = ctx.saved_tensors
        L, n = ctx.length, circle(ctx.length)
        G = torch.fft.rfft(dy, n=n)
        du = torch.fft.irfft(G * K.conj(), n=n)[..., :L] if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return du, None, None
        r = torch.fft.irfft((G * U.conj()).sum(0), n=n)
        behind = pad(r[:, n - (L - 1) :].flip(-1), (0, 1))
        return du, torch.stack([r[:, :L], behind]), r[:, 0]


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
