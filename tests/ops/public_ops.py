"""Compile every public op and differentiate it twice: prints what breaks its promises.

python public_ops.py BACKEND        in a process of its own: runtime type checks do not compile
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from sssd_hpc.ops import (
    bidirectional_conv,
    cauchy,
    freeze,
    frozen_kernel,
    gate,
    nplr_kernel,
    pointwise,
    residual_norm,
    residual_skip,
)

H, N2, L = 2, 3, 10


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64)


def poles() -> Tensor:
    return torch.complex(-0.5 - torch.rand(H, N2), 9 * torch.rand(H, N2))


def frozen(C: Tensor, backend: str) -> Tensor:
    imaginary = torch.arange(H * N2, dtype=torch.float32).reshape(H, N2)
    w = torch.complex(-0.1 * (1 + imaginary), imaginary)
    return frozen_kernel(C, freeze(w, w, w.conj(), w, w.real[:, 0], L, torch.float32), backend)


# Function of (leaves, backend), and its leaves.
OPS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "nplr_kernel": (
        lambda *p, backend: nplr_kernel(*p, L, backend),
        lambda: [poles(), *(noise(H, N2) for _ in range(3)), noise(2, H, N2), -torch.ones(H)],
    ),
    "frozen_kernel": (frozen, lambda: [torch.randn(2, H, N2, 2)]),
    "cauchy": (cauchy, lambda: [noise(H, N2), noise(L), poles()]),
    "bidirectional_conv": (
        bidirectional_conv,
        lambda: [torch.randn(2, H, L), torch.randn(2, H, L), torch.randn(H)],
    ),
    "pointwise": (
        lambda *p, backend: pointwise(*p),
        lambda: [torch.randn(2, H, L), torch.randn(4, H), torch.randn(4)],
    ),
    "gate": (gate, lambda: [torch.randn(2, 2 * H, L)]),
    "residual_norm": (
        residual_norm,
        lambda: [torch.randn(2, H, L), torch.randn(2, H, L), torch.randn(H), torch.randn(H)],
    ),
    "residual_skip": (
        lambda *p, backend: torch.cat(residual_skip(*p, backend=backend)),
        lambda: [*(torch.randn(2, H, L) for _ in range(3)), torch.randn(2 * H, H), torch.ones(4)],
    ),
}


def compiles(name: str, backend: str) -> str:
    """Return how value or gradients of the compiled op differ, "" if they do not."""
    function, draw = OPS[name]
    leaves = [leaf.requires_grad_() for leaf in draw()]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        out = f(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out.abs().square().sum(), leaves)]

    try:
        for ours, truth in zip(run(compiled), run(function), strict=True):
            torch.testing.assert_close(ours, truth)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the answer
        return f"does not compile: {error}"
    return ""


def refuses_twice(name: str, backend: str) -> str:
    """Return "" if a second derivative is refused, as it should be."""
    function, draw = OPS[name]
    leaves = [leaf.requires_grad_() for leaf in draw()]
    out = function(*leaves, backend=backend)
    gradients = torch.autograd.grad(out.abs().square().sum(), leaves, create_graph=True)
    try:
        torch.stack([g.abs().sum() for g in gradients]).sum().backward()
    except RuntimeError as error:
        return "" if "no autograd formula" in str(error) else f"refuses unclearly: {error}"
    return "has a second derivative"


def main(backend: str) -> int:
    torch.manual_seed(0)
    found = [
        f"{name} {fault}"
        for name in OPS
        for check in (compiles, refuses_twice)
        # A matrix product of torch's own has all derivatives.
        if (name, check) != ("pointwise", refuses_twice)
        if (fault := check(name, backend))
    ]
    print("\n".join(found))
    return len(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
