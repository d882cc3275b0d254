"""What only a GPU can show of all ops: accesses within bounds, and calls that graphs can hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sssd_hpc import ops

pytestmark = pytest.mark.gpu
COMMON = """
import torch
from sssd_hpc.ops import bidirectional_conv, cauchy, gate, nplr_kernel, residual_norm, residual_skip
def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()
"""
SCRIPTS = {
    "nplr and cauchy": """
for L in (1, 2, 65, 300):
    P, Q, B = (draw(3, 5, dtype=torch.complex64) for _ in range(3))
    C = draw(3, 3, 5, dtype=torch.complex64)
    w = torch.complex(-P.detach().real.abs() - 0.5, P.detach().imag).requires_grad_()
    log_dt = torch.full((3,), -3.0, device="cuda").requires_grad_()
    nplr_kernel(w, P, Q, B, C, log_dt, L, "triton").square().sum().backward()
    cauchy(P, draw(L, dtype=torch.complex64), w, "triton").abs().sum().backward()
""",
    "fftconv": """
for L in (1, 63, 257, 1000, 1500, 4096):
    for dtype in (torch.float32, torch.bfloat16):
        for activation in ("gelu", None):
            u, k, D = draw(3, 2, L, dtype=dtype), draw(2, 2, L), draw(2)
            bidirectional_conv(u, k, D, activation, "triton").sum().backward()
""",
    "block": """
torch.set_float32_matmul_precision("high")
for C, L in ((1, 1), (17, 130), (64, 200)):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = draw(2, C, L, dtype=dtype), draw(C), draw(C)
        for shift in (draw(2, C), None):
            residual_norm(x, x, weight, bias, shift, backend="triton").sum().backward()
        h = gate(draw(2, 2 * C, L, dtype=dtype), "triton")
        out, skips = residual_skip(h, x, x, draw(2 * C, C), draw(2 * C), "triton")
        (out + skips).sum().backward()
""",
}


@pytest.mark.parametrize("part", SCRIPTS)
def test_memcheck_finds_nothing(part):
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    tool = shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)
    if tool is None:
        pytest.skip("no compute-sanitizer")
    script = COMMON + SCRIPTS[part] + "torch.cuda.synchronize()"
    run = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def draw(*shape: int, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, device=device)


def case(op: str, device: str = "cuda") -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a public op of real tensors, and tensors for it that may all train."""

    def new(*shape: int) -> Tensor:
        return draw(*shape, device=device)

    w, P, B = (new(8, 32, 2) for _ in range(3))
    w[..., 0] = -0.5 - w[..., 0].abs()
    C, log_dt = new(2, 8, 32, 2), torch.full((8,), -4.0, device=device)
    u, k, D, h = new(5, 8, 1000), new(2, 8, 1000), new(8), new(5, 16, 1000)
    z = torch.view_as_complex

    def general(*given: Tensor) -> Tensor:
        w, P, Q, B, C = (z(x) for x in given[:5])
        return ops.nplr_kernel(w, P, Q, B, C, given[5], 1000)

    if op == "nplr_kernel":
        return general, [w, P, P.clone(), B, C, log_dt]
    if op == "frozen_kernel":
        frozen = ops.freeze(w, P, P, B, log_dt, 1000, torch.float32)
        return lambda C: ops.frozen_kernel(C, frozen), [C]
    if op == "cauchy":
        return lambda v, n, w: torch.view_as_real(ops.cauchy(z(v), z(n), z(w))), [B, new(99, 2), w]
    if op == "bidirectional_conv":
        return ops.bidirectional_conv, [u, k, D]
    if op == "residual_norm":
        return ops.residual_norm, [u, new(5, 8, 1000), D, new(8), new(5, 8)]
    if op == "gate":
        return ops.gate, [h]
    return lambda *x: torch.cat(ops.residual_skip(*x)), [u, u + 1, u - 1, new(16, 8), new(16)]


def step(function: Callable[..., Tensor], leaves: list[Tensor], train: bool) -> list[Tensor]:
    out = function(*leaves)
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if train else ())]


@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "op",
    [
        "nplr_kernel",
        "frozen_kernel",
        "cauchy",
        "bidirectional_conv",
        "residual_norm",
        "gate",
        "residual_skip",
    ],
)
def test_a_captured_op_follows_its_inputs(op, train):
    function, leaves = case(op)
    leaves = [leaf.requires_grad_(train) for leaf in leaves]
    # Kernels are compiled and libraries take their workspaces before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(function, leaves, train)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(function, leaves, train)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.9)
    graph.replay()
    for ours, truth in zip(captured, step(function, leaves, train), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()
