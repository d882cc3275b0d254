"""The kernel's spectrum on a GPU: one launch for all features, of one layer or of many.

The formulas are those of plain.py. The forward gives each program a block of nodes of one feature
and walks over the states: a state costs one reciprocal a node and four multiply-adds a product. The
backward gives each program a block of states of one feature and walks over the nodes, so that every
sum over nodes ends in one program: no atomics, the same bits every time. Where the poles train, a
launch before it writes gamma and the gradients of R_BQ and R_PQ.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.ops import aot, launch

# One warp a program, so that few threads idle in the last block of nodes.
BY_NODES = launch.options(num_warps=1)
BY_STATES = launch.options(num_warps=2)


@triton.jit(do_not_specialize=["H", "F"])
@no_type_check
def _forward_kernel(
    A,
    B,
    WR,
    WI,
    COS,
    SIN,
    GAMMA,
    K_F,
    H,
    F,
    CHANNELS: tl.constexpr,
    N2: tl.constexpr,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
    NODES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    h = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * NODES + tl.arange(0, NODES)
    c, s2 = _angles(COS, SIN, f[None, :], F)
    ch = tl.arange(0, ROWS)[:, None].to(tl.int64)
    some = ch < CHANNELS
    always = tl.full((), 1, tl.int1)
    J = h * 0 + (CHANNELS if FROZEN else CHANNELS + 1)
    at, at_Q, to_P = (ch * H + h) * N2, ((J - 1) * H + h) * N2, J * H * N2
    aB, bB, aQ, bQ = A + at, B + at, A + at_Q, B + at_Q
    aP, bP, aT, bT = aB + to_P, bB + to_P, aQ + to_P, bQ + to_P
    BC = _zeros(ROWS, NODES, c.dtype)
    PC = BC
    BQ = _zeros(1, NODES, c.dtype)
    PQ = BQ
    for n in tl.range(0, N2, loop_unroll_factor=UNROLL):
        p, q = _reciprocal(c, s2, tl.load(WR + h * N2 + n), tl.load(WI + h * N2 + n))
        BC = _add(BC, aB + n, bB + n, some, p, q)
        PC = _add(PC, aP + n, bP + n, some, p, q)
        if not FROZEN:
            BQ = _add(BQ, aQ + n, bQ + n, always, p, q)
            PQ = _add(PQ, aT + n, bT + n, always, p, q)
    if FROZEN:
        gr, gi = launch.load_complex(GAMMA, h * F + f, f < F)
        gr, gi = gr[None, :], gi[None, :]
    else:
        gr, gi, _ur, _ui = _woodbury(c, s2, BQ, PQ)
    Br, Bi = _sum(c, s2, BC)
    Pr, Pi = _sum(c, s2, PC)
    kr = Br - (gr * Pr - gi * Pi)
    ki = Bi - (gr * Pi + gi * Pr)
    s = 0.5 * s2
    at = (ch * H + h) * F + f[None, :]
    launch.store_complex(K_F, at, kr * c - ki * s, kr * s + ki * c, some & (f < F)[None, :])


@triton.jit(do_not_specialize=["H", "F"])
@no_type_check
def _woodbury_kernel(
    G,
    A,
    B,
    WR,
    WI,
    COS,
    SIN,
    GAMMA,
    GQ,
    H,
    F,
    CHANNELS: tl.constexpr,
    N2: tl.constexpr,
    ROWS: tl.constexpr,
    NODES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write gamma (H, F, 2) and, as GQ (2, H, F, 2), the gradients of R_BQ and R_PQ."""
    h = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * NODES + tl.arange(0, NODES)
    c, s2 = _angles(COS, SIN, f[None, :], F)
    ch = tl.arange(0, ROWS)[:, None].to(tl.int64)
    some = ch < CHANNELS
    always = tl.full((), 1, tl.int1)
    J = h * 0 + (CHANNELS + 1)
    at, at_Q, to_P = (ch * H + h) * N2, ((J - 1) * H + h) * N2, J * H * N2
    aQ, bQ, aP, bP = A + at_Q, B + at_Q, A + at + to_P, B + at + to_P
    aT, bT = aQ + to_P, bQ + to_P
    PC = _zeros(ROWS, NODES, c.dtype)
    BQ = _zeros(1, NODES, c.dtype)
    PQ = BQ
    for n in tl.range(0, N2, loop_unroll_factor=UNROLL):
        p, q = _reciprocal(c, s2, tl.load(WR + h * N2 + n), tl.load(WI + h * N2 + n))
        PC = _add(PC, aP + n, bP + n, some, p, q)
        BQ = _add(BQ, aQ + n, bQ + n, always, p, q)
        PQ = _add(PQ, aT + n, bT + n, always, p, q)
    gr, gi, ur, ui = _woodbury(c, s2, BQ, PQ)
    Pr, Pi = _sum(c, s2, PC)
    at = (ch * H + h) * F + f[None, :]
    Gr, Gi = _turned(G, at, some & (f < F)[None, :], c, s2)
    # dL/dgamma = -sum conj(R_PC) G
    xr = -tl.sum(Pr * Gr + Pi * Gi, 0)[None, :]
    xi = -tl.sum(Pr * Gi - Pi * Gr, 0)[None, :]
    # conj(c u) dL/dgamma, then times -conj(gamma)
    Br = c * (ur * xr + ui * xi)
    Bi = c * (ur * xi - ui * xr)
    at = h * F + f[None, :]
    mask = (f < F)[None, :]
    launch.store_complex(GAMMA, at, gr, gi, mask)
    launch.store_complex(GQ, at, Br, Bi, mask)
    Pr, Pi = -(gr * Br + gi * Bi), -(gr * Bi - gi * Br)
    launch.store_complex(GQ, (h + H) * F + f[None, :], Pr, Pi, mask)


