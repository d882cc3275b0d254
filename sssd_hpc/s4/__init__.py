"""The S4 layer: HiPPO-LegS in NPLR form, and the bidirectional sequence layer made of it."""

from sssd_hpc.s4.bank import KernelBank
from sssd_hpc.s4.layer import S4Layer

__all__ = ["KernelBank", "S4Layer"]
