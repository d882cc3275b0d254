"""The public kernel op: checks at the door, float32 or float64 whatever the autocast.

It refuses to apply the length correction: C comes as C_tilde = C (I - dA^L). `nplr_kernel` is
differentiable in every parameter; `frozen_kernel`, where only C trains, is linear in C and keeps
the rest, the Woodbury factor included, in a `FrozenNplr`. Both run one registered op on real
tensors, `sssd_hpc::nplr`; its arguments are those of the backends' `forward` (see plain.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends
from sssd_hpc.ops.nplr import half as single_states
from sssd_hpc.ops.nplr import reference
from sssd_hpc.ops.nplr.nodes import half_angles
from sssd_hpc.ops.tensors import COMPLEX, dense


def nplr_kernel(
    w: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    log_dt: Tensor,
    L: int,
    backend: str = "auto",
    half: bool = False,
) -> Tensor:
    """Generate the SSM convolution kernels of A = diag(w) - P Q^T, discretised bilinearly by dt.

    k[l] = C dA^l dB for l in 0..L-1, each stored state standing for itself and its conjugate.

    Args:
        w: eigenvalues, complex (H, N2), real part below zero.
        P: low-rank column, complex (H, N2).
        Q: low-rank row, complex (H, N2), not conjugated by this function.
        B: input vector, complex (H, N2).
        C: output vectors, complex (channels, H, N2), already C (I - dA^L) for this very L.
        log_dt: natural logarithm of the step, real (H,).
        L: length in samples, at least 1; a shorter kernel is the head of this one.
        backend: auto, reference, torch, cpp, keops or triton.
        half: sum the stored states without their conjugates. This is another function, the one
            that the public code computes without its CUDA extension; for old checkpoints only, and
            by the backends reference and torch only.

    Returns:
        Real (channels, H, L), float64 if any input is in double precision, else float32. Parameters
        that are not finite give a kernel that is not.

    Raises:
        UserError: shapes or devices that do not fit, inputs that are not complex, unusable backend.

    Source: Efficiently Modeling Long Sequences with Structured State Spaces (arXiv:2111.00396),
        Algorithm 1.
    """
    vectors = {"w": w, "P": P, "Q": Q, "B": B, "C": C}
    _check(vectors, log_dt, L)
    double = torch.float64 in (log_dt.dtype, *(vector.real.dtype for vector in vectors.values()))
    real = torch.float64 if double else torch.float32
    w, P, Q, B, C = (vector.to(COMPLEX[real]) for vector in vectors.values())
    log_dt = log_dt.to(real)
    if half:
        if backend not in ("auto", "torch", "reference"):
            raise UserError(
                f"nplr_kernel: backend is {backend!r} but half=True (states without conjugates) "
                "runs by 'torch' or 'reference' alone"
            )
        backend = "torch" if backend == "auto" else backend
    name = backends.resolve("nplr", backend, w.device.type, real)
    with torch.autocast(w.device.type, enabled=False):
        if name == "reference":
            return reference.run(w, P, Q, B, C, log_dt, L, half)
        if half:
            return single_states.run(w, P, Q, B, C, log_dt, L)
        dt = log_dt.exp()[:, None]
        w = w * dt
        v = 2 * torch.stack([B * dt, P * dt])[:, None] * torch.cat([C, Q[None]])
        k: Tensor = _nplr(v.real, (v * w.conj()).real, w.real, w.imag, None, L, name)
        return k


class FrozenNplr(NamedTuple):
    """What of a kernel does not change while only C trains; real planes, one dtype and device.

    Constants of several layers concatenate along H: one grouped launch generates all their kernels.
    """

    mix: Tensor
    """(2, 2, H, N2, 2): a and b, for B and for P, as linear forms of Re C and Im C."""
    wr: Tensor
    """Real part of w dt, (H, N2)."""
    wi: Tensor
    """Imaginary part of w dt, (H, N2)."""
    gamma: Tensor
    """Woodbury factor c R_BQ / (1 + c R_PQ), planes (H, L//2 + 1, 2)."""
    length: int
    """The L that C_tilde is corrected for."""

    @staticmethod
    def group(layers: list[FrozenNplr]) -> FrozenNplr:
        """Concatenate the features of several layers of one length."""
        mix, wr, wi, gamma, lengths = zip(*layers, strict=True)
        assert len(set(lengths)) == 1
        return FrozenNplr(
            torch.cat(mix, dim=2), torch.cat(wr), torch.cat(wi), torch.cat(gamma), lengths[0]
        )


def freeze(
    w: Tensor, P: Tensor, Q: Tensor, B: Tensor, log_dt: Tensor, L: int, dtype: torch.dtype
) -> FrozenNplr:
    """Compute the constants of `frozen_kernel` in float64 and round them to `dtype`.

    Arguments as in `nplr_kernel`, each (H, N2) complex or (H, N2, 2) as real planes; no gradient
    reaches them.

    Raises:
        UserError: as `nplr_kernel`.
    """
    planes = [x.detach() for x in (w, P, Q, B)]
    planes = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in planes]
    rows = planes[0].shape[:2]
    for name, x in zip("wPQB", planes, strict=True):
        if x.shape != (*rows, 2) or 0 in rows or not x.is_floating_point():
            raise UserError(
                f"freeze: {name} is {x.dtype} {tuple(x.shape)}; it must be complex (H, N/2), or "
                "its planes (H, N/2, 2), H and N/2 at least 1"
            )
        if x.device != log_dt.device:
            raise UserError(
                f"freeze: {name} is on {x.device} but log_dt on {log_dt.device}; move them together"
            )
    if log_dt.shape != rows[:1] or not log_dt.is_floating_point() or L < 1:
        raise UserError(
            f"freeze: log_dt is {log_dt.dtype} {tuple(log_dt.shape)} and L {L}; "
            f"log_dt must be real ({rows[0]},), L at least 1"
        )
    if dtype not in COMPLEX:
        raise UserError(f"freeze: dtype is {dtype}; it must be torch.float32 or torch.float64")
    name = _frozen_backend("freeze", "auto", planes[0].device.type, torch.float64)
    parts = _freeze(*planes, log_dt.detach(), L, name)
    mix, wr, wi, gamma = (part.to(dtype) for part in parts)
    return FrozenNplr(mix, wr, wi, gamma, L)


