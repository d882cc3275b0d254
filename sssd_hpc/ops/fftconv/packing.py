"""What the forms by transforms share: two rows in one complex transform, spectra, GELU, launches.

The kernel of a convolution is real, so conv(u1 + i u2) = y1 + i y2: a pair of batch rows of one
feature takes one complex transform, without unpacking. The rows of a pair therefore share their
rounding errors, and what is not finite in one reaches the other.

A spectrum is (H, n, 2) in natural order; the kernels read and write a complex number as 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.ops import launch

CHUNK = 8
LONGEST = 4096
Tensors = tuple[Tensor, ...]


def circle(L: int) -> int:
    """Return the samples of the circle: the power of two that holds 2L - 1, at least 512."""
    return max(512, 1 << (2 * L - 2).bit_length())


def chunks(batch: int) -> tuple[int, int]:
    """Return (programs a feature, pairs of rows a program); it depends on the batch alone.

    A program reads tables and spectrum once for its pairs; the pairs are shared out evenly.
    """
    pairs = (batch + 1) // 2
    programs = -(-pairs // CHUNK)
    return programs, -(-pairs // programs)


def vector(L: int) -> int:
    """Return how many samples of any row can be read at once: rows begin at multiples of L."""
    return math.gcd(L, 8)


@triton.jit
@no_type_check
def read_complex(pointer):
    """Load a complex number written as 64 bits; return its planes."""
    bits = tl.load(pointer)
    real = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return real, (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def write_complex(pointer, real, imaginary):
    """Store a complex number as 64 bits."""
    low = real.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(pointer, low | (imaginary.to(tl.int32, bitcast=True).to(tl.int64) << 32))


@triton.jit
@no_type_check
def times(ar, ai, br, bi):
    """Return the planes of a b."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
@no_type_check
def times_conjugate(ar, ai, br, bi):
    """Return the planes of a conj(b)."""
    return ar * br + ai * bi, ai * br - ar * bi


@triton.jit
@no_type_check
def gelu(x):
    """Return the exact GELU."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
@no_type_check
def gelu_slope(x):
    """Return the derivative of GELU."""
    return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(
        -0.5 * x * x
    )


@triton.jit
@no_type_check
def read_row(X, row, t, there, L):
    """Load samples of a row as float32."""
    # Zero where the circle is padding, and in the place of a row that the batch lacks.
    return tl.load(X + row * L + t, mask=there & (t < L), other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def read_gradient(dY, Pre, row, t, there, L, GELU: tl.constexpr):
    """Load the gradient before GELU."""
    g = read_row(dY, row, t, there, L)
    if GELU:
        g = g * gelu_slope(read_row(Pre, row, t, there, L))
    return g


@triton.jit
@no_type_check
def write_row(Y, row, t, there, L, y):
    """Store samples of a row in its dtype."""
    tl.store(Y + row * L + t, y.to(Y.dtype.element_ty), mask=there & (t < L))


@triton.jit
@no_type_check
def write_output(Y, Pre, row, t, there, L, y, GELU: tl.constexpr, KEEP: tl.constexpr):
    """Store a row after GELU, and before it too where backward wants it."""
    if GELU:
        if KEEP:
            write_row(Pre, row, t, there, L, y)
        y = gelu(y)
    write_row(Y, row, t, there, L, y)


class Form(NamedTuple):
    """The kernels of one form of the transform, and what they take for a circle of n samples."""

    forward_kernel: Any
    backward_kernel: Any
    tables: Callable[[int, torch.device], Tensors]
    constants: Callable[[int], dict[str, Any]]
    options: Callable[[int], dict[str, Any]]

    def forward(self, u: Tensor, K: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
        """Convolve; arguments as in the backend's `forward`."""
        gelu = activation == "gelu"
        y = torch.empty_like(u)
        pre = torch.empty_like(u) if keep and gelu else u.new_empty(0)
        ends = (u, K.view(torch.int64)), (y, pre)
        self._launch(self.forward_kernel, K.shape[1], *ends, GELU=gelu, KEEP=keep and gelu)
        return y, pre

    def backward(
        self, dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """Return (du, dK); arguments as in the backend's `backward`."""
        du = torch.empty_like(u)
        partial = K.new_empty(chunks(len(u))[0], *K.shape)
        ends = (dy, u, K.view(torch.int64), pre), (du, partial.view(torch.int64))
        self._launch(self.backward_kernel, K.shape[1], *ends, GELU=activation == "gelu")
        return du, partial.sum(0)

    def _launch(self, kernel: Any, n: int, given: Tensors, made: Tensors, **constants: Any) -> None:
        batch, H, L = made[0].shape
        programs, pairs = chunks(batch)
        constants |= self.constants(n) | {"VECTOR": vector(L), "PAIRS": pairs}
        with launch.on(given[0]):
            tensors = (*given, *self.tables(n, given[0].device), *made)
            sizes = batch, H, L // vector(L)
            kernel[(H, programs)](*tensors, *sizes, **constants, **self.options(n))
