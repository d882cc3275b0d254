"""The numerical operations of the S4 layer behind one contract each, and the choice of backend.

Legend of this room: H features, N2 = N/2 stored states (one of each conjugate pair), L length.
"""

from sssd_hpc.ops import backends
from sssd_hpc.ops.block.op import gate, pointwise, residual_norm, residual_skip
from sssd_hpc.ops.cauchy.op import cauchy
from sssd_hpc.ops.fftconv.op import Spectrum, bidirectional_conv, convolve, prepare
from sssd_hpc.ops.nplr.op import FrozenNplr, freeze, frozen_kernel, nplr_kernel

__all__ = [
    "FrozenNplr",
    "Spectrum",
    "backends",
    "bidirectional_conv",
    "cauchy",
    "convolve",
    "freeze",
    "frozen_kernel",
    "gate",
    "nplr_kernel",
    "pointwise",
    "prepare",
    "residual_norm",
    "residual_skip",
]
