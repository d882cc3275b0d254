"""The convolution by torch.fft, with the skip folded into the kernel's spectrum.

The circle has n >= 2L - 1 samples: the forward kernel at lags 0..L-1, the backward kernel from the
end at lags -1..-(L-1). A delta of weight D at lag 0 is the constant D in the spectrum. Backward is
written out in real transforms: autograd would take complex ones of the full circle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

# Not tensor.conj(): its lazy mark is lost inside a custom op under torch.compile.
conj = torch.conj_physical
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def spectrum_shape(H: int, L: int) -> tuple[int, ...]:
    """Return the shape of K: the half spectrum of the circle as planes."""
    return H, circle(L) // 2 + 1, 2


def prepare(k: Tensor, D: Tensor) -> Tensor:
    """Return the spectrum K of both kernels (2, H, L) and the skip (H,)."""
    forward, backward = k
    L = k.shape[-1]
    gap = forward.new_zeros(forward.shape[0], circle(L) - (2 * L - 1))
    both = torch.cat([forward, gap, backward[:, : L - 1].flip(-1)], dim=-1)
    return torch.view_as_real(torch.fft.rfft(both) + D[:, None])


def prepare_backward(dK: Tensor, H: int, L: int) -> tuple[Tensor, Tensor]:
    """Return (dk (2, H, L), dD (H,)): the adjoint of `prepare`."""
    n = circle(L)
    r = n * torch.fft.irfft(torch.view_as_complex(dK) / _weights(n, dK), n=n)
    behind = pad(r[:, n - (L - 1) :].flip(-1), (0, 1))
    return torch.stack([r[:, :L], behind]), dK[..., 0].sum(-1)


def forward(u: Tensor, K: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (y, pre) in u's dtype; pre, the value before GELU, is empty unless `keep`."""
    L = u.shape[-1]
    n = circle(L)
    U = torch.fft.rfft(u.to(K.dtype), n=n)
    y = torch.fft.irfft(U * torch.view_as_complex(K), n=n)[..., :L]
    if activation == "none":
        return y.to(u.dtype, memory_format=torch.contiguous_format, copy=True), u.new_empty(0)
    pre = y.to(u.dtype).contiguous() if keep else u.new_empty(0)
    return gelu(y).to(u.dtype).contiguous(), pre


def backward(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return (du, dK) from the gradient of y.

    With G the spectrum of the gradient before GELU: du = irfft(G conj K), and dK = sum_b G conj U,
    each bin between the first and Nyquist counted twice and divided by n.
    """
    dtype, L = K.dtype, u.shape[-1]
    n = circle(L)
    dy = dy.to(dtype)
    if activation == "gelu":
        dy = torch.ops.aten.gelu_backward(dy, pre.to(dtype))
    G = torch.fft.rfft(dy, n=n)
    du = torch.fft.irfft(G * conj(torch.view_as_complex(K)), n=n)[..., :L]
    U = torch.fft.rfft(u.to(dtype), n=n)
    dK = (G * conj(U)).sum(0) * (_weights(n, K) / n)
    return du.to(u.dtype).contiguous(), torch.view_as_real(dK)


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


def _weights(n: int, like: Tensor) -> Tensor:
    """Return how many bins of the whole circle each bin of the half spectrum stands for."""
    weights = torch.full((n // 2 + 1,), 2.0, dtype=like.dtype, device=like.device)
    weights[0] = weights[-1] = 1.0
    return weights
