"""The convolution by a float32 FFT in registers: radix 8, one program for a chunk of row pairs.

The circle of n = 8^S M samples, M = 2, 4 or 8, is transformed by S stages of radix 8 and one of
radix M (Stockham's order: natural in, natural out). Of the first stage half the input is padding;
the inverse runs the stages in reverse, so its first needs no exchange between threads and of its
last half the output is not wanted. It is the forward transform of the exchanged planes.

Between two stages a transform is a tile (left, done): samples left to transform, frequencies done.
A stage takes it apart into R tiles, one for each high digit of the sample, and puts the R new
digits above the frequencies done. A list of R tiles is a tuple of real and one of imaginary parts.
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


@triton.jit
@no_type_check
def _dft2(r, i):
    return (r[0] + r[1], r[0] - r[1]), (i[0] + i[1], i[0] - i[1])


@triton.jit
@no_type_check
def _dft4(r, i, PADDED: tl.constexpr):
    if PADDED:
        er, ei, qr, qi = (r[0], r[0]), (i[0], i[0]), (r[1], r[1]), (i[1], i[1])
    else:
        er, ei = _dft2((r[0], r[2]), (i[0], i[2]))
        qr, qi = _dft2((r[1], r[3]), (i[1], i[3]))
    return (
        (er[0] + qr[0], er[1] + qi[1], er[0] - qr[0], er[1] - qi[1]),
        (ei[0] + qi[0], ei[1] - qr[1], ei[0] - qi[0], ei[1] + qr[1]),
    )


@triton.jit
@no_type_check
def _dft8(r, i, PADDED: tl.constexpr):
    if PADDED:
        er, ei = _dft4((r[0], r[2]), (i[0], i[2]), True)
        qr, qi = _dft4((r[1], r[3]), (i[1], i[3]), True)
    else:
        er, ei = _dft4((r[0], r[2], r[4], r[6]), (i[0], i[2], i[4], i[6]), False)
        qr, qi = _dft4((r[1], r[3], r[5], r[7]), (i[1], i[3], i[5], i[7]), False)
    # The odd samples' frequencies turn by eighths.
    r1 = (qr[1] + qi[1]) * 0.7071067811865476
    i1 = (qi[1] - qr[1]) * 0.7071067811865476
    r3 = (qi[3] - qr[3]) * 0.7071067811865476
    i3 = (qr[3] + qi[3]) * -0.7071067811865476
    return (
        (
            er[0] + qr[0],
            er[1] + r1,
            er[2] + qi[2],
            er[3] + r3,
            er[0] - qr[0],
            er[1] - r1,
            er[2] - qi[2],
            er[3] - r3,
        ),
        (
            ei[0] + qi[0],
            ei[1] + i1,
            ei[2] - qr[2],
            ei[3] + i3,
            ei[0] - qi[0],
            ei[1] - i1,
            ei[2] + qr[2],
            ei[3] - i3,
        ),
    )


@triton.jit
@no_type_check
def _dft(r, i, R: tl.constexpr):
    if R == 2:
        r, i = _dft2(r, i)
    elif R == 4:
        r, i = _dft4(r, i, False)
    else:
        r, i = _dft8(r, i, False)
    return r, i


@triton.jit
@no_type_check
def _apart(z, R: tl.constexpr, LEFT: tl.constexpr, DONE: tl.constexpr):
    # (LEFT, DONE) to R tiles (LEFT / R, DONE), by the high digit of the sample.
    if R == 2:
        tiles = tl.split(tl.permute(tl.reshape(z, (2, LEFT // 2, DONE)), (1, 2, 0)))
    elif R == 4:
        even, odd = tl.split(tl.permute(tl.reshape(z, (2, 2, LEFT // 4, DONE)), (2, 3, 0, 1)))
        z0, z2 = tl.split(even)
        z1, z3 = tl.split(odd)
        tiles = (z0, z1, z2, z3)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(z, (2, 2, 2, LEFT // 8, DONE)), (3, 4, 0, 1, 2)))
        z04, z26 = tl.split(even)
        z15, z37 = tl.split(odd)
        z0, z4 = tl.split(z04)
        z1, z5 = tl.split(z15)
        z2, z6 = tl.split(z26)
        z3, z7 = tl.split(z37)
        tiles = (z0, z1, z2, z3, z4, z5, z6, z7)
    return tiles


@triton.jit
@no_type_check
def _together(z, R: tl.constexpr, LEFT: tl.constexpr, DONE: tl.constexpr):
    # R tiles (LEFT / R, DONE) to (LEFT / R, R DONE): their digit above the frequencies done.
    if R == 2:
        tile = tl.permute(tl.join(z[0], z[1]), (0, 2, 1))
    elif R == 4:
        tile = tl.join(tl.join(z[0], z[2]), tl.join(z[1], z[3]))
        tile = tl.permute(tile, (0, 2, 3, 1))
    else:
        even = tl.join(tl.join(z[0], z[4]), tl.join(z[2], z[6]))
        odd = tl.join(tl.join(z[1], z[5]), tl.join(z[3], z[7]))
        tile = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    return tl.reshape(tile, (LEFT // R, R * DONE))


@triton.jit
@no_type_check
def _turned(r, i, W, R: tl.constexpr, LEFT: tl.constexpr, DONE: tl.constexpr):
    # Tile b times the roots exp(-2 pi i b j / LEFT) of its samples j.
    at = tl.arange(0, LEFT // R)[:, None] + tl.arange(0, DONE)[None, :] * 0
    real, imaginary = (r[0],), (i[0],)
    for b in tl.static_range(1, R):
        wr, wi = read_complex(W + (b - 1) * (LEFT // R) + at)
        tr, ti = times(r[b], i[b], wr, wi)
        real, imaginary = real + (tr,), imaginary + (ti,)  # noqa: RUF005 - Triton has no stars
    return _together(real, R, LEFT, DONE), _together(imaginary, R, LEFT, DONE)


@triton.jit
@no_type_check
def _stage(r, i, W, LEFT: tl.constexpr, DONE: tl.constexpr):
    r, i = _dft8(_apart(r, 8, LEFT, DONE), _apart(i, 8, LEFT, DONE), False)
    # The roots of the stages lie one after the other, LEFT before all later ones.
    return _turned(r, i, W + LEFT * DONE - LEFT, 8, LEFT, DONE)


@triton.jit
@no_type_check
def _transform(r, i, W, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    # Four tiles (N / 8, 1) of samples, the rest is zero, to M tiles (1, N / M) of frequencies.
    r, i = _dft8(r, i, True)
    r, i = _turned(r, i, W, 8, N, 1)
    for s in tl.static_range(1, S):
        r, i = _stage(r, i, W, N >> (3 * s), 1 << (3 * s))
    return _dft(_apart(r, M, M, N // M), _apart(i, M, M, N // M), M)


@triton.jit
@no_type_check
def _upright(z, M: tl.constexpr, E: tl.constexpr):
    tiles = ()
    for q in tl.static_range(M):
        tiles = tiles + (tl.reshape(z[q], (E, 1)),)  # noqa: RUF005
    return tiles


@triton.jit
@no_type_check
def _transform_back(r, i, W, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    # M tiles (1, N / M) of frequencies to eight tiles (1, N / 8) of samples; times N.
    i, r = _dft(_upright(i, M, N // M), _upright(r, M, N // M), M)
    i, r = _turned(i, r, W + N, M, N, 1)
    for s in tl.static_range(1, S):
        i, r = _stage(i, r, W + N, (N // M) >> (3 * s - 3), M << (3 * s - 3))
    i, r = _dft8(_apart(i, 8, 8, N // 8), _apart(r, 8, 8, N // 8), False)
    return r, i


@triton.jit
@no_type_check
def _rows(X, row, t, there, L, E: tl.constexpr):
    tiles = ()
    for q in tl.static_range(4):
        tiles = tiles + (read_row(X, row, t + q * E, there, L),)  # noqa: RUF005
    return tiles


@triton.jit
@no_type_check
def _gradients(dY, Pre, row, t, there, L, E: tl.constexpr, GELU: tl.constexpr):
    tiles = ()
    for q in tl.static_range(4):
        tiles = tiles + (read_gradient(dY, Pre, row, t + q * E, there, L, GELU),)  # noqa: RUF005
    return tiles


@triton.jit(do_not_specialize=["B", "H", "LV"])
@no_type_check
def _forward_kernel(
    U,  # (B, H, L)
    K,  # (H, N) complex
    W,  # (2, N) complex: roots of the transform, roots of the way back
    Y,  # (B, H, L)
    Pre,
    B,
    H,
    LV,  # L / VECTOR
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
):
    L = LV * VECTOR
    h = tl.program_id(0).to(tl.int64)
    down = tl.arange(0, N // 8)[:, None]
    along = tl.arange(0, N // 8)[None, :]
    f = tl.arange(0, N // M)[None, :]
    for pair in range(PAIRS):
        b = (tl.program_id(1) * PAIRS + pair).to(tl.int64) * 2
        first, second = b * H + h, (b + 1) * H + h
        r = _rows(U, first, down, down * 0 + b < B, L, N // 8)
        i = _rows(U, second, down, down * 0 + b + 1 < B, L, N // 8)
        r, i = _transform(r, i, W, N, M, S)
        real, imaginary = (), ()
        for q in tl.static_range(M):
            kr, ki = read_complex(K + h * N + q * (N // M) + f)
            yr, yi = times(r[q], i[q], kr, ki)
            real, imaginary = real + (yr,), imaginary + (yi,)  # noqa: RUF005
        r, i = _transform_back(real, imaginary, W, N, M, S)
        for q in tl.static_range(4):
            t = along + q * (N // 8)
            write_output(Y, Pre, first, t, along * 0 + b < B, L, r[q], GELU, KEEP)
            write_output(Y, Pre, second, t, along * 0 + b + 1 < B, L, i[q], GELU, KEEP)


@triton.jit(do_not_specialize=["B", "H", "LV"])
@no_type_check
def _backward_kernel(
    dY,  # (B, H, L)
    U,
    K,  # (H, N) complex
    Pre,
    W,  # (2, N) complex
    dU,  # (B, H, L)
    dK,  # (programs a feature, H, N) complex
    B,
    H,
    LV,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    VECTOR: tl.constexpr,
    PAIRS: tl.constexpr,
    GELU: tl.constexpr,
):
    L = LV * VECTOR
    h = tl.program_id(0).to(tl.int64)
    down = tl.arange(0, N // 8)[:, None]
    along = tl.arange(0, N // 8)[None, :]
    f = tl.arange(0, N // M)[None, :]
    sum_r, sum_i = (), ()
    for _ in tl.static_range(M):
        zero = tl.zeros((1, N // M), tl.float32)
        sum_r, sum_i = sum_r + (zero,), sum_i + (zero,)  # noqa: RUF005
    for pair in range(PAIRS):
        b = (tl.program_id(1) * PAIRS + pair).to(tl.int64) * 2
        first, second = b * H + h, (b + 1) * H + h
        here, next_ = down * 0 + b < B, down * 0 + b + 1 < B
        ur = _rows(U, first, down, here, L, N // 8)
        ui = _rows(U, second, down, next_, L, N // 8)
        ur, ui = _transform(ur, ui, W, N, M, S)
        gr = _gradients(dY, Pre, first, down, here, L, N // 8, GELU)
        gi = _gradients(dY, Pre, second, down, next_, L, N // 8, GELU)
        gr, gi = _transform(gr, gi, W, N, M, S)
        real, imaginary, new_r, new_i = (), (), (), ()
        for q in tl.static_range(M):
            kr, ki = times_conjugate(gr[q], gi[q], ur[q], ui[q])
            new_r, new_i = new_r + (sum_r[q] + kr,), new_i + (sum_i[q] + ki,)  # noqa: RUF005
            kr, ki = read_complex(K + h * N + q * (N // M) + f)
            yr, yi = times_conjugate(gr[q], gi[q], kr, ki)
            real, imaginary = real + (yr,), imaginary + (yi,)  # noqa: RUF005
        sum_r, sum_i = new_r, new_i
        r, i = _transform_back(real, imaginary, W, N, M, S)
        for q in tl.static_range(4):
            t = along + q * (N // 8)
            write_row(dU, first, t, along * 0 + b < B, L, r[q])
            write_row(dU, second, t, along * 0 + b + 1 < B, L, i[q])
    at = dK + (tl.program_id(1).to(tl.int64) * H + h) * N + f
    for q in tl.static_range(M):
        write_complex(at + q * (N // M), sum_r[q], sum_i[q])


def _constants(n: int) -> dict[str, Any]:
    stages = (n.bit_length() - 2) // 3
    return {"N": n, "M": n >> (3 * stages), "S": stages}


def _options(n: int) -> dict[str, Any]:
    # Sixteen complex numbers a thread, two of each tile of a radix-8 stage. The longest circle has
    # twice as many: its backward spills a little, and would spill more with half the registers.
    return launch.options(num_warps=min(8, n // 512))


@functools.lru_cache(maxsize=16)
def _tables(n: int, device: torch.device) -> tuple[Tensor]:
    """Return the roots that each stage turns by, (2, n) complex64 as int64."""
    constants = _constants(n)
    table = torch.zeros(2, n, dtype=torch.complex128)
    stages = [8] * constants["S"] + [constants["M"]]
    for row, radices in zip(table, (stages, stages[::-1]), strict=True):
        left = n
        for R in radices[:-1]:
            turn = torch.arange(1, R)[:, None] * torch.arange(left // R) * (-2 * math.pi / left)
            roots = torch.polar(torch.ones_like(turn, dtype=torch.float64), turn.double())
            row[n - left : n - left // R] = roots.flatten()
            left //= R
    return (table.to(torch.complex64).view(torch.int64).to(device),)


FORM = Form(_forward_kernel, _backward_kernel, _tables, _constants, _options)
forward, backward = FORM.forward, FORM.backward
