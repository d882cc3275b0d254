"""What every Triton backend of this room needs around its kernels.

It refuses to hide that a kernel cannot run: a tensor that Triton cannot reach, or a Triton that is
too old, is one error with its reason. A backend's `triton.py` uses it so:

    from sssd_hpc.ops import launch

    OPTIONS = launch.options(num_warps=4)        # the same for the launch and in `aot.Compilation`

    @triton.jit
    @no_type_check                               # runtime type checkers would hide its globals
    def _kernel(X, Y, L, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)      # rows on axis 0: the others end at 65535 programs
        ...
        z = launch.dot(x, y, z, "tf32")          # not tl.dot: the interpreter misreads bfloat16

    def forward(x: Tensor) -> Tensor:
        block = launch.block(x.shape[-1], 16, 128)
        with launch.on(x):                       # refuses or sets the device
            _kernel[(rows,)](x, y, L, block, **OPTIONS)

Each such file ends with a list `COMPILATIONS`: see `sssd_hpc.ops.aot`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sssd_hpc.errors import UserError

MINIMUM = (3, 6)


@triton.jit
@no_type_check
def _anything(X):
    pass


_INTERPRETED = not isinstance(_anything, triton.JITFunction)
INTERPRETED = tl.constexpr(_INTERPRETED)


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the import)."""
    return _INTERPRETED


def unusable(x: Tensor) -> str:
    """Return why a kernel cannot be launched on `x`, "" if it can."""
    if version() < MINIMUM:
        return f"triton is {triton.__version__}; {MINIMUM[0]}.{MINIMUM[1]} or newer is needed"
    if not interpreted() and not x.is_cuda:
        return f"triton kernels need a GPU tensor and this one is on {x.device.type}"
    return ""


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current for the launches inside.

    Raises:
        UserError: what `unusable` says.
    """
    if reason := unusable(x):
        raise UserError(reason)
    if interpreted():
        # As on a device, arithmetic on NaN and infinity is no event.
        return np.errstate(all="ignore")
    return torch.cuda.device(x.device)


def version() -> tuple[int, int]:
    """Return (major, minor) of the installed Triton."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def options(num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Return the launch options, with fused multiply-add pinned: its default differs by version."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def block(n: int, least: int, most: int) -> int:
    """Return the power of two that holds `n`, held between `least` and `most` (powers of two)."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


def widened(tile: int) -> int:
    """Return `tile`, fourfold in the interpreter: its time goes by operations, not by numbers."""
    return 4 * tile if interpreted() else tile


@triton.jit
@no_type_check
def dot(a, b, accumulator, precision: tl.constexpr):
    """Return accumulator + a @ b; `precision` ("tf32", "ieee", ...) matters for float32 only.

    The interpreter multiplies the bit patterns of bfloat16 as integers, so there the operands are
    widened first; the products are exact either way.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=precision)


@triton.jit
@no_type_check
def load_complex(X, at, mask):
    """Load complex numbers, kept as pairs, whole; return their real and imaginary parts."""
    pairs = X + 2 * tl.expand_dims(at, -1) + tl.arange(0, 2)
    return tl.split(tl.load(pairs, mask=tl.expand_dims(mask, -1), other=0.0))


@triton.jit
@no_type_check
def store_complex(X, at, re, im, mask):
    """Store complex numbers whole: parts one by one would leave each memory sector half written."""
    pairs = X + 2 * tl.expand_dims(at, -1) + tl.arange(0, 2)
    tl.store(pairs, tl.join(re, im), mask=tl.expand_dims(mask, -1))