@triton.jit(do_not_specialize=["H", "F"])
@no_type_check
def _backward_kernel(
    G,
    A,
    B,
    WR,
    WI,
    COS,
    SIN,
    GAMMA,
    GQ,
    DA,
    DB,
    DWR,
    DWI,
    H,
    F,
    CHANNELS: tl.constexpr,
    N2: tl.constexpr,
    FROZEN: tl.constexpr,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
    NODES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sum over all nodes, BLOCKS blocks of them, for STATES states of a feature.

    Tiles are (rows, states, nodes). GQ (2, H, F, 2): the gradients of R_BQ and R_PQ.
    """
    h = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * STATES + tl.arange(0, STATES)[None, :, None]
    # No pole lies at 1: the states past the end stay finite.
    wr = tl.load(WR + h * N2 + n, mask=n < N2, other=1.0)
    wi = tl.load(WI + h * N2 + n, mask=n < N2, other=0.0)
    ch = tl.arange(0, ROWS)[:, None, None].to(tl.int64)
    some = ch < CHANNELS
    J = h * 0 + (CHANNELS if FROZEN else CHANNELS + 1)
    at_B = (ch * H + h) * N2 + n
    at_P = at_B + J * H * N2
    at_BQ = ((J - 1) * H + h) * N2 + n
    at_PQ = at_BQ + J * H * N2
    states = some & (n < N2)
    zero = tl.zeros((ROWS, STATES, NODES), wr.dtype)
    row = tl.zeros((1, STATES, NODES), wr.dtype)
    BCa, BCb, PCa, PCb = zero, zero, zero, zero
    if not FROZEN:
        BQa, BQb, PQa, PQb, direct, through = row, row, row, row, row, row
        aB, bB = _rows(A, B, at_B, states)
        aP, bP = _rows(A, B, at_P, states)
        aBQ, bBQ = _rows(A, B, at_BQ, n < N2)
        aPQ, bPQ = _rows(A, B, at_PQ, n < N2)
    for block in tl.range(0, BLOCKS):
        f = block * NODES + tl.arange(0, NODES)[None, None, :]
        c, s2 = _angles(COS, SIN, f, F)
        p, q = _reciprocal(c, s2, wr, wi)
        Br, Bi = _turned(G, (ch * H + h) * F + f, some & (f < F), c, s2)
        gr = tl.load(GAMMA + (h * F + f) * 2, mask=f < F, other=0.0)
        gi = tl.load(GAMMA + (h * F + f) * 2 + 1, mask=f < F, other=0.0)
        # -conj(gamma) G
        Pr, Pi = -(gr * Br + gi * Bi), -(gr * Bi - gi * Br)
        BCa, BCb = _add_adjoint(BCa, BCb, Br, Bi, c, s2, p, q)
        PCa, PCb = _add_adjoint(PCa, PCb, Pr, Pi, c, s2, p, q)
        if not FROZEN:
            Qr = tl.load(GQ + (h * F + f) * 2, mask=f < F, other=0.0)
            Qi = tl.load(GQ + (h * F + f) * 2 + 1, mask=f < F, other=0.0)
            Tr = tl.load(GQ + ((h + H) * F + f) * 2, mask=f < F, other=0.0)
            Ti = tl.load(GQ + ((h + H) * F + f) * 2 + 1, mask=f < F, other=0.0)
            BQa, BQb = _add_adjoint(BQa, BQb, Qr, Qi, c, s2, p, q)
            PQa, PQb = _add_adjoint(PQa, PQb, Tr, Ti, c, s2, p, q)
            # x = sum over all rows of conj(2 i s a - c b) G
            xr, xi = _add_pole(zero, zero, aB, bB, Br, Bi, c, s2)
            xr, xi = _add_pole(xr, xi, aP, bP, Pr, Pi, c, s2)
            xr, xi = tl.sum(xr, 0)[None, :, :], tl.sum(xi, 0)[None, :, :]
            xr, xi = _add_pole(xr, xi, aBQ, bBQ, Qr, Qi, c, s2)
            xr, xi = _add_pole(xr, xi, aPQ, bPQ, Tr, Ti, c, s2)
            # dd = -conj((p + i q)^2) x
            rr, ri = p * p - q * q, 2 * p * q
            direct = tl.fma(-2 * c * c, rr * xr + ri * xi, direct)
            through = tl.fma(2 * s2 * c, rr * xi - ri * xr, through)
    _store_sums(DA, at_B, BCa, states)
    _store_sums(DB, at_B, BCb, states)
    _store_sums(DA, at_P, PCa, states)
    _store_sums(DB, at_P, PCb, states)
    if not FROZEN:
        _store_sums(DA, at_BQ, BQa, n < N2)
        _store_sums(DB, at_BQ, BQb, n < N2)
        _store_sums(DA, at_PQ, PQa, n < N2)
        _store_sums(DB, at_PQ, PQb, n < N2)
        _store_sums(DWR, h * N2 + n, tl.fma(wr, direct, through), n < N2)
        _store_sums(DWI, h * N2 + n, wi * direct, n < N2)


@triton.jit
@no_type_check
def _angles(COS, SIN, f, F):
    """Load c and 2 s at the nodes f; past the end their denominator is 4."""
    return tl.load(COS + f, mask=f < F, other=0.0), 2 * tl.load(SIN + f, mask=f < F, other=1.0)


@triton.jit
@no_type_check
def _zeros(ROWS: tl.constexpr, NODES: tl.constexpr, dtype: tl.constexpr):
    zero = tl.zeros((ROWS, NODES), dtype)
    return zero, zero, zero, zero


@triton.jit
@no_type_check
def _reciprocal(c, s2, wr, wi):
    """Return p + i q = 1 / d; rsqrt is one instruction, a quotient eight."""
    cw = c * wr
    dr = tl.fma(cw, cw, tl.fma(c, wi, -s2) * tl.fma(c, wi, s2))
    di = (-2 * s2 * c) * wr
    root = tl.math.rsqrt(tl.fma(dr, dr, di * di))
    inverse = root * root
    return dr * inverse, -di * inverse


@triton.jit
@no_type_check
def _add(sums, A, B, mask, p, q):
    """Add one state to (sum a p, sum a q, sum b p, sum b q)."""
    a, b = tl.load(A, mask=mask, other=0.0), tl.load(B, mask=mask, other=0.0)
    return (
        tl.fma(a, p, sums[0]),
        tl.fma(a, q, sums[1]),
        tl.fma(b, p, sums[2]),
        tl.fma(b, q, sums[3]),
    )


@triton.jit
@no_type_check
def _rows(A, B, at, mask):
    return tl.load(A + at, mask=mask, other=0.0), tl.load(B + at, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _sum(c, s2, sums):
    """Return R = 2 i s (sum a p + i sum a q) - c (sum b p + i sum b q)."""
    return -c * sums[2] - s2 * sums[1], s2 * sums[0] - c * sums[3]


@triton.jit
@no_type_check
def _woodbury(c, s2, BQ, PQ):
    """Return gamma = c R_BQ u and u = 1 / (1 + c R_PQ)."""
    Br, Bi = _sum(c, s2, BQ)
    Pr, Pi = _sum(c, s2, PQ)
    er, ei = 1 + c * Pr, c * Pi
    inverse = 1 / (er * er + ei * ei)
    ur, ui = er * inverse, -ei * inverse
    return c * (Br * ur - Bi * ui), c * (Br * ui + Bi * ur), ur, ui


@triton.jit
@no_type_check
def _turned(G, at, mask, c, s2):
    """Load the gradient of k_f and turn it back by e^{-i theta/2}."""
    gr = tl.load(G + 2 * at, mask=mask, other=0.0)
    gi = tl.load(G + 2 * at + 1, mask=mask, other=0.0)
    s = 0.5 * s2
    return gr * c + gi * s, gi * c - gr * s


@triton.jit
@no_type_check
def _add_adjoint(a, b, Gr, Gi, c, s2, p, q):
    """Add to da = sum 2 s (Gi p - Gr q) and db = -sum c (Gr p + Gi q)."""
    sr, si, cr, ci = -s2 * Gr, s2 * Gi, -c * Gr, -c * Gi
    return tl.fma(si, p, tl.fma(sr, q, a)), tl.fma(cr, p, tl.fma(ci, q, b))


@triton.jit
@no_type_check
def _add_pole(xr, xi, a, b, Gr, Gi, c, s2):
    """Add conj(2 i s a - c b) G to x."""
    sr, si, cr, ci = -s2 * Gr, s2 * Gi, -c * Gr, -c * Gi
    return tl.fma(si, a, tl.fma(cr, b, xr)), tl.fma(sr, a, tl.fma(ci, b, xi))


@triton.jit
@no_type_check
def _store_sums(X, at, tile, mask):
    tl.store(X + at, tl.sum(tile, 2)[:, :, None], mask=mask)


def forward(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, c: Tensor, s: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return k_f (channels, H, F, 2); arguments as in plain.py."""
    H, N2 = wr.shape
    F = c.shape[0]
    channels = a.shape[1] - (gamma is None)
    k_f = a.new_empty(channels, H, F, 2)
    sizes = _by_nodes(channels, a.dtype)
    factor = a if gamma is None else gamma
    with launch.on(a):
        _forward_kernel[(H, triton.cdiv(F, sizes["NODES"]))](
            a, b, wr, wi, c, s, factor, k_f, H, F,
            CHANNELS=channels, N2=N2, FROZEN=gamma is not None, **sizes, **BY_NODES,
        )  # fmt: skip
    return k_f


def backward(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    wr: Tensor,
    wi: Tensor,
    c: Tensor,
    s: Tensor,
    gamma: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (da, db, dwr, dwi), the last two empty with gamma; arguments as in plain.py."""
    H, N2 = wr.shape
    F = c.shape[0]
    channels = g.shape[0]
    frozen = gamma is not None
    da, db = torch.empty_like(a), torch.empty_like(b)
    dwr, dwi = (w.new_empty(0 if frozen else w.shape) for w in (wr, wi))
    with launch.on(a):
        if gamma is None:
            gamma, g_Q = a.new_empty(H, F, 2), a.new_empty(2, H, F, 2)
            sizes = _by_nodes(channels, a.dtype)
            _woodbury_kernel[(H, triton.cdiv(F, sizes["NODES"]))](
                g, a, b, wr, wi, c, s, gamma, g_Q, H, F,
                CHANNELS=channels, N2=N2, **sizes, **BY_NODES,
            )  # fmt: skip
        else:
            g_Q = gamma
        sizes = _by_states(channels, N2, a.dtype, frozen)
        _backward_kernel[(H, triton.cdiv(N2, sizes["STATES"]))](
            g, a, b, wr, wi, c, s, gamma, g_Q, da, db, dwr, dwi, H, F,
            CHANNELS=channels, N2=N2, FROZEN=frozen, **sizes,
            BLOCKS=triton.cdiv(F, sizes["NODES"]), **BY_STATES,
        )  # fmt: skip
    return da, db, dwr, dwi


def _by_nodes(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tile of a program that walks over the states: its sums stay in registers."""
    rows = triton.next_power_of_2(channels)
    wide = dtype == torch.float64
    nodes = launch.block(256 // rows // (1 + wide), 32, 64 if wide else 128)
    return {"ROWS": rows, "NODES": launch.widened(nodes), "UNROLL": 1 if wide else 4}


def _by_states(channels: int, N2: int, dtype: torch.dtype, frozen: bool) -> dict[str, int]:
    """Return the tile of a program that walks over the nodes."""
    rows = triton.next_power_of_2(channels)
    wide = dtype == torch.float64
    most = (64 if frozen else 32) // rows // (1 + wide)
    states = launch.block(min(N2, most), 4, 32)
    return {"ROWS": rows, "STATES": states, "NODES": launch.widened(16)}


def _compilation(what: str, channels: int, dtype: torch.dtype, *registers: int) -> aot.Compilation:
    """Name the launch of one kernel at the usual sizes: 32 states, 501 nodes."""
    kernels = {"forward": _forward_kernel, "woodbury": _woodbury_kernel}
    kernel: Any = kernels.get(what.split()[0], _backward_kernel)
    constexprs: dict[str, Any] = {"CHANNELS": channels, "N2": 32}
    frozen = "frozen" in what
    if kernel is not _woodbury_kernel:
        constexprs["FROZEN"] = frozen
    if kernel is _backward_kernel:
        constexprs |= _by_states(channels, 32, dtype, frozen)
        constexprs["BLOCKS"] = triton.cdiv(501, constexprs["NODES"])
    else:
        constexprs |= _by_nodes(channels, dtype)
    pointer = "*fp64" if dtype == torch.float64 else "*fp32"
    names = [name for name in kernel.arg_names if name not in constexprs]
    return aot.Compilation(
        name=f"nplr {what}, {channels} channels, {pointer[1:]}",
        kernel=kernel,
        signature={name: "i32" if name in ("H", "F") else pointer for name in names},
        constexprs=constexprs,
        options=BY_STATES if kernel is _backward_kernel else BY_NODES,
        budgets=aot.budgets(*registers),
    )


COMPILATIONS = [
    _compilation("forward frozen", 2, torch.float32, 128, 128, 136, 72),
    _compilation("backward frozen", 2, torch.float32, 128, 128, 144, 96),
    _compilation("forward", 2, torch.float32, 168, 168, 200, 88),
    _compilation("woodbury", 2, torch.float32, 168, 168, 168, 80),
    _compilation("backward", 2, torch.float32, 192, 200, 208, 112),
    _compilation("forward frozen", 2, torch.float64, 120, 120, 120, 72),
    _compilation("backward frozen", 2, torch.float64, 160, 160, 160, 96),
    _compilation("forward", 2, torch.float64, 160, 160, 160, 80),
    _compilation("woodbury", 2, torch.float64, 128, 128, 128, 72),
    _compilation("backward", 2, torch.float64, 216, 208, 208, 144),
]
