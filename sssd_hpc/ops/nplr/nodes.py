"""The nodes of the generating function, rounded once from float64."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


# Nothing is dropped: a captured CUDA graph reads them where they lie.
@functools.cache
def half_angles(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return c = cos and s = sin of theta/2 = pi j / L for j = 0..L//2, each (L//2 + 1,)."""
    with torch.inference_mode(False):
        angle = math.pi / L * torch.arange(L // 2 + 1, dtype=torch.float64, device=device)
        c, s = angle.cos(), angle.sin()
        if L % 2 == 0:
            # pi/2 is not a float64: the Nyquist node would miss c = 0 by 6e-17.
            c[-1] = 0.0
        return c.to(dtype), s.to(dtype)
