"""What the doors of several ops need of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# Not dtype.to_real() and to_complex(), which torch.compile does not know.
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
REAL = {complex_: real for real, complex_ in COMPLEX.items()}


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors contiguous, as backends take them."""
    return tuple(tensor.contiguous() for tensor in tensors)
