"""Synthetic data sets from a trained run: one record for each real one, resumable and proven whole.

Joins model, diffusion and ecg; knows no cluster.
"""

from sssd_hpc.generate.sampling import sample

__all__ = ["sample"]
