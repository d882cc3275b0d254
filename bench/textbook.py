"""The baseline: this project's network computed step by step as the public codes compute it.

Kernels are generated in every step by the complex64 formula under autograd, signals are permuted
between (B, H, L) and (L, B, H) around every S4 layer, the convolution is torch.fft's, and norm,
gate and 1x1 convolutions are separate operations. Conjugate states are summed, which the public
codes' fallback leaves out. Nothing here is meant to be fast, and nothing is made slow: the
quotients of all products share their denominators, and nodes are computed once.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, relu

from sssd_hpc.ops.nplr import reference

CauchySum = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.lru_cache(maxsize=8)
def nodes(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return omega and z at the roots of unity but -1, rounded once from complex128."""
    index = torch.arange((L + 1) // 2, dtype=torch.float64, device=device)
    omega = torch.polar(torch.ones_like(index), -2 * math.pi * index / L)
    return omega.to(dtype), (2 * (1 - omega) / (1 + omega)).to(dtype)


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Return the sums of v (..., H, N2) over the poles w (H, N2) and their conjugates, (..., L)."""
    up, down = z - w[..., None], z - w.conj()[..., None]
    return (v[..., None] / up + v.conj()[..., None] / down).sum(-2)


def kernel(
    w: Tensor,
    P: Tensor,
    Q: Tensor,
    B: Tensor,
    C: Tensor,
    log_dt: Tensor,
    L: int,
    cauchy_sum: CauchySum = cauchy,
) -> Tensor:
    """Generate the kernels (channels, H, L) of complex parameters; arguments as `nplr_kernel`."""
    dt = log_dt.exp()[:, None]
    omega, z = nodes(L, w.dtype, w.device)
    v = torch.stack([B, P])[:, None] * torch.cat([C, Q[None]])
    r = dt * cauchy_sum(v, z, w * dt)
    k_f = r[0, :-1] - r[0, -1] * r[1, :-1] / (1 + r[1, -1])
    k_f = k_f * (2 / (1 + omega))
    if L % 2 == 0:
        # The limit where omega is -1 and z has its pole.
        limit = dt[:, 0] * (B * C).sum(-1).real
        k_f = torch.cat([k_f, limit[..., None].to(k_f.dtype)], dim=-1)
    k: Tensor = torch.fft.irfft(k_f, n=L)
    return k


def convolution(u: Tensor, k: Tensor, D: Tensor) -> Tensor:
    """Return GELU(k * u + D u) of u (B, H, L) by a circle of 2 L; k (2, H, L)."""
    L = u.shape[-1]
    both = pad(k[0], (0, L)) + pad(k[1].flip(-1), (L, 0))
    k_f = torch.fft.rfft(both, n=2 * L)
    u_f = torch.fft.rfft(u, n=2 * L)
    y = torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]
    return gelu(y + D[:, None] * u)


def residual_norm(
    x: Tensor, y: Tensor, norm: Callable[[Tensor], Tensor], shift: Tensor | None
) -> Tensor:
    """Return LayerNorm over features of x + y, with the permutes around it and the shift after."""
    out = norm((x + y).permute(2, 0, 1)).permute(1, 2, 0)
    return out if shift is None else out + shift[..., None]


def gate(h: Tensor) -> Tensor:
    """Return tanh of the first half of the features times sigmoid of the second."""
    C = h.shape[1] // 2
    return torch.tanh(h[:, :C]) * torch.sigmoid(h[:, C:])


class TextbookS4(nn.Module):
    """An S4 layer on (L, B, H) with the parameters and buffers of one of ours."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lmax: int = layer.lmax
        for name in ("w", "P", "Q", "B", "log_dt"):
            self.register_buffer(name, getattr(layer, name).clone())
        self.C = nn.Parameter(layer.C.detach().clone())
        self.D = nn.Parameter(layer.D.detach().clone())
        self.output = copy.deepcopy(layer.output)
        self.norm = copy.deepcopy(layer.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (L, B, H)."""
        x = x.permute(1, 2, 0)
        planes = (self.w, self.P, self.Q, self.B, self.C)
        # Complex numbers know no autocast: it is the public code's own float32.
        with torch.autocast(x.device.type, enabled=False):
            w, P, Q, B, C = (torch.view_as_complex(cast(Tensor, plane)) for plane in planes)
            k = kernel(w, P, Q, B, C, cast(Tensor, self.log_dt), self.lmax)[..., : x.shape[-1]]
            y = convolution(x.float() if x.dtype != k.dtype else x, k, self.D)
        y = torch.einsum("oh,bhl->bol", self.output.weight[..., 0], y)
        y = y + self.output.bias[:, None]
        out: Tensor = self.norm((y + x).permute(2, 0, 1))
        return out


class TextbookBlock(nn.Module):
    """One residual block with the weights of one of ours."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.step: nn.Linear = copy.deepcopy(block.step)
        self.conv: nn.Conv1d = copy.deepcopy(block.conv)
        self.label: nn.Linear = copy.deepcopy(block.label)
        self.res: nn.Conv1d = copy.deepcopy(block.res)
        self.skip: nn.Conv1d = copy.deepcopy(block.skip)
        self.s4_in, self.s4_out = TextbookS4(block.s4_in), TextbookS4(block.s4_out)

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and its skip from the embeddings of step and labels."""
        h = self.conv(x + self.step(step)[..., None])
        h = self.s4_in(h.permute(2, 0, 1)).permute(1, 2, 0)
        h = h + self.label(label)[..., None]
        h = self.s4_out(h.permute(2, 0, 1)).permute(1, 2, 0)
        h = gate(h)
        return (x + self.res(h)) * math.sqrt(0.5), self.skip(h)


class Textbook(nn.Module):
    """The network with a copy of the weights of an `SSSDECG`, whose names it keeps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.init_conv: nn.Conv1d = copy.deepcopy(model.init_conv)
        self.step_embedding: nn.Module = copy.deepcopy(model.step_embedding)
        self.label_embedding: nn.Module = copy.deepcopy(model.label_embedding)
        self.skip_conv: nn.Conv1d = copy.deepcopy(model.skip_conv)
        self.head: nn.Conv1d = copy.deepcopy(model.head)
        self.blocks = nn.ModuleList(TextbookBlock(block) for block in model.blocks)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise; arguments as `SSSDECG`."""
        step, label = self.step_embedding(t), self.label_embedding(labels)
        x, skips = relu(self.init_conv(x_t)), torch.zeros((), device=x_t.device)
        for block in self.blocks:
            x, skip = block(x, step, label)
            skips = skips + skip
        eps_hat: Tensor = self.head(relu(self.skip_conv(skips * math.sqrt(1 / len(self.blocks)))))
        return eps_hat


def oracle_kernel(parameters: dict[str, Any], L: int) -> Tensor:
    """Generate the kernels in complex128 by the tested reference; parameters as `kernel`."""
    return reference.run(**parameters, L=L, half=False)
