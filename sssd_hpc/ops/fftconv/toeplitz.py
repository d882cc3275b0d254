"""The convolution as a matrix product y = u T(k) for each feature: the transforms' challenger.

It works in O(L^2) for any L, without tables, padding or pairs of rows. The matrix is never stored:
its tiles are read from the 2L - 1 taps. bfloat16 rows multiply taps in two bfloat16 terms, with the
products of both exact; float32 rows and taps go to the tensor cores as tf32 unless
torch.get_float32_matmul_precision() is "highest".

It has a backend's functions and is no backend: nothing chooses it, it is here to be measured.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sssd_hpc.ops import aot, launch
from sssd_hpc.ops.fftconv.packing import write_output

DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = launch.options(num_warps=4)


@triton.jit(do_not_specialize=["B", "H", "L"])
@no_type_check
def _kernel(
    X,  # (B, H, L)
    K,  # (H, 2L - 1) taps by lag
    Y,  # (B, H, L)
    Pre,
    B,
    H,
    L,
    SIGN: tl.constexpr,  # -1 for the transposed matrix
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
):
    tiles = tl.cdiv(L, BLOCK_OUT)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    out = tl.program_id(0) % tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    row = b * H + h
    taps = K + h * (2 * L - 1) + L - 1
    sums = tl.zeros((BLOCK_B, BLOCK_OUT), tl.float32)
    for start in range(0, L, BLOCK_IN):
        t = start + tl.arange(0, BLOCK_IN)
        x = tl.load(X + row * L + t[None, :], mask=(b < B) & (t[None, :] < L), other=0.0)
        there = (t[:, None] < L) & (out < L)
        k = tl.load(taps + SIGN * (out - t[:, None]), mask=there, other=0.0)
        if X.dtype.element_ty == tl.bfloat16:
            high = k.to(tl.bfloat16)
            sums = launch.dot(x, high, sums, PRECISION)
            k = (k - high.to(tl.float32)).to(tl.bfloat16)
        sums = launch.dot(x, k, sums, PRECISION)
    write_output(Y, Pre, row, out, b < B, L, sums, GELU, KEEP)


def spectrum_shape(H: int, L: int) -> tuple[int, ...]:
    """Return the shape of K: the taps at lags -(L - 1)..L - 1."""
    return H, 2 * L - 1


def prepare(k: Tensor, D: Tensor) -> Tensor:
    """Return the taps of both kernels (2, H, L), the skip (H,) added at lag 0."""
    ahead, behind = k
    L = k.shape[-1]
    K = torch.cat([behind[:, : L - 1].flip(-1), ahead], dim=-1)
    K[:, L - 1] += D
    return K


def prepare_backward(dK: Tensor, H: int, L: int) -> tuple[Tensor, Tensor]:
    """Return (dk (2, H, L), dD (H,)): the adjoint of `prepare`."""
    behind = pad(dK[:, : L - 1].flip(-1), (0, 1))
    return torch.stack([dK[:, L - 1 :], behind]), dK[:, L - 1].clone()


def forward(u: Tensor, K: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (y, pre) in u's dtype; pre, the value before GELU, is empty unless `keep`."""
    gelu = activation == "gelu"
    y = torch.empty_like(u)
    pre = torch.empty_like(u) if keep and gelu else u.new_empty(0)
    _multiply(u, K, y, pre, 1, gelu)
    return y, pre


def backward(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return (du, dK) from the gradient of y; dK by torch.fft, as the correlation of dy and u."""
    L = u.shape[-1]
    if activation == "gelu":
        dy = torch.ops.aten.gelu_backward(dy, pre)
    du = torch.empty_like(u)
    _multiply(dy, K, du, u.new_empty(0), -1, False)
    n = 1 << (2 * L - 1).bit_length()
    G, U = (torch.fft.rfft(x.float(), n=n) for x in (dy, u))
    r = torch.fft.irfft((G * torch.conj_physical(U)).sum(0), n=n)
    return du, torch.cat([r[:, n - (L - 1) :], r[:, :L]], dim=-1)


def _multiply(x: Tensor, K: Tensor, y: Tensor, pre: Tensor, sign: int, gelu: bool) -> None:
    batch, H, L = x.shape
    strict = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    tile = _tile(batch, strict)
    with launch.on(x):
        _kernel[(H * triton.cdiv(L, tile["BLOCK_OUT"]), triton.cdiv(batch, tile["BLOCK_B"]))](
            x,
            K,
            y,
            pre,
            batch,
            H,
            L,
            SIGN=sign,
            PRECISION="ieee" if strict else "tf32",
            **tile,
            GELU=gelu,
            KEEP=pre.numel() > 0,
            **OPTIONS,
        )


def _tile(batch: int, strict: bool) -> dict[str, Any]:
    # Strict products keep their operands in registers, so they take small tiles.
    if strict:
        return {"BLOCK_B": 16, "BLOCK_OUT": 64, "BLOCK_IN": 16}
    return {"BLOCK_B": launch.block(batch, 16, 64), "BLOCK_OUT": 64, "BLOCK_IN": 64}


def _compilation(
    rows: str, precision: str, transposed: bool, budgets: dict[str, aot.Budget]
) -> aot.Compilation:
    """Name the launch on a batch of 64: forward with GELU, or its adjoint."""
    constexprs = _tile(64, precision == "ieee") | {
        "SIGN": -1 if transposed else 1,
        "PRECISION": precision,
        "GELU": not transposed,
        "KEEP": not transposed,
    }
    pointers = dict.fromkeys(("X", "Y", "Pre"), f"*{rows}") | {"K": "*fp32"}
    return aot.Compilation(
        name=f"fftconv toeplitz{' backward' * transposed}, {rows} as {precision}",
        kernel=_kernel,
        signature=pointers | dict.fromkeys(("B", "H", "L"), "i32"),
        constexprs=constexprs,
        options=OPTIONS,
        budgets=budgets,
        tensor_cores=precision != "ieee",
        # AMD's matrix units multiply float32 exactly, so that strict products use them there.
        targets=tuple(t for t in aot.TARGETS if precision != "ieee" or t.startswith("sm_")),
    )


# With GELU and its input kept, single precision spills a little.
SPILLING = {t: aot.Budget(stack=128, spills=64) for t in ("sm_80", "sm_90", "sm_100")}
COMPILATIONS = [
    _compilation("fp32", "tf32", False, aot.budgets(255, 255, 255, 120) | SPILLING),
    _compilation("fp32", "tf32", True, aot.budgets(255, 255, 255, 120)),
    _compilation("fp32", "ieee", False, aot.budgets(72, 72, 72, 40)),
    _compilation("fp32", "ieee", True, aot.budgets(64, 72, 64, 40)),
    _compilation("bf16", "tf32", False, aot.budgets(255, 255, 255, 144)),
    _compilation("bf16", "tf32", True, aot.budgets(255, 255, 255, 144)),
]
