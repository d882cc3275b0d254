"""The pointwise parts by their definitions: the truth that other backends are tested against.

Plain autograd in the dtype of the inputs; narrow inputs are widened to float32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> Tensor:
    """Normalise x + y over the features; arguments as in `op.residual_norm`."""
    total = _wide(x) + _wide(y)
    centred = total - total.mean(1, keepdim=True)
    variance = (centred * centred).mean(1, keepdim=True)
    out = centred / (variance + eps).sqrt() * weight[:, None] + bias[:, None]
    if shift is not None:
        out = out + shift[:, :, None]
    return out.to(x.dtype)


def gate(h: Tensor) -> Tensor:
    """Return tanh of the first half times sigmoid of the second; h as in `op.gate`."""
    signal, control = _wide(h).chunk(2, dim=1)
    return (signal.tanh() * control.sigmoid()).to(h.dtype)


def residual_skip(
    h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the two halves of weight h + bias; arguments as in `op.residual_skip`."""
    z = torch.einsum("oc,bcl->bol", _wide(weight), _wide(h)) + bias[:, None]
    residual, skip = z.chunk(2, dim=1)
    return ((_wide(x) + residual) * 0.5**0.5).to(x.dtype), (_wide(skips) + skip).to(x.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
