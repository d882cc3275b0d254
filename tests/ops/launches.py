"""Run an op's Triton backend up to the launch, without a GPU, and print what `aot` does not hold.

Triton asks its driver which device there is and compiles for it; a driver of our own says sm_90,
and the launch itself is left out. So each kernel is specialised by its real arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch
from triton.runtime import driver, jit

from sssd_hpc.ops import aot, launch
from sssd_hpc.ops.nplr.nodes import half_angles

Key = tuple[Any, ...]


class Driver:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> Any:
        return aot.TARGETS["sm_90"]

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def nplr(module: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        c, s = half_angles(1000, dtype, torch.device("cpu"))
        w = torch.ones(4, 32, dtype=dtype)
        for gamma in (torch.ones(4, 501, 2, dtype=dtype), None):
            a = torch.ones(2, 2 + (gamma is None), 4, 32, dtype=dtype)
            k_f = module.forward(a, a, w, w, c, s, gamma)
            module.backward(k_f, a, a, w, w, c, s, gamma)


def cauchy(module: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        v, z = torch.ones(4, 32, 2, dtype=dtype), torch.ones(1, 501, 2, dtype=dtype)
        module.backward(module.forward(v, z, v), v, z, v, need_z=True)


def fftconv(module: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        u = torch.ones(16, 2, 1000, dtype=dtype)
        K = module.prepare(torch.ones(2, 2, 1000), torch.ones(2))
        for activation in ("gelu", "none"):
            module.forward(u, K, activation, False)
            y, pre = module.forward(u, K, activation, True)
            module.backward(y, u, K, pre, activation)
    for dtype, L in ((torch.float32, 4096), (torch.bfloat16, 2000)):
        u, K = torch.ones(16, 1, L, dtype=dtype), module.prepare(torch.ones(2, 1, L), torch.ones(1))
        y, pre = module.forward(u, K, "gelu", True)
        module.backward(y, u, K, pre, "gelu")
    challenger = importlib.import_module("sssd_hpc.ops.fftconv.toeplitz")
    for dtype, precision in (
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        u, K = torch.ones(64, 1, 1000, dtype=dtype), torch.ones(1, 1999)
        y, pre = challenger.forward(u, K, "gelu", True)
        challenger.backward(y, u, K, pre, "gelu")


def block(module: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        x, h = torch.ones(2, 512, 1000, dtype=dtype), torch.ones(2, 1024, 1000, dtype=dtype)
        weight, shift = torch.ones(512, dtype=wide), torch.ones(2, 512, dtype=wide)
        module.residual_norm(x, x, weight, weight, None, 1e-5)
        _, mean, rstd = module.residual_norm(x, x, weight, weight, shift, 1e-5)
        module.residual_norm_backward(x, x, x, weight, mean, rstd)
        module.gate(h)
        module.gate_backward(x, h)
    # As under autocast, where the sums over blocks stay wide.
    for C, dtype in ((256, torch.float32), (256, torch.bfloat16), (32, torch.bfloat16)):
        x, weight, bias = torch.ones(2, C, 1000), torch.ones(2 * C, C), torch.ones(2 * C)
        module._residual_skip(x.to(dtype), x, x, weight.to(dtype), bias)


def record() -> list[tuple[Any, Any]]:
    """Let launches compile only; return the list of (kernel, what it was compiled from)."""
    seen: list[tuple[Any, Any]] = []
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self, compiled))
        return compiled

    jit.JITFunction.run = compile_only
    driver.set_active(Driver())
    launch.on = lambda x: contextlib.nullcontext()
    return seen


def key(kernel: Any, source: Any, metadata: Any) -> Key:
    names = kernel.arg_names
    constants = {names[at[0]]: value for at, value in sorted(source.constants.items())}
    aligned = {names[at[0]] for at, value in source.attrs.items() if value}
    shape = (metadata.num_warps, metadata.num_stages, metadata.enable_fp_fusion)
    return kernel.__name__, str(source.signature), str(constants), str(sorted(aligned)), shape


def main(op: str) -> None:
    module = importlib.import_module(f"sssd_hpc.ops.{op}.triton")
    seen = record()
    globals()[op](module)
    held = set()
    for compilation in aot.collect(op):
        compiled = aot.compiled(compilation, "sm_90")
        held.add(key(compilation.kernel, compiled.src, compiled.metadata))
    assert seen
    for kernel, compiled in seen:
        if (made := key(kernel, compiled.src, compiled.metadata)) not in held:
            print("not held:", *made, sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1])
