"""Compile a model whole, forward and backward, and compare it with itself in eager mode.

A script of its own: the type checks that tests wrap around functions cannot be traced.
"""

from __future__ import annotations

import warnings

import torch

from sssd_hpc.model import SSSDECG


def outputs(model: torch.nn.Module, source: SSSDECG) -> list[torch.Tensor]:
    """Return the output and the gradient of every parameter that has one."""
    torch.manual_seed(1)
    x, labels = torch.randn(2, 3, 20), torch.randint(0, 2, (2, 4))
    source.zero_grad()
    out = model(x, torch.tensor([1, 5]), labels)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in source.parameters() if p.grad is not None)]


def main() -> None:
    warnings.simplefilter("error")
    # torch's own: its compiler imports what it deprecates.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"num_blocks": 2, "channels": 4, "d_state": 4, "lmax": 20, "label_dim": 8}
    model = SSSDECG(num_leads=3, num_labels=4, step_dims=(8, 16, 16), **sizes)
    torch.nn.init.normal_(model.head.weight)
    compiled = torch.compile(model, fullgraph=True)
    for ours, truth in zip(outputs(compiled, model), outputs(model, model), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main()