def frozen_kernel(C: Tensor, frozen: FrozenNplr, backend: str = "auto") -> Tensor:
    """Generate kernels where only C trains: `nplr_kernel` with the rest as `freeze` kept it.

    Args:
        C: C_tilde as real planes (channels, H, N2, 2).
        frozen: the constants, on C's device and in its dtype.
        backend: auto, torch, cpp, keops or triton.

    Returns:
        Real (channels, H, L) in C's dtype.

    Raises:
        UserError: C does not fit the constants, unusable backend.
    """
    fits = C.dim() == 4 and C.shape[0] > 0 and C.shape[1:] == frozen.mix.shape[2:]
    if C.device != frozen.wr.device:
        raise UserError(
            f"frozen_kernel: C is on {C.device} but the constants on {frozen.wr.device}; "
            "move them together"
        )
    if not fits or C.dtype != frozen.wr.dtype:
        raise UserError(
            f"frozen_kernel: C is {C.dtype} {tuple(C.shape)} but the constants are for "
            f"{frozen.wr.dtype} (channels, {', '.join(map(str, frozen.mix.shape[2:]))}), "
            "channels at least 1"
        )
    name = _frozen_backend("frozen_kernel", backend, C.device.type, C.dtype)
    with torch.autocast(C.device.type, enabled=False):
        a, b = (frozen.mix[:, :, None] * C).sum(-1)
        k: Tensor = _nplr(a, b, frozen.wr, frozen.wi, frozen.gamma, frozen.length, name)
        return k


def _frozen_backend(function: str, backend: str, device: str, dtype: torch.dtype) -> str:
    name: str = backends.resolve("nplr", backend, device, dtype)
    if name == "reference":
        raise UserError(
            f"{function}: backend 'reference' (named by the call or by {backends.VARIABLE}) has no "
            "frozen form; name another, or use nplr_kernel"
        )
    return name


def one_row(backend: str, device: str) -> Tensor:
    """Run the smallest kernel through a backend: one feature, one pair, four samples."""
    one = torch.ones(1, 1, dtype=torch.complex64, device=device)
    log_dt = torch.zeros(1, device=device)
    if backend == "reference":
        return reference.run(-0.5 * one, one, one, one, one[None], log_dt, 4, False)
    row = torch.ones(2, 2, 1, 1, device=device)
    k: Tensor = _nplr(row, row, -row[0, 0], row[0, 0], None, 4, backend)
    return k


def _check(vectors: dict[str, Tensor], log_dt: Tensor, L: int) -> None:
    w = vectors["w"]
    for name, vector in vectors.items():
        if not vector.is_complex():
            raise UserError(f"nplr_kernel: {name} is {vector.dtype}; it must be complex")
        if vector.shape[-2:] != w.shape or vector.dim() != (3 if name == "C" else 2):
            raise UserError(
                f"nplr_kernel: {name} has shape {tuple(vector.shape)} but w {tuple(w.shape)}; "
                "w, P, Q, B are (H, N/2), C is (channels, H, N/2)"
            )
        if vector.device != w.device or log_dt.device != w.device:
            raise UserError(
                f"nplr_kernel: {name} is on {vector.device}, log_dt on {log_dt.device} but w on "
                f"{w.device}; move them together"
            )
    if 0 in w.shape or 0 in vectors.get("C", w).shape:
        raise UserError(f"nplr_kernel: w {tuple(w.shape)} and C must not be empty")
    if log_dt.shape != w.shape[:1] or not log_dt.is_floating_point():
        raise UserError(
            f"nplr_kernel: log_dt is {log_dt.dtype} {tuple(log_dt.shape)}; "
            f"it must be real ({w.shape[0]},)"
        )
    if L < 1:
        raise UserError(f"nplr_kernel: L is {L}; it must be at least 1")


