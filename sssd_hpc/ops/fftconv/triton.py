"""The convolution in one pass on a GPU: pad, transform, multiply, transform back, GELU, store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sssd_hpc.errors import UserError
from sssd_hpc.ops import aot
from sssd_hpc.ops.fftconv import butterfly, monarch, packing, toeplitz
from sssd_hpc.ops.fftconv.packing import CHUNK, circle

# For AMD the compiler is not done with the longest backward after minutes.
LONGEST = packing.LONGEST if torch.version.hip is None else packing.LONGEST // 2
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
    form: Any, what: str, rows: str, L: int, *registers: int, amd: tuple[int, int] = (0, 0)
) -> aot.Compilation:
    """Name a launch: its rows are "fp32" or "bf16", `amd` is (stack, spills) there.

    `what` is kept, gelu (not kept) or plain (no activation), or one of the last two backward.
    """
    backward = "backward" in what
    kernel = form._backward_kernel if backward else form._forward_kernel
    constexprs = form._constants(circle(L)) | {
        "VECTOR": packing.vector(L),
        "PAIRS": CHUNK,
        "GELU": "plain" not in what,
    }
    if not backward:
        constexprs["KEEP"] = what == "kept"
    kinds = dict.fromkeys(("U", "dU", "Y", "dY", "Pre", "F1", "F2"), f"*{rows}")
    kinds |= dict.fromkeys(("K", "dK", "W", "T"), "*i64")
    products = form is monarch
    budgets = aot.budgets(*registers)
    budgets["gfx942"] = replace(budgets["gfx942"], stack=amd[0], spills=amd[1])
    targets = tuple(aot.TARGETS)
    if backward and circle(L) == 2 * LONGEST:
        for target in targets[:3]:
            budgets[target] = replace(budgets[target], stack=448, spills=256)
        # The AMD compiler is not done with it after ten minutes.
        targets = targets[:3]
    return aot.Compilation(
        name=f"fftconv {'monarch' if products else 'butterfly'} {circle(L)} {what}, {rows}",
        kernel=kernel,
        signature={a: kinds.get(a, "i32") for a in kernel.arg_names if a not in constexprs},
        constexprs=constexprs,
        options=form._options(circle(L)),
        budgets=budgets,
        tensor_cores=products,
        targets=targets,
    )


# On AMD butterflies keep scalars in vector registers; products spill there and are not launched.
COMPILATIONS = [
    _compilation(butterfly, "kept", "fp32", 1000, 136, 128, 128, 104, amd=(0, 24)),
    _compilation(butterfly, "gelu", "fp32", 1000, 136, 128, 128, 104, amd=(0, 16)),
    _compilation(butterfly, "plain", "fp32", 1000, 136, 128, 128, 112, amd=(0, 8)),
    _compilation(butterfly, "gelu backward", "fp32", 1000, 255, 255, 255, 184, amd=(0, 32)),
    _compilation(butterfly, "plain backward", "fp32", 1000, 255, 255, 255, 176, amd=(0, 16)),
    _compilation(monarch, "kept", "bf16", 1000, 128, 128, 128, 256, amd=(512, 128)),
    _compilation(monarch, "gelu", "bf16", 1000, 128, 128, 128, 256, amd=(512, 128)),
    _compilation(monarch, "plain", "bf16", 1000, 128, 128, 128, 256, amd=(512, 128)),
    _compilation(monarch, "gelu backward", "bf16", 1000, 255, 255, 255, 256, amd=(2048, 512)),
    _compilation(monarch, "plain backward", "bf16", 1000, 184, 184, 184, 256, amd=(2048, 512)),
    _compilation(butterfly, "kept", "bf16", 2000, 112, 104, 104, 136, amd=(0, 96)),
    _compilation(butterfly, "gelu backward", "bf16", 2000, 255, 255, 255, 216, amd=(0, 96)),
    _compilation(butterfly, "kept", "fp32", LONGEST, 216, 248, 248, 168, amd=(0, 16)),
    _compilation(butterfly, "gelu backward", "fp32", LONGEST, 255, 255, 255, 512),
    *toeplitz.COMPILATIONS,
]
