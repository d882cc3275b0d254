"""The pointwise parts of a residual block on (batch, H, L): checks at the door, registered ops.

Nothing is transposed: statistics run over dimension 1 and linear layers are weight @ x. Statistics,
gate and sums are float32 (float64 for float64) whatever the dtype of the signals; linear layers
obey autocast. The backends' functions are those of plain.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends
from sssd_hpc.ops.block import plain, reference
from sssd_hpc.ops.tensors import dense


def residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Return LayerNorm(x + y) over the features, with `shift` added to the result.

    Args:
        x: residual stream, real (batch, H, L); float32, float64, bfloat16 or float16.
        y: what is added to it, the same shape, read in x's dtype.
        weight: scale of each feature, real (H,).
        bias: offset of each feature, real (H,).
        shift: offset of each record and feature, real (batch, H), or None.
        eps: added to the variance.
        backend: auto, reference, torch, cpp or triton.

    Returns:
        (batch, H, L) in x's dtype. A sample that is not finite spoils its own column (record, time)
        and no other.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, unusable backend.
    """
    _check("residual_norm", "batch H L", x=x)
    batch, features, _ = x.shape
    _check("residual_norm", "batch H L", x.shape, x.device, y=y)
    _check("residual_norm", "H", (features,), x.device, weight=weight, bias=bias)
    if shift is not None:
        _check("residual_norm", "batch H", (batch, features), x.device, shift=shift)
    wide = _wide(x.dtype)
    y, weight, bias = y.to(x.dtype), weight.to(wide), bias.to(wide)
    shift = shift if shift is None else shift.to(wide)
    name = backends.resolve("block", backend, x.device.type, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if name == "reference":
            return reference.residual_norm(x, y, weight, bias, shift, eps)
        out: Tensor = _residual_norm(x, y, weight, bias, shift, eps, name)[0]
        return out


def gate(h: Tensor, backend: str = "auto") -> Tensor:
    """Return tanh of the first half of the features times sigmoid of the second.

    Args:
        h: real (batch, 2C, L); float32, float64, bfloat16 or float16.
        backend: auto, reference, torch, cpp or triton.

    Returns:
        (batch, C, L) in h's dtype.

    Raises:
        UserError: shape or dtype that does not fit, unusable backend.
    """
    _check("gate", "batch 2C L", h=h)
    if h.shape[1] % 2:
        raise UserError(f"gate: h has {h.shape[1]} features; their number must be even")
    name = backends.resolve("block", backend, h.device.type, h.dtype)
    with torch.autocast(h.device.type, enabled=False):
        if name == "reference":
            return reference.gate(h)
        out: Tensor = _gate(h, name)
        return out


def residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Apply the block's two last linear layers as one and add their results.

    With z = weight @ h + bias: ((x + z[:, :C]) / sqrt(2), skips + z[:, C:]).

    Args:
        h: gated signal, real (batch, C, L).
        x: the block's input, the same shape; float32, float64, bfloat16 or float16.
        skips: sum of the skips of earlier blocks, the same shape, read in x's dtype.
        weight: residual layer above skip layer, real (2C, C).
        bias: their biases, real (2C,).
        backend: auto, reference, torch, cpp or triton.

    Returns:
        The block's output and the new sum of skips, both (batch, C, L) in x's dtype. h and weight
        are multiplied in the dtype of autocast, otherwise in x's; sums are float32 or wider.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, unusable backend.
    """
    _check("residual_skip", "batch C L", x=x)
    C = x.shape[1]
    _check("residual_skip", "batch C L", x.shape, x.device, h=h, skips=skips)
    _check("residual_skip", "2C C", (2 * C, C), x.device, weight=weight)
    _check("residual_skip", "2C", (2 * C,), x.device, bias=bias)
    narrow = _linear_dtype(x)
    name = backends.resolve("block", backend, x.device.type, narrow)
    h, weight = h.to(narrow), weight.to(narrow)
    skips, bias = skips.to(x.dtype), bias.to(_wide(x.dtype))
    with torch.autocast(x.device.type, enabled=False):
        if name == "reference":
            return reference.residual_skip(h, x, skips, weight, bias)
        x_out, skips_out = _residual_skip(h, x, skips, weight, bias, name)
        return x_out, skips_out


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return weight @ x + bias: the linear layer over features, a convolution of size 1.

    One batched product with the bias as what it accumulates into: on a CPU as fast as conv1d on one
    thread and up to twice as fast on two or in bfloat16. On a GPU float32 follows
    torch.set_float32_matmul_precision.

    Args:
        x: real (batch, I, L).
        weight: real (O, I).
        bias: real (O,).

    Returns:
        (batch, O, L) in the dtype of autocast, otherwise in x's.

    Raises:
        UserError: shapes, dtypes or devices that do not fit.
    """
    _check("pointwise", "batch I L", x=x)
    batch, features, _ = x.shape
    rows = weight.shape[0] if weight.dim() == 2 else -1
    _check("pointwise", "O I", (rows, features), x.device, weight=weight)
    _check("pointwise", "O", (rows,), x.device, bias=bias)
    dtype = _linear_dtype(x)
    offset = bias.to(dtype)[:, None]
    return torch.baddbmm(offset, weight.to(dtype).expand(batch, -1, -1), x.to(dtype))


def one_row(backend: str, device: str) -> Tensor:
    """Run every part on the smallest input through a backend: two features of one sample."""
    x, square = torch.ones(1, 2, 1, device=device), torch.ones(2, 2, device=device)
    if backend == "reference":
        return reference.gate(reference.residual_norm(x, x, square[0], square[0], None, 1e-5))
    out, _, _ = _residual_norm(x, x, square[0], square[0], None, 1e-5, backend)
    h = _gate(out, backend)
    x_out, skips = _residual_skip(h, h, h, square[:, :1].contiguous(), square[0], backend)
    total: Tensor = x_out + skips
    return total


def _check(
    op: str,
    axes: str,
    shape: tuple[Any, ...] | None = None,
    device: torch.device | None = None,
    **tensors: Tensor,
) -> None:
    """Refuse tensors of another shape, of a dtype that is not real, or on another device."""
    for name, tensor in tensors.items():
        given = tuple(tensor.shape)
        fits = len(given) == len(axes.split()) if shape is None else given == tuple(shape)
        if not fits or not tensor.is_floating_point():
            sizes = "" if shape is None else f" = {tuple(shape)}"
            raise UserError(
                f"{op}: {name} is {tensor.dtype} {given}; "
                f"it must be real ({', '.join(axes.split())}){sizes}"
            )
        if tensor.dtype not in plain.DTYPES:
            raise UserError(f"{op}: {name} is {tensor.dtype}; use float32, float64 or bfloat16")
        if device is not None and tensor.device != device:
            raise UserError(f"{op}: {name} is on {tensor.device} but x on {device}; move them")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums for signals of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives a linear layer on x; it leaves float64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _run(backend: str, x: Tensor) -> Any:
    """Return the module that runs on x; no kernel is launched on nothing."""
    return backends.module("block", backend) if x.numel() else plain


@torch.library.custom_op(
    "sssd_hpc::residual_norm",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? shift, float eps, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, weight, bias = dense(x, y, weight, bias)
    shift = shift if shift is None else shift.contiguous()
    out, mean, rstd = _run(backend, x).residual_norm(x, y, weight, bias, shift, eps)
    return out, mean, rstd


@_residual_norm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = weight.new_empty(x.shape[0], x.shape[2])
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@torch.library.custom_op(
    "sssd_hpc::residual_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor g, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor rstd, str backend)"
        " -> (Tensor, Tensor, Tensor)"
    ),
)
def _residual_norm_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = dense(g, x, y, weight, mean, rstd)
    dsum, dweight, dshift = _run(backend, x).residual_norm_backward(*tensors)
    return dsum, dweight, dshift


@_residual_norm_backward.register_fake
def _(
    g: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(x.shape[:2])


@torch.library.custom_op(
    "sssd_hpc::gate", mutates_args=(), schema="(Tensor h, str backend) -> Tensor"
)
def _gate(h: Tensor, backend: str) -> Tensor:
    out: Tensor = _run(backend, h).gate(h.contiguous())
    return out


@_gate.register_fake
def _(h: Tensor, backend: str) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2, h.shape[2])


@torch.library.custom_op(
    "sssd_hpc::gate_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor h, str backend) -> Tensor",
)
def _gate_backward(g: Tensor, h: Tensor, backend: str) -> Tensor:
    dh: Tensor = _run(backend, h).gate_backward(*dense(g, h))
    return dh


@_gate_backward.register_fake
def _(g: Tensor, h: Tensor, backend: str) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op(
    "sssd_hpc::residual_skip",
    mutates_args=(),
    schema=(
        "(Tensor h, Tensor x, Tensor skips, Tensor weight, Tensor bias, str backend)"
        " -> (Tensor, Tensor)"
    ),
)
def _residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    tensors = dense(h, x, skips, weight, bias)
    with torch.autocast(h.device.type, enabled=False):
        x_out, skips_out = _run(backend, h).residual_skip(*tensors)
    return x_out, skips_out


@_residual_skip.register_fake
def _(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op(
    "sssd_hpc::residual_skip_backward",
    mutates_args=(),
    schema="(Tensor gx, Tensor gskips, Tensor h, Tensor weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _residual_skip_backward(
    gx: Tensor, gskips: Tensor, h: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dh, dx, dweight, dbias; plain matrix products serve every backend."""
    (B, C, _), wide = h.shape, _wide(h.dtype)
    gx, gskips, h, weight = dense(gx, gskips, h, weight)
    dx = gx * math.sqrt(0.5)
    residual, skip = dx.to(h.dtype), gskips.to(h.dtype)
    with torch.autocast(h.device.type, enabled=False):
        # Two products into one sum: side by side in one they would first have to be copied there.
        dh = torch.bmm(weight[:C].t().expand(B, C, C), residual)
        dh.baddbmm_(weight[C:].t().expand(B, C, C), skip)
        time = h.transpose(1, 2)
        dweight = [torch.bmm(g, time).sum(0, dtype=wide) for g in (residual, skip)]
    dbias = torch.cat([g.sum(2, dtype=wide).sum(0) for g in (dx, gskips)])
    return dh, dx, torch.cat(dweight).to(h.dtype), dbias.to(_wide(gx.dtype))


@_residual_skip_backward.register_fake
def _(
    gx: Tensor, gskips: Tensor, h: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = gx.new_empty(2 * h.shape[1], dtype=_wide(gx.dtype))
    return h.new_empty(h.shape), gx.new_empty(gx.shape), weight.new_empty(weight.shape), dbias


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, weight, _, shift, _, ctx.backend = inputs
    ctx.shifted = shift is not None
    ctx.save_for_backward(x, y, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_norm(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dsum, dweight, dshift = _residual_norm_backward(g, *ctx.saved_tensors, ctx.backend)
    return dsum, dsum, dweight, dshift.sum(0), dshift if ctx.shifted else None, None, None


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, ctx.backend = inputs
    ctx.save_for_backward(h)


def _differentiate_gate(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return _gate_backward(g, *ctx.saved_tensors, ctx.backend), None


def _save_skip(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[3])


def _differentiate_skip(ctx: Any, gx: Tensor, gskips: Tensor) -> tuple[Tensor | None, ...]:
    dh, dx, dweight, dbias = _residual_skip_backward(gx, gskips, *ctx.saved_tensors)
    return dh, dx, gskips, dweight, dbias, None


_residual_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
_gate.register_autograd(_differentiate_gate, setup_context=_save_gate)
_residual_skip.register_autograd(_differentiate_skip, setup_context=_save_skip)