@torch.library.custom_op(
    "sssd_hpc::nplr_freeze",
    mutates_args=(),
    schema=(
        "(Tensor w, Tensor P, Tensor Q, Tensor B, Tensor log_dt, int L, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _freeze(
    w: Tensor, P: Tensor, Q: Tensor, B: Tensor, log_dt: Tensor, L: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w, P, Q, B = (torch.view_as_complex(x.double().contiguous()) for x in (w, P, Q, B))
    dt = log_dt.double().exp()[:, None]
    w = w * dt
    x = 2 * torch.stack([B, P]) * dt
    y = x * torch.conj_physical(w)
    # Re(x C) and Re(y C) as forms of (Re C, Im C).
    mix = torch.stack([torch.stack([f.real, -f.imag], dim=-1) for f in (x, y)])
    # Copies: of one state the planes would count as contiguous views of w.
    wr, wi = (x.clone(memory_format=torch.contiguous_format) for x in (w.real, w.imag))
    return mix, wr, wi, _woodbury((x * Q).real, (y * Q).real, wr, wi, L, backend)


def _woodbury(a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, L: int, backend: str) -> Tensor:
    """Return gamma (H, F, 2) from the products a, b (2, H, N2) of B and of P with Q, in float64.

    Where gamma is zero a kernel's spectrum is (c + i s) R, with B's row first R_BQ; with P's, R_PQ:
    one call gives both, as twice the features.
    """
    c, s = half_angles(L, a.dtype, a.device)
    a, b = (torch.stack([rows, rows.flip(0)], dim=1).flatten(1, 2)[:, None] for rows in (a, b))
    poles = torch.cat([wr, wr]), torch.cat([wi, wi])
    zero = a.new_zeros(a.shape[2], c.numel(), 2)
    run = backends.module("nplr", backend).forward
    R = torch.view_as_complex(run(*dense(a, b, *poles), c, s, zero)[0])
    R_BQ, R_PQ = (R * torch.complex(c, -s)).chunk(2)
    return torch.view_as_real(c * R_BQ / (1 + c * R_PQ))


@_freeze.register_fake
def _(
    w: Tensor, P: Tensor, Q: Tensor, B: Tensor, log_dt: Tensor, L: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, N2, _ = w.shape
    real = w.new_empty(H, N2, dtype=torch.float64)
    mix, gamma = real.new_empty(2, 2, H, N2, 2), real.new_empty(H, L // 2 + 1, 2)
    return mix, real, torch.empty_like(real), gamma


@torch.library.custom_op(
    "sssd_hpc::nplr",
    mutates_args=(),
    schema=(
        "(Tensor a, Tensor b, Tensor wr, Tensor wi, Tensor? gamma, int L, str backend) -> Tensor"
    ),
)
def _nplr(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, gamma: Tensor | None, L: int, backend: str
) -> Tensor:
    c, s = half_angles(L, a.dtype, a.device)
    k_f = backends.module("nplr", backend).forward(*dense(a, b, wr, wi), c, s, gamma)
    k: Tensor = torch.fft.irfft(torch.view_as_complex(k_f), n=L)
    return k


@_nplr.register_fake
def _(
    a: Tensor, b: Tensor, wr: Tensor, wi: Tensor, gamma: Tensor | None, L: int, backend: str
) -> Tensor:
    channels = a.shape[1] - (gamma is None)
    return a.new_empty(channels, a.shape[2], L)


@torch.library.custom_op(
    "sssd_hpc::nplr_backward",
    mutates_args=(),
    schema=(
        "(Tensor g, Tensor a, Tensor b, Tensor wr, Tensor wi, Tensor? gamma, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _nplr_backward(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    wr: Tensor,
    wi: Tensor,
    gamma: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L = g.shape[-1]
    c, s = half_angles(L, a.dtype, a.device)
    # The adjoint of irfft: every node but the first and Nyquist stands for two.
    g_f = torch.view_as_real(torch.fft.rfft(g)).mul_(2 / L)
    g_f[..., 0, :] /= 2
    if L % 2 == 0:
        g_f[..., -1, :] /= 2
    run = backends.module("nplr", backend).backward
    da, db, dwr, dwi = run(g_f, *dense(a, b, wr, wi), c, s, gamma)
    return da, db, dwr, dwi


@_nplr_backward.register_fake
def _(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    wr: Tensor,
    wi: Tensor,
    gamma: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pole = wr.new_empty(wr.shape if gamma is None else 0)
    return a.new_empty(a.shape), b.new_empty(b.shape), pole, torch.empty_like(pole)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gamma = ctx.saved_tensors[-1]
    da, db, dwr, dwi = _nplr_backward(g, *ctx.saved_tensors, ctx.backend)
    poles = (dwr, dwi) if gamma is None else (None, None)
    return da, db, *poles, None, None, None


_nplr.register_autograd(_differentiate, setup_context=_save)
for _op in (_nplr, _nplr_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)
