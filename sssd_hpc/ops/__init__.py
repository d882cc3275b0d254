"""The numerical operations of the S4 layer behind one contract each, and the choice of backend.

Legend of this room: H features, N2 = N/2 stored states (one of each conjugate pair), L length.
"""

from sssd_hpc.ops import backends
from sssd_hpc.ops.cauchy.op import cauchy
from sssd_hpc.ops.fftconv.op import bidirectional_conv
from sssd_hpc.ops.nplr.op import nplr_kernel

__all__ = ["backends", "bidirectional_conv", "cauchy", "nplr_kernel"]
