"""The public Cauchy op: checks at the door, float32 or float64 whatever the autocast.

It runs the registered op `sssd_hpc::cauchy` on rows of real planes; the backends' functions are
those of plain.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends
from sssd_hpc.ops.cauchy import reference
from sssd_hpc.ops.tensors import REAL, dense


def cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
    """Sum v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)) over the stored states n.

    Args:
        v: numerators, complex (..., N2).
        z: nodes, complex (..., L); leading dimensions broadcast against those of v and w.
        w: poles, complex (..., N2), one of each conjugate pair.
        backend: auto, reference, torch, cpp, keops or triton.

    Returns:
        Complex (..., L), complex128 if any input is, else complex64. Inputs that are not finite
        give sums that are not.

    Raises:
        UserError: inputs that are not complex, do not broadcast or are on several devices, no
            state or node at all, unusable backend.

    Source: S4 (arXiv:2111.00396), section 3.2.
    """
    for name, tensor in (("v", v), ("z", z), ("w", w)):
        if not tensor.is_complex() or tensor.dim() < 1:
            raise UserError(
                f"cauchy: {name} is {tensor.dtype} {tuple(tensor.shape)}; "
                "it must be complex with at least one dimension"
            )
        if tensor.device != v.device:
            raise UserError(f"cauchy: {name} is on {tensor.device} but v on {v.device}")
    try:
        poles = torch.broadcast_shapes(v.shape, w.shape)
        leading = torch.broadcast_shapes(poles[:-1], z.shape[:-1])
    except RuntimeError as error:
        raise UserError(
            f"cauchy: v {tuple(v.shape)}, z {tuple(z.shape)}, w {tuple(w.shape)} do not fit; "
            "v and w are (..., N/2), z is (..., L)"
        ) from error
    if 0 in (*poles, *z.shape):
        raise UserError(f"cauchy: v {tuple(v.shape)}, z {tuple(z.shape)} must not be empty")
    double = torch.complex128 in (v.dtype, z.dtype, w.dtype)
    dtype = torch.complex128 if double else torch.complex64
    v, z, w = (tensor.to(dtype) for tensor in (v, z, w))
    name = backends.resolve("cauchy", backend, v.device.type, REAL[dtype])
    with torch.autocast(v.device.type, enabled=False):
        if name == "reference":
            return reference.run(v, z, w)
        rows = (*leading, poles[-1])
        if all(size == 1 for size in z.shape[:-1]):
            z = z.reshape(1, -1)
        else:
            z = z.expand(*leading, -1).reshape(-1, z.shape[-1])
        v, w = (tensor.expand(rows).reshape(-1, rows[-1]) for tensor in (v, w))
        r = _cauchy(*(torch.view_as_real(tensor.resolve_conj()) for tensor in (v, z, w)), name)
        return torch.view_as_complex(r).reshape(*leading, r.shape[1])


def one_row(backend: str, device: str) -> Tensor:
    """Run the smallest sum through a backend: one pair, one node."""
    one = torch.ones(1, dtype=torch.complex64, device=device)
    if backend == "reference":
        return reference.run(one, 1j * one, -one)
    row = torch.ones(1, 1, 2, device=device)
    r: Tensor = _cauchy(row, row, -row, backend)
    return r


@torch.library.custom_op(
    "sssd_hpc::cauchy",
    mutates_args=(),
    schema="(Tensor v, Tensor z, Tensor w, str backend) -> Tensor",
)
def _cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    r: Tensor = backends.module("cauchy", backend).forward(*dense(v, z, w))
    return r


@_cauchy.register_fake
def _(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape[0], z.shape[1], 2)


@torch.library.custom_op(
    "sssd_hpc::cauchy_backward",
    mutates_args=(),
    schema=(
        "(Tensor g, Tensor v, Tensor z, Tensor w, bool need_z, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _cauchy_backward(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.module("cauchy", backend).backward
    dv, dz, dw = run(*dense(g, v, z, w), need_z)
    return dv, dz, dw


@_cauchy_backward.register_fake
def _(
    g: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    dz = z.new_empty(z.shape if need_z else 0)
    return v.new_empty(v.shape), dz, w.new_empty(w.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    need_z = ctx.needs_input_grad[1]
    dv, dz, dw = _cauchy_backward(g, *ctx.saved_tensors, need_z, ctx.backend)
    return dv, dz if need_z else None, dw, None


_cauchy.register_autograd(_differentiate, setup_context=_save)
for _op in (_cauchy, _cauchy_backward):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)
