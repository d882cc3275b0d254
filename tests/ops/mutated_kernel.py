"""Compare a backend's kernels with the reference's: exits 1 and says RED where they differ.

python mutated_kernel.py BACKEND        in a copy of the package, see test_mutations.py
"""

from __future__ import annotations

import math
import sys

import torch

from sssd_hpc.ops import freeze, frozen_kernel, nplr_kernel

CHANNELS, H, N2, L = 2, 3, 5, 40
BOUND = 1e-11


def draw() -> list[torch.Tensor]:
    torch.manual_seed(0)
    real = {"dtype": torch.float64}
    w = torch.complex(-0.5 - torch.rand(H, N2, **real), 40 * torch.rand(H, N2, **real).cumsum(1))
    P, B = torch.randn(2, H, N2, dtype=torch.complex128)
    C = torch.randn(CHANNELS, H, N2, dtype=torch.complex128)
    log_dt = math.log(1e-2) + torch.rand(H, **real)
    return [w, P, P.conj().resolve_conj(), B, C, log_dt]


def values(backend: str) -> list[torch.Tensor]:
    """Return the general kernel, its gradients, the frozen kernel and its gradient."""
    leaves = [p.requires_grad_() for p in draw()]
    weight = torch.randn(CHANNELS, H, L, dtype=torch.float64)
    k = nplr_kernel(*leaves, L, backend)
    general = [k, *torch.autograd.grad((k * weight).sum(), leaves)]
    if backend == "reference":
        return [*general, k, torch.view_as_real(general[5])]
    w, P, Q, B, C, log_dt = (p.detach() for p in leaves)
    planes = torch.view_as_real(C).clone().requires_grad_()
    k = frozen_kernel(planes, freeze(w, P, Q, B, log_dt, L, torch.float64), backend)
    return [*general, k, *torch.autograd.grad((k * weight).sum(), planes)]


def main() -> int:
    red = [
        index
        for index, (ours, truth) in enumerate(
            zip(values(sys.argv[1]), values("reference"), strict=True)
        )
        if not (ours - truth).norm() <= BOUND * truth.norm()
    ]
    print("RED" if red else "GREEN", red)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
