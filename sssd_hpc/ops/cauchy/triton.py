"""The Cauchy sum on a GPU, forward and backward, any poles and nodes.

As in plain.py the two quotients of a pair stay apart and gradients square the reciprocal, so that
float32 holds out to nodes of 1e16 and beyond. Sums over states belong to the program of a block of
nodes, sums over nodes to that of a block of states: no atomics, the same bits every time. Where the
rows share their nodes, dz is written for every row and summed afterwards.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.ops import aot, launch

BY_NODES = launch.options(num_warps=1)
BY_STATES = launch.options(num_warps=2)


@triton.jit(do_not_specialize=["L", "Z_ROW"])
@no_type_check
def _nodes_kernel(
    G,
    V,
    Z,
    W,
    OUT,
    L,
    Z_ROW,
    N2: tl.constexpr,
    SLOPE: tl.constexpr,
    NODES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write r, or with SLOPE dz = -G conj(sum v / (z - w)^2 + conj(v) / (z - conj w)^2).

    Z_ROW: from one row of nodes to the next, 0 where they are shared.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * NODES + tl.arange(0, NODES)
    x, y = launch.load_complex(Z, row * Z_ROW + j, j < L)
    re = tl.zeros((NODES,), x.dtype)
    im = re
    v_row, w_row = V + row * N2 * 2, W + row * N2 * 2
    for n in tl.range(0, N2, loop_unroll_factor=UNROLL):
        ap, aq, bp, bq = _reciprocals(x, y, tl.load(w_row + 2 * n), tl.load(w_row + 2 * n + 1))
        if SLOPE:
            ap, aq, bp, bq = _squares(ap, aq, bp, bq)
        vr, vi = tl.load(v_row + 2 * n), tl.load(v_row + 2 * n + 1)
        re = tl.fma(vr, ap + bp, tl.fma(vi, bq - aq, re))
        im = tl.fma(vr, aq + bq, tl.fma(vi, ap - bp, im))
    at = row * L + j
    if SLOPE:
        gr, gi = launch.load_complex(G, at, j < L)
        re, im = -(re * gr + im * gi), im * gr - re * gi
    launch.store_complex(OUT, at, re, im, j < L)


@triton.jit(do_not_specialize=["L", "Z_ROW"])
@no_type_check
def _states_kernel(
    G,
    V,
    Z,
    W,
    DV,
    DW,
    L,
    Z_ROW,
    N2: tl.constexpr,
    STATES: tl.constexpr,
    NODES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write dv = sum G conj(1/(z - w)) + conj(G)/(z - conj w); dw, squared and times conj v."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * STATES + tl.arange(0, STATES)
    at = row * N2 + n
    wr, wi = launch.load_complex(W, at, n < N2)
    wr, wi = wr[:, None], wi[:, None]
    vr = tl.zeros((STATES, NODES), wr.dtype)
    vi, sr, si = vr, vr, vr
    for block in tl.range(0, BLOCKS):
        j = block * NODES + tl.arange(0, NODES)[None, :]
        # Past the end the last node again, with gradient 0: no pole is met that was not before.
        at_z = 2 * (row * Z_ROW + tl.minimum(j, L - 1))
        x, y = tl.load(Z + at_z), tl.load(Z + at_z + 1)
        gr = tl.load(G + 2 * (row * L + j), mask=j < L, other=0.0)
        gi = tl.load(G + 2 * (row * L + j) + 1, mask=j < L, other=0.0)
        ap, aq, bp, bq = _reciprocals(x, y, wr, wi)
        vr = tl.fma(gr, ap + bp, tl.fma(gi, aq + bq, vr))
        vi = tl.fma(gi, ap - bp, tl.fma(gr, bq - aq, vi))
        ap, aq, bp, bq = _squares(ap, aq, bp, bq)
        sr = tl.fma(gr, ap + bp, tl.fma(gi, aq + bq, sr))
        si = tl.fma(gi, ap - bp, tl.fma(gr, bq - aq, si))
    launch.store_complex(DV, at, tl.sum(vr, 1), tl.sum(vi, 1), n < N2)
    sr, si = tl.sum(sr, 1), tl.sum(si, 1)
    vr, vi = launch.load_complex(V, at, n < N2)
    launch.store_complex(DW, at, vr * sr + vi * si, vr * si - vi * sr, n < N2)


@triton.jit
@no_type_check
def _reciprocals(x, y, wr, wi):
    """Return 1 / (z - w) and 1 / (z - conj w), each as real and imaginary part."""
    dr, up, down = x - wr, y - wi, y + wi
    square = dr * dr
    # rsqrt is one instruction, a quotient eight; where the square overflows it gives 0, the limit.
    a = tl.math.rsqrt(tl.fma(up, up, square))
    b = tl.math.rsqrt(tl.fma(down, down, square))
    a, b = a * a, b * b
    return dr * a, -up * a, dr * b, -down * b


@triton.jit
@no_type_check
def _squares(ap, aq, bp, bq):
    return ap * ap - aq * aq, 2 * ap * aq, bp * bp - bq * bq, 2 * bp * bq


def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Return r (R, L, 2) of v, w (R, N2, 2) and z (R or 1, L, 2)."""
    r = v.new_empty(v.shape[0], z.shape[1], 2)
    with launch.on(v):
        _by_nodes(r, v, z, w, r, slope=False)
    return r


