"""The convolution of bfloat16 rows by a two-factor FFT on tensor cores (the Monarch form).

The circle of n = N1 N2 samples is a tile x[n1, n2], sample n1 N2 + n2, and its spectrum a tile
X[k1, k2], frequency k1 + N1 k2:

    X = ((F1 x) * T) F2,    F_i = exp(-2 pi i j k / N_i),    T = exp(-2 pi i k1 n2 / n)

The lower half of x is padding, so F1 has N1 / 2 columns, and on the way back as many rows. The
operands of every product are rounded to bfloat16 and added up in float32; u and y are bfloat16, and
the result errs by under 2e-2 (relative norm), where butterfly.py errs by the rounding of y alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.ops import launch
from sssd_hpc.ops.fftconv.packing import (
    Form,
    read_complex,
    read_gradient,
    read_row,
    times,
    times_conjugate,
    write_complex,
    write_output,
    write_row,
)

# The largest circle whose tables leave room for several programs on a multiprocessor.
LARGEST = 2048


@triton.jit
@no_type_check
def _left(ar, ai, minus_ai, br, bi):
    """Return the planes of the complex product A B."""
    real = launch.dot(minus_ai, bi, launch.dot(ar, br, None, "tf32"), "tf32")
    return real, launch.dot(ai, br, launch.dot(ar, bi, None, "tf32"), "tf32")


@triton.jit
@no_type_check
def _right(ar, ai, br, bi, minus_bi):
    real = launch.dot(ai, minus_bi, launch.dot(ar, br, None, "tf32"), "tf32")
    return real, launch.dot(ai, br, launch.dot(ar, bi, None, "tf32"), "tf32")


@triton.jit
@no_type_check
def _planes(F, row, column, N: tl.constexpr):
    """Return part of the matrix exp(-2 pi i j k / N): real, imaginary, minus imaginary."""
    at = F + row[:, None] * N + column[None, :]
    return tl.load(at), tl.load(at + N * N), tl.load(at + 2 * N * N)


@triton.jit
@no_type_check
def _transform(r, i, F1, F2, T, N1: tl.constexpr, N2: tl.constexpr):
    # (N1 / 2, N2) samples to (N1, N2) frequencies.
    k1, n2 = tl.arange(0, N1), tl.arange(0, N2)
    fr, fi, minus = _planes(F1, k1, tl.arange(0, N1 // 2), N1)
    r, i = _left(fr, fi, minus, r.to(tl.bfloat16), i.to(tl.bfloat16))
    tr, ti = read_complex(T + k1[:, None] * N2 + n2[None, :])
    r, i = times(r, i, tr, ti)
    fr, fi, minus = _planes(F2, n2, n2, N2)
    return _right(r.to(tl.bfloat16), i.to(tl.bfloat16), fr, fi, minus)


@triton.jit
@no_type_check
def _transform_back(r, i, F1, F2, T, N1: tl.constexpr, N2: tl.constexpr):
    # (N1, N2) frequencies to (N1 / 2, N2) samples, times n.
    k1, n2 = tl.arange(0, N1), tl.arange(0, N2)
    fr, fi, minus = _planes(F2, n2, n2, N2)
    r, i = _right(r.to(tl.bfloat16), i.to(tl.bfloat16), fr, minus, fi)
    tr, ti = read_complex(T + k1[:, None] * N2 + n2[None, :])
    r, i = times_conjugate(r, i, tr, ti)
    fr, fi, minus = _planes(F1, tl.arange(0, N1 // 2), k1, N1)
    return _left(fr, minus, fi, r.to(tl.bfloat16), i.to(tl.bfloat16))


@triton.jit(do_not_specialize=["B", "H", "LV"])
@no_type_check
def _forward_kernel(
    U,  # (B, H, L)
    K,  # (H, n) complex
    F1,  # (3, N1, N1)
    F2,  # (3, N2, N2)
    T,  # (N1, N2) complex
    Y,  # (B, H, L)
    Pre,
    B,
    H,
    LV,  # L / VECTOR
    N1: tl.constexpr,
    N2: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
):
    L = LV * VECTOR
    h = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, N1 // 2)[:, None] * N2 + tl.arange(0, N2)[None, :]
    f = tl.arange(0, N1)[:, None] + tl.arange(0, N2)[None, :] * N1
    kr, ki = read_complex(K + h * (N1 * N2) + f)
    for pair in range(PAIRS):
        b = (tl.program_id(1) * PAIRS + pair).to(tl.int64) * 2
        first, second = b * H + h, (b + 1) * H + h
        r = read_row(U, first, t, t * 0 + b < B, L)
        i = read_row(U, second, t, t * 0 + b + 1 < B, L)
        r, i = _transform(r, i, F1, F2, T, N1, N2)
        r, i = times(r, i, kr, ki)
        r, i = _transform_back(r, i, F1, F2, T, N1, N2)
        write_output(Y, Pre, first, t, t * 0 + b < B, L, r, GELU, KEEP)
        write_output(Y, Pre, second, t, t * 0 + b + 1 < B, L, i, GELU, KEEP)


@triton.jit(do_not_specialize=["B", "H", "LV"])
@no_type_check
def _backward_kernel(
    dY,  # (B, H, L)
    U,
    K,  # (H, n) complex
    Pre,
    F1,  # (3, N1, N1)
    F2,  # (3, N2, N2)
    T,  # (N1, N2) complex
    dU,  # (B, H, L)
    dK,  # (programs a feature, H, n) complex
    B,
    H,
    LV,
    N1: tl.constexpr,
    N2: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    GELU: tl.constexpr,
):
    L = LV * VECTOR
    h = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, N1 // 2)[:, None] * N2 + tl.arange(0, N2)[None, :]
    f = tl.arange(0, N1)[:, None] + tl.arange(0, N2)[None, :] * N1
    kr, ki = read_complex(K + h * (N1 * N2) + f)
    sum_r = tl.zeros((N1, N2), tl.float32)
    sum_i = tl.zeros((N1, N2), tl.float32)
    for pair in range(PAIRS):
        b = (tl.program_id(1) * PAIRS + pair).to(tl.int64) * 2
        first, second = b * H + h, (b + 1) * H + h
        here, next_ = t * 0 + b < B, t * 0 + b + 1 < B
        r, i = read_row(U, first, t, here, L), read_row(U, second, t, next_, L)
        ur, ui = _transform(r, i, F1, F2, T, N1, N2)
        r = read_gradient(dY, Pre, first, t, here, L, GELU)
        i = read_gradient(dY, Pre, second, t, next_, L, GELU)
        gr, gi = _transform(r, i, F1, F2, T, N1, N2)
        r, i = times_conjugate(gr, gi, ur, ui)
        sum_r += r
        sum_i += i
        r, i = times_conjugate(gr, gi, kr, ki)
        r, i = _transform_back(r, i, F1, F2, T, N1, N2)
        write_row(dU, first, t, here, L, r)
        write_row(dU, second, t, next_, L, i)
    at = (tl.program_id(1).to(tl.int64) * H + h) * (N1 * N2)
    write_complex(dK + at + f, sum_r, sum_i)


def _constants(n: int) -> dict[str, Any]:
    return {"N1": 32, "N2": n // 32}


def _options(n: int) -> dict[str, Any]:
    return launch.options(num_warps=n // 256)


@functools.lru_cache(maxsize=16)
def _tables(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return F1 and F2 as bfloat16 planes (re, im, -im), T as complex64 in int64."""
    N1, N2 = (_constants(n)[name] for name in ("N1", "N2"))
    F1, F2, T = (
        torch.polar(torch.ones(rows, columns, dtype=torch.float64), turn * (-2 * math.pi / circle))
        for rows, columns, circle in ((N1, N1, N1), (N2, N2, N2), (N1, N2, n))
        for turn in [torch.arange(rows).double()[:, None] * torch.arange(columns)]
    )
    first, second = (
        torch.stack([F.real, F.imag, -F.imag]).to(device, torch.bfloat16) for F in (F1, F2)
    )
    return first, second, T.to(torch.complex64).view(torch.int64).to(device)


FORM = Form(_forward_kernel, _backward_kernel, _tables, _constants, _options)
forward, backward = FORM.forward, FORM.backward
