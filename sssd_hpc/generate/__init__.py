"""Synthetic data sets from a trained run: one record for each real one, resumable and proven whole.

Joins model, diffusion and ecg; knows no cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sssd_hpc.generate.sampling import sample

__all__ = ["sample"]


def __getattr__(name: str) -> Any:
    # Loaded when used: `status` looks at a root in a moment, without torch.
    if name == "sample":
        from sssd_hpc.generate.sampling import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
