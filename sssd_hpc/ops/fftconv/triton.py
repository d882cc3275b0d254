"""The convolution in one pass on a GPU: pad, transform, multiply, transform back, GELU, store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sssd_hpc.errors import UserError
from sssd_hpc.ops import aot
from sssd_hpc.ops.fftconv import butterfly, monarch, toeplitz
from sssd_hpc.ops.fftconv.packing import CHUNK, LONGEST, circle

DTYPES = (torch.float32, torch.bfloat16)


def spectrum_shape(H: int, L: int) -> tuple[int, ...]:
    """Return the shape of K: the spectrum of the circle, divided by its samples, as pairs.

    Raises:
        UserError: L is more than a program's registers hold.
    """
    if L > LONGEST:
        raise UserError(f"the triton convolution takes {LONGEST} samples, not {L}; use 'torch'")
    return H, circle(L), 2


def prepare(k: Tensor, D: Tensor) -> Tensor:
    """Return the spectrum K of both kernels (2, H, L) and the skip (H,)."""
    ahead, behind = k
    H, L = ahead.shape
    n = spectrum_shape(H, L)[1]
    gap = ahead.new_zeros(H, n - (2 * L - 1))
    both = torch.cat([ahead, gap, behind[:, : L - 1].flip(-1)], dim=-1)
    return torch.view_as_real((torch.fft.fft(both) + D[:, None]) / n)


def prepare_backward(dK: Tensor, H: int, L: int) -> tuple[Tensor, Tensor]:
    """Return (dk (2, H, L), dD (H,)): the adjoint of `prepare`."""
    r = torch.fft.ifft(torch.view_as_complex(dK)).real
    behind = pad(r[:, circle(L) - (L - 1) :].flip(-1), (0, 1))
    return torch.stack([r[:, :L], behind]), r[:, 0].clone()


def forward(u: Tensor, K: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """Return (y, pre) in u's dtype; pre, the value before GELU, is empty unless `keep`."""
    y, pre = _form(u, K).forward(u, K, activation, keep)
    return y, pre


def backward(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return (du, dK) from the gradient of y."""
    du, dK = _form(u, K).backward(dy, u, K, pre, activation)
    return du, dK


def _form(u: Tensor, K: Tensor) -> Any:
    # On AMD the tile of products does not fit the registers.
    narrow = u.dtype == torch.bfloat16 and torch.version.hip is None
    return monarch if narrow and K.shape[1] <= monarch.LARGEST else butterfly


def _compilation(
    form: Any, what: str, rows: str, registers: tuple[int, ...], amd: aot.Budget, L: int = 1000
) -> aot.Compilation:
    """Name a launch of rows "fp32" or "bf16": "kept", "gelu", "plain" or one of them "backward"."""
    backward = "backward" in what
    kernel = form._backward_kernel if backward else form._forward_kernel
    constexprs = form._constants(circle(L), L, CHUNK) | {"GELU": "plain" not in what}
    if not backward:
        constexprs["KEEP"] = what == "kept"
    kinds = dict.fromkeys(("U", "dU", "Y", "dY", "Pre", "F1", "F2"), f"*{rows}")
    kinds |= dict.fromkeys(("K", "dK", "W", "T"), "*i64")
    products = form is monarch
    return aot.Compilation(
        name=f"fftconv {'monarch' if products else 'butterfly'} {circle(L)} {what}, {rows}",
        kernel=kernel,
        signature={a: kinds.get(a, "i32") for a in kernel.arg_names if a not in constexprs},
        constexprs=constexprs,
        options=form._options(circle(L)),
        budgets={},
        tensor_cores=products,
    )


B=aot.Budget()
COMPILATIONS = [
    *(_compilation(butterfly, w, "fp32", (), B) for w in ("kept", "gelu", "plain", "gelu backward", "plain backward")),
    *(_compilation(monarch, w, "bf16", (), B) for w in ("kept", "gelu", "plain", "gelu backward", "plain backward")),
    *(_compilation(butterfly, w, "bf16", (), B, 2000) for w in ("kept", "gelu backward")),
    *(_compilation(butterfly, w, "fp32", (), B, 4096) for w in ("kept", "gelu backward")),
    *toeplitz.COMPILATIONS,
]
