"""The pointwise parts by the compiled extension, on the processor; csrc/block.cpp.

Linear layers are torch's own, whose matrix products are hard to beat there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.ops import native
from sssd_hpc.ops.block import plain

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

residual_skip = plain.residual_skip


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, mean, rstd); arguments as in plain.py."""
    out, mean, rstd = native.load().residual_norm(x, y, weight, bias, shift, eps)
    return out, mean, rstd


def residual_norm_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dsum, dweight, dshift); arguments as in plain.py."""
    dsum, dweight, dshift = native.load().residual_norm_backward(g, x, y, weight, mean, rstd)
    return dsum, dweight, dshift


def gate(h: Tensor) -> Tensor:
    """Return tanh(h[:, :C]) sigmoid(h[:, C:]); arguments as in plain.py."""
    out: Tensor = native.load().gate(h)
    return out


def gate_backward(g: Tensor, h: Tensor) -> Tensor:
    """Return dh; arguments as in plain.py."""
    dh: Tensor = native.load().gate_backward(g, h)
    return dh
