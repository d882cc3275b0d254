"""The pointwise parts in plain torch, each with its backward in closed form.

A mean over dimension 1 of (batch, H, L) costs no transposed copy, which is where layer_norm on a
transposed view spends most of its time once the result must be contiguous. Statistics use sums
and never a matrix product, which could round to tf32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, H, L) in x's dtype, and mean and rstd (B, L) in weight's.

    out = (x + y - mean) rstd weight + bias + shift; x, y (B, H, L), weight, bias (H,), shift
    (B, H) or None; mean and rstd over the features.
    """
    s = _add(x, y, weight.dtype)
    mean = s.mean(1, keepdim=True)
    s -= mean
    rstd = s.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    s *= rstd
    offset = bias if shift is None else bias + shift
    out = torch.addcmul(offset[..., None], s, weight[:, None])
    return out.to(x.dtype), mean.squeeze(1), rstd.squeeze(1)


def residual_norm_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dsum (B, H, L), the gradient of x and of y alike, dweight (H,) and dshift (B, H).

    With n = (x + y - mean) rstd and means over the features:
    dsum = rstd (weight g - mean(weight g) - n mean(weight g n)).
    """
    g = g.to(weight.dtype)
    n = _add(x, y, weight.dtype).sub_(mean[:, None]).mul_(rstd[:, None])
    product = g * n
    dweight, dshift = product.sum(2).sum(0), g.sum(2)
    along = product.mul_(weight[:, None]).mean(1, keepdim=True)
    dsum = torch.mul(g, weight[:, None], out=product)
    dsum -= dsum.mean(1, keepdim=True)
    dsum.addcmul_(n, along, value=-1).mul_(rstd[:, None])
    return dsum.to(x.dtype), dweight, dshift


def gate(h: Tensor) -> Tensor:
    """Return tanh(h[:, :C]) sigmoid(h[:, C:]) of h (B, 2C, L)."""
    signal, control = _wide(h).chunk(2, dim=1)
    return signal.tanh().mul_(control.sigmoid()).to(h.dtype)


def gate_backward(g: Tensor, h: Tensor) -> Tensor:
    """Return dh (B, 2C, L) from g (B, C, L)."""
    signal, control = _wide(h).chunk(2, dim=1)
    t, s = signal.tanh(), control.sigmoid()
    dh = torch.empty_like(h, dtype=t.dtype)
    d_signal, d_control = dh.chunk(2, dim=1)
    torch.ops.aten.tanh_backward.grad_input(s * g, t, grad_input=d_signal)
    torch.ops.aten.sigmoid_backward.grad_input(t.mul_(g), s, grad_input=d_control)
    return dh.to(h.dtype)


def residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (x + z[:, :C]) / sqrt(2) and skips + z[:, C:] of z = weight h + bias (B, 2C, L).

    h (B, C, L) and weight (2C, C) share a dtype, x and skips (B, C, L) another or the same; bias
    (2C,) is float32 or wider.
    """
    (B, C, _), root = h.shape, math.sqrt(0.5)
    residual, skip = (half.expand(B, C, C) for half in (weight[:C] * root, weight[C:]))
    # With the bias added to what the products accumulate into, no product is ever stored alone.
    x_out = torch.add(bias[:C, None] * root, x, alpha=root)
    skips_out = skips + bias[C:, None]
    if h.dtype == x_out.dtype:
        return x_out.baddbmm_(residual, h), skips_out.baddbmm_(skip, h)
    x_out += torch.bmm(residual, h)
    skips_out += torch.bmm(skip, h)
    return x_out.to(x.dtype), skips_out.to(x.dtype)


def _add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return x + y if x.dtype == dtype else x.to(dtype).add_(y)


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))
