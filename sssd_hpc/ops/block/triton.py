"""The pointwise parts on a GPU: each one pass over its signals.

A program of the norm holds all features of a few columns in registers, so that statistics and
result come from one read; its backward writes the parameters' gradients of its columns, which torch
adds up: no atomics, the same bits every time. The two last linear layers are one matrix product
whose sums never reach memory: a program makes the same rows of both halves from one read of h.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.ops import aot, launch
from sssd_hpc.ops.block import plain

DTYPES = plain.DTYPES
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}

NORM = launch.options(num_warps=8)
# Registers of a tile.
FORWARD, BACKWARD = 16384, 8192
GATE = launch.options(num_warps=4)
PRODUCT = launch.options(num_warps=8, num_stages=3)
GATE_BLOCK = launch.widened(1024)
ROOT = tl.constexpr(math.sqrt(0.5))


@triton.jit
@no_type_check
def _columns(
    UNITS, H: tl.constexpr, ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """Return where this program's tile lies, and which of it exists; rows are ALIGN * UNITS long.

    A length known to be a multiple of 8 lets the compiler move several values at once.
    """
    L = UNITS * ALIGN
    tiles = tl.cdiv(L, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    time = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    at = b * H * L + h[:, None] * L + time[None, :]
    return b, h, at, (h < H)[:, None] & (time < L)[None, :], b * L + time, time < L


@triton.jit(do_not_specialize=["UNITS"])
@no_type_check
def _norm_kernel(
    X,
    Y,
    WEIGHT,
    BIAS,
    SHIFT,
    OUT,
    MEAN,
    RSTD,
    UNITS,
    H: tl.constexpr,
    EPS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, at, some, column, real = _columns(UNITS, H, ALIGN, BLOCK_H, BLOCK)
    wide: tl.constexpr = WEIGHT.dtype.element_ty
    weight = tl.load(WEIGHT + h, h < H, 0.0)
    offset = tl.load(BIAS + h, h < H, 0.0)
    if SHIFT is not None:
        offset += tl.load(SHIFT + b * H + h, h < H, 0.0)
    s = tl.load(X + at, some, 0.0).to(wide) + tl.load(Y + at, some, 0.0).to(wide)
    mean = tl.sum(s, 0) / H
    s = tl.where(some, s - mean[None, :], 0.0)
    rstd = tl.math.rsqrt(tl.sum(s * s, 0) / H + EPS)
    out = s * rstd[None, :] * weight[:, None] + offset[:, None]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), some)
    tl.store(MEAN + column, mean, real)
    tl.store(RSTD + column, rstd, real)


@triton.jit(do_not_specialize=["UNITS"])
@no_type_check
def _norm_backward_kernel(
    G,
    X,
    Y,
    WEIGHT,
    MEAN,
    RSTD,
    DSUM,
    DWEIGHT,
    DSHIFT,
    UNITS,
    H: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _b, h, at, some, column, real = _columns(UNITS, H, ALIGN, BLOCK_H, BLOCK)
    wide: tl.constexpr = WEIGHT.dtype.element_ty
    weight = tl.load(WEIGHT + h, h < H, 0.0)[:, None]
    mean = tl.load(MEAN + column, real, 0.0)[None, :]
    rstd = tl.load(RSTD + column, real, 0.0)[None, :]
    s = tl.load(X + at, some, 0.0).to(wide) + tl.load(Y + at, some, 0.0).to(wide)
    g = tl.load(G + at, some, 0.0).to(wide)
    n = (s - mean) * rstd
    part = tl.program_id(0).to(tl.int64) * H + h
    tl.store(DSHIFT + part, tl.sum(g, 1), h < H)
    tl.store(DWEIGHT + part, tl.sum(g * n, 1), h < H)
    g = g * weight
    plain = tl.sum(g, 0) / H
    along = tl.sum(g * n, 0) / H
    dsum = (g - plain[None, :] - n * along[None, :]) * rstd
    tl.store(DSUM + at, dsum.to(DSUM.dtype.element_ty), some)


@triton.jit
@no_type_check
def _tanh(x, NEAR: tl.constexpr):
    """Return tanh and its derivative; below NEAR by its series, which keeps the digits."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    q = x * x
    series = q * (62 / 2835 - 1382 / 155925 * q) - 17 / 315
    series = q * (q * (q * series + 2 / 15) - 1 / 3)
    t = tl.where(tl.abs(x) < NEAR, x + x * series, tl.where(x < 0, -far, far))
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit
@no_type_check
def _sigmoid(x):
    """Return sigmoid and its derivative."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e), e / ((1 + e) * (1 + e))


@triton.jit
@no_type_check
def _halves(H, SIZE, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Load a piece of each half; return where the first lies and where in half as many features."""
    pieces = tl.cdiv(SIZE, BLOCK)
    b = (tl.program_id(0) // pieces).to(tl.int64)
    i = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    at = 2 * b * SIZE + i
    signal = tl.load(H + at, i < SIZE, 0.0).to(WIDE)
    control = tl.load(H + at + SIZE, i < SIZE, 0.0).to(WIDE)
    return signal, control, at, b * SIZE + i, i < SIZE


@triton.jit
@no_type_check
def _gate_kernel(H, OUT, SIZE, WIDE: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    signal, control, _at, at_out, some = _halves(H, SIZE, WIDE, BLOCK)
    t, _dt = _tanh(signal, NEAR)
    s, _ds = _sigmoid(control)
    tl.store(OUT + at_out, (t * s).to(OUT.dtype.element_ty), some)


@triton.jit
@no_type_check
def _gate_backward_kernel(
    G, H, DH, SIZE, WIDE: tl.constexpr, NEAR: tl.constexpr, BLOCK: tl.constexpr
):
    signal, control, at, at_out, some = _halves(H, SIZE, WIDE, BLOCK)
    g = tl.load(G + at_out, some, 0.0).to(WIDE)
    t, dt = _tanh(signal, NEAR)
    s, ds = _sigmoid(control)
    tl.store(DH + at, (g * s * dt).to(DH.dtype.element_ty), some)
    tl.store(DH + at + SIZE, (g * t * ds).to(DH.dtype.element_ty), some)


@triton.jit(do_not_specialize=["UNITS"])
@no_type_check
def _skip_kernel(
    H,
    X,
    SKIPS,
    WEIGHT,
    BIAS,
    X_OUT,
    SKIPS_OUT,
    UNITS,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    L = UNITS * ALIGN
    # Programs of the same columns follow each other: they read the same h.
    bands = tl.cdiv(C, ROWS)
    tiles = tl.cdiv(L, COLUMNS)
    pid = tl.program_id(0)
    b = (pid // (bands * tiles)).to(tl.int64)
    c = pid % bands * ROWS + tl.arange(0, ROWS)
    time = pid // bands % tiles * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    wide: tl.constexpr = BIAS.dtype.element_ty
    residual = tl.zeros((ROWS, COLUMNS), wide)
    skip = tl.zeros((ROWS, COLUMNS), wide)
    for start in tl.range(0, C, INNER):
        inner = start + k
        h = tl.load(
            H + b * C * L + inner[:, None] * L + time[None, :],
            (inner < C)[:, None] & (time < L)[None, :],
            0.0,
        )
        some = (c < C)[:, None] & (inner < C)[None, :]
        weight = WEIGHT + c[:, None] * C + inner[None, :]
        residual = launch.dot(tl.load(weight, some, 0.0), h, residual, "tf32")
        skip = launch.dot(tl.load(weight + C * C, some, 0.0), h, skip, "tf32")
    at = b * C * L + c[:, None] * L + time[None, :]
    some = (c < C)[:, None] & (time < L)[None, :]
    residual += tl.load(BIAS + c, c < C, 0.0)[:, None]
    skip += tl.load(BIAS + C + c, c < C, 0.0)[:, None]
    x_out = (tl.load(X + at, some, 0.0).to(wide) + residual) * ROOT
    skips_out = tl.load(SKIPS + at, some, 0.0).to(wide) + skip
    tl.store(X_OUT + at, x_out.to(X_OUT.dtype.element_ty), some)
    tl.store(SKIPS_OUT + at, skips_out.to(SKIPS_OUT.dtype.element_ty), some)


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, mean, rstd); arguments as in plain.py."""
    B, H, L = x.shape
    out = torch.empty_like(x)
    mean, rstd = (weight.new_empty(B, L) for _ in range(2))
    tile = _tile(H, L, x.dtype, FORWARD)
    with launch.on(x):
        _norm_kernel[(B * triton.cdiv(L, tile["BLOCK"]),)](
            x, y, weight, bias, shift, out, mean, rstd, **_rows(L), H=H, EPS=eps, **tile, **NORM
        )
    return out, mean, rstd


def residual_norm_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dsum, dweight, dshift); arguments as in plain.py."""
    B, H, L = x.shape
    dsum = torch.empty_like(x)
    tile = _tile(H, L, x.dtype, BACKWARD)
    tiles = triton.cdiv(L, tile["BLOCK"])
    dweight, dshift = (weight.new_empty(B, tiles, H) for _ in range(2))
    with launch.on(x):
        _norm_backward_kernel[(B * tiles,)](
            g, x, y, weight, mean, rstd, dsum, dweight, dshift, **_rows(L), H=H, **tile, **NORM
        )
    return dsum, dweight.sum((0, 1)), dshift.sum(1)


def gate(h: Tensor) -> Tensor:
    """Return tanh(h[:, :C]) sigmoid(h[:, C:]); arguments as in plain.py."""
    out = h.new_empty(h.shape[0], h.shape[1] // 2, h.shape[2])
    size = out[0].numel()
    with launch.on(h):
        _gate_kernel[(h.shape[0] * triton.cdiv(size, GATE_BLOCK),)](
            h, out, size, **_width(h.dtype), BLOCK=GATE_BLOCK, **GATE
        )
    return out


def gate_backward(g: Tensor, h: Tensor) -> Tensor:
    """Return dh; arguments as in plain.py."""
    dh = torch.empty_like(h)
    size = g[0].numel()
    with launch.on(h):
        _gate_backward_kernel[(h.shape[0] * triton.cdiv(size, GATE_BLOCK),)](
            g, h, dh, size, **_width(h.dtype), BLOCK=GATE_BLOCK, **GATE
        )
    return dh


def residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (x_out, skips_out); arguments as in plain.py.

    float32 products cut their operands to tf32. Where that is not wanted, which is so while
    torch.get_float32_matmul_precision() is "highest", they are left to torch, as float64 is.
    """
    strict = h.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if strict or x.dtype == torch.float64:
        return plain.residual_skip(h, x, skips, weight, bias)
    return _residual_skip(h, x, skips, weight, bias)


def _residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    B, C, L = x.shape
    x_out, skips_out = torch.empty_like(x), torch.empty_like(x)
    tile = _product(C, h.dtype)
    programs = B * triton.cdiv(C, tile["ROWS"]) * triton.cdiv(L, tile["COLUMNS"])
    with launch.on(x):
        _skip_kernel[(programs,)](
            h, x, skips, weight, bias, x_out, skips_out, **_rows(L), C=C, **tile, **PRODUCT
        )
    return x_out, skips_out


def _rows(L: int) -> dict[str, int]:
    align = math.gcd(L, 8)
    return {"UNITS": L // align, "ALIGN": align}


def _tile(H: int, L: int, dtype: torch.dtype, most: int) -> dict[str, int]:
    """Return a tile of all features and up to 64 columns, of about `most` 32-bit registers."""
    block_h = triton.next_power_of_2(H)
    columns = most // (block_h * max(1, dtype.itemsize // 4))
    return {"BLOCK_H": block_h, "BLOCK": launch.block(L, 1, max(1, min(64, columns)))}


def _width(dtype: torch.dtype) -> dict[str, Any]:
    """Return the gate's arithmetic, and below what its tanh is a series of six terms."""
    double = dtype == torch.float64
    return {"WIDE": tl.float64 if double else tl.float32, "NEAR": 0.02 if double else 0.3}


def _product(C: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of the matrix product; 128 bytes of a row of the weight at a time."""
    rows, inner = launch.block(C, 16, 64), launch.block(C, 16, 128 // dtype.itemsize)
    return {"ROWS": rows, "COLUMNS": 128 if rows == 64 else 64, "INNER": inner}


def _compilation(what: str, features: int, dtype: torch.dtype, *registers: int) -> aot.Compilation:
    """Name the launch of one part on signals of a dtype with 1000 samples."""
    kernel: Any
    constexprs: dict[str, Any]
    wide: tuple[str, ...] = ("WEIGHT", "BIAS", "SHIFT", "MEAN", "RSTD", "DWEIGHT", "DSHIFT")
    options, shared = NORM, 48 * 1024
    if what == "skip":
        # As under autocast, where the sums over blocks stay wide.
        wide = ("X", "SKIPS", "BIAS", "X_OUT", "SKIPS_OUT")
        kernel, options, shared = _skip_kernel, PRODUCT, 99 * 1024
        constexprs = _product(features, dtype) | {"C": features}
    elif what in ("norm", "norm without shift"):
        kernel = _norm_kernel
        constexprs = _tile(features, 1000, dtype, FORWARD) | {"H": features, "EPS": 1e-5}
        if what != "norm":
            constexprs["SHIFT"] = None
    elif what == "norm backward":
        kernel = _norm_backward_kernel
        constexprs = _tile(features, 1000, dtype, BACKWARD) | {"H": features}
    else:
        kernel = _gate_kernel if what == "gate" else _gate_backward_kernel
        constexprs, options = _width(dtype) | {"BLOCK": GATE_BLOCK}, GATE
    if "ALIGN" in kernel.arg_names:
        constexprs["ALIGN"] = _rows(1000)["ALIGN"]
    pointers = {True: "*fp64" if dtype == torch.float64 else "*fp32", False: f"*{TYPES[dtype]}"}
    return aot.Compilation(
        name=f"block {what}, {features} features, {TYPES[dtype]}",
        kernel=kernel,
        signature={
            name: "i32" if name in ("UNITS", "SIZE") else pointers[name in wide]
            for name in kernel.arg_names
            if name not in constexprs
        },
        constexprs=constexprs,
        options=options,
        divisible=("SIZE",) if what.startswith("gate") else (),
        budgets=aot.budgets(*registers, shared=shared),
        tensor_cores=what == "skip",
    )


COMPILATIONS = [
    _compilation("norm", 512, torch.float32, 176, 176, 184, 104),
    _compilation("norm", 512, torch.bfloat16, 136, 136, 136, 96),
    _compilation("norm", 512, torch.float64, 176, 176, 176, 112),
    _compilation("norm", 1024, torch.float32, 184, 184, 192, 112),
    _compilation("norm without shift", 512, torch.float32, 176, 176, 184, 104),
    _compilation("norm without shift", 512, torch.bfloat16, 136, 136, 136, 96),
    _compilation("norm without shift", 512, torch.float64, 176, 176, 176, 112),
    _compilation("norm backward", 512, torch.float32, 136, 136, 136, 88),
    _compilation("norm backward", 512, torch.bfloat16, 136, 136, 136, 80),
    _compilation("norm backward", 512, torch.float64, 168, 168, 168, 88),
    _compilation("norm backward", 1024, torch.float32, 136, 136, 144, 88),
    _compilation("gate", 512, torch.float32, 40, 40, 40, 48),
    _compilation("gate", 512, torch.bfloat16, 40, 40, 40, 40),
    _compilation("gate", 512, torch.float64, 96, 96, 96, 48),
    _compilation("gate backward", 512, torch.float32, 56, 56, 56, 56),
    _compilation("gate backward", 512, torch.bfloat16, 72, 80, 56, 48),
    _compilation("gate backward", 512, torch.float64, 160, 160, 160, 88),
    _compilation("skip", 256, torch.float32, 160, 144, 152, 112),
    _compilation("skip", 256, torch.bfloat16, 160, 160, 152, 144),
    _compilation("skip", 32, torch.bfloat16, 56, 56, 56, 144),
]