def backward(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dv, dz, dw) from g (R, L, 2); dz is empty unless `need_z`."""
    R, N2, _ = v.shape
    L = z.shape[1]
    dv, dw = torch.empty_like(v), torch.empty_like(w)
    dz = z.new_empty((R, L, 2) if need_z else 0)
    sizes = _states_tile(N2, v.dtype)
    with launch.on(v):
        _states_kernel[(R, triton.cdiv(N2, sizes["STATES"]))](
            g, v, z, w, dv, dw, L, _row_stride(z), N2=N2, **sizes,
            BLOCKS=triton.cdiv(L, sizes["NODES"]), **BY_STATES,
        )  # fmt: skip
        if need_z:
            _by_nodes(g, v, z, w, dz, slope=True)
    if need_z and z.shape[0] < R:
        dz = dz.sum(0, keepdim=True)
    return dv, dz, dw


def _by_nodes(g: Tensor, v: Tensor, z: Tensor, w: Tensor, out: Tensor, slope: bool) -> None:
    R, N2, _ = v.shape
    L = z.shape[1]
    sizes = _nodes_tile(v.dtype)
    _nodes_kernel[(R, triton.cdiv(L, sizes["NODES"]))](
        g, v, z, w, out, L, _row_stride(z), N2=N2, SLOPE=slope, **sizes, **BY_NODES
    )  # fmt: skip


def _row_stride(z: Tensor) -> int:
    return 0 if z.shape[0] == 1 else z.shape[1]


def _nodes_tile(dtype: torch.dtype) -> dict[str, int]:
    wide = dtype == torch.float64
    return {"NODES": launch.widened(64 if wide else 128), "UNROLL": 1 if wide else 8}


def _states_tile(N2: int, dtype: torch.dtype) -> dict[str, int]:
    most = 16 if dtype == torch.float64 else 32
    return {"STATES": launch.block(min(N2, most), 4, 32), "NODES": launch.widened(16)}


def _compilation(what: str, dtype: torch.dtype, *registers: int) -> aot.Compilation:
    """Name the launch of one kernel at the usual sizes: 32 states, 501 nodes."""
    constexprs: dict[str, Any] = {"N2": 32}
    if what == "states":
        kernel: Any = _states_kernel
        constexprs |= _states_tile(32, dtype)
        constexprs["BLOCKS"] = triton.cdiv(501, constexprs["NODES"])
    else:
        kernel = _nodes_kernel
        constexprs |= {"SLOPE": what == "slope", **_nodes_tile(dtype)}
    pointer = "*fp64" if dtype == torch.float64 else "*fp32"
    names = [name for name in kernel.arg_names if name not in constexprs]
    return aot.Compilation(
        name=f"cauchy {what}, {pointer[1:]}",
        kernel=kernel,
        signature={name: "i32" if name in ("L", "Z_ROW") else pointer for name in names},
        constexprs=constexprs,
        options=BY_STATES if what == "states" else BY_NODES,
        budgets=aot.budgets(*registers),
    )


COMPILATIONS = [
    _compilation("sum", torch.float32, 72, 72, 72, 96),
    _compilation("slope", torch.float32, 72, 72, 72, 104),
    _compilation("states", torch.float32, 96, 88, 96, 72),
    _compilation("sum", torch.float64, 72, 72, 72, 56),
    _compilation("slope", torch.float64, 72, 72, 72, 56),
    _compilation("states", torch.float64, 144, 136, 128, 72),
]
