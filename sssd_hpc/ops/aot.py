"""Compile the Triton kernels ahead of time, without a GPU, and read what the compiler made of them.

Registers, stack, spills and shared memory come from the binary, so a kernel that would crawl is
found before it meets its device. It refuses kernels decorated under the interpreter.

A backend's `triton.py` ends with what it wants held, one entry for each specialisation that runs:

    COMPILATIONS = [
        aot.Compilation(
            name="nplr forward frozen",
            kernel=_forward_kernel,
            signature={"X": "*fp32", "Y": "*bf16", "L": "i32"},     # in order, no constexprs
            constexprs={"BLOCK": 128},
            options=OPTIONS,                                        # the launch's own
            budgets=aot.budgets(96, 96, 104, 64),       # registers on each target, as measured
            tensor_cores=False,
        )
    ]

Pointers are taken as 16-byte aligned, which is how torch allocates; name in `divisible` the
integers that are multiples of 16 in the run that is meant. `python -m sssd_hpc.ops.aot [nplr]`
prints the table of all ops, or of those named, and fails on a broken budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sssd_hpc import ops
from sssd_hpc.errors import UserError

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One operation of the matrix units, as each maker's disassembler names it.
MATRIX_UNITS = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma_\w+)")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a binary may use."""

    registers: int = 255
    """32-bit registers a thread; vector registers on AMD."""
    shared: int = 48 * 1024
    """Bytes of shared memory a program."""
    stack: int = 0
    """Bytes of local memory a thread (scratch on AMD)."""
    spills: int = 0
    """Loads and stores of local memory (registers spilled on AMD)."""


DEFAULTS = {"gfx942": Budget(registers=512, shared=64 * 1024)}


def budgets(*registers: int, shared: int = Budget.shared) -> dict[str, Budget]:
    """Return budgets of registers for `TARGETS` in their order; `shared` is NVIDIA's."""
    return {
        target: dataclasses.replace(DEFAULTS.get(target, Budget(shared=shared)), registers=count)
        for target, count in zip(TARGETS, registers, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One specialisation of one kernel, as it is launched, and what its binary may use.

    `tensor_cores` says whether the binary must use the matrix units or must not.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    tensor_cores: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    """Where it is launched."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """What the compiler made: the measures of `Budget`, and how many instructions."""

    registers: int
    shared: int
    stack: int
    spills: int
    matrix: int
    instructions: int
    text: str = field(repr=False)
    """The disassembly."""


def collect(op: str) -> list[Compilation]:
    """Return `COMPILATIONS` of an op of `with_triton`."""
    listed: list[Compilation] = importlib.import_module(f"{ops.__name__}.{op}.triton").COMPILATIONS
    return listed


def with_triton() -> list[str]:
    """Name the ops that have a Triton backend."""
    rooms = [room.name for room in pkgutil.iter_modules(ops.__path__) if room.ispkg]
    return [op for op in rooms if importlib.util.find_spec(f"{ops.__name__}.{op}.triton")]


def build(compilation: Compilation, target: str) -> Binary:
    """Compile for one of `TARGETS` and measure the binary; raises as `compiled`."""
    made = compiled(compilation, target)
    return _read_amd(made) if target.startswith("gfx") else _read_nvidia(made)


def compiled(compilation: Compilation, target: str) -> Any:
    """Compile for one of `TARGETS`; return Triton's own object.

    Raises:
        UserError: the kernel was decorated for the interpreter, or its arguments are not all given.
    """
    kernel = compilation.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise UserError("TRITON_INTERPRET is set: unset it before Python starts, to compile")
    given = {**compilation.signature, **dict.fromkeys(compilation.constexprs, "constexpr")}
    if set(given) != set(kernel.arg_names):
        wrong = sorted(set(given) ^ set(kernel.arg_names))
        raise UserError(f"{compilation.name}: missing or unknown arguments {', '.join(wrong)}")
    signature = {name: given[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in compilation.divisible
    }
    source = ASTSource(kernel, signature, dict(compilation.constexprs), aligned)
    return triton.compile(source, TARGETS[target], dict(compilation.options))


def check(compilation: Compilation, binary: Binary, target: str) -> list[str]:
    """Return how a binary breaks its budget, one line for each breach."""
    budget = compilation.budgets.get(target, DEFAULTS.get(target, Budget()))
    breaches = [
        f"{compilation.name} on {target}: {what} {used}, at most {most}"
        for what in ("registers", "shared", "stack", "spills")
        if (used := getattr(binary, what)) > (most := getattr(budget, what))
    ]
    if compilation.tensor_cores != bool(binary.matrix):
        wanted = "some" if compilation.tensor_cores else "none"
        breaches.append(
            f"{compilation.name} on {target}: {binary.matrix} tensor-core instructions, "
            f"{wanted} expected"
        )
    return breaches


def _read_nvidia(compiled: Any) -> Binary:
    # The wheel's own tool: a bare toolkit may lack it, or be older than the target.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(  # noqa: S603 - our own file through the wheel's own tool
                [tool, flag, path], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    return Binary(
        registers=_number(r"REG:(\d+)", usage),
        shared=compiled.metadata.shared,
        stack=_number(r"STACK:(\d+)", usage),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        matrix=len(MATRIX_UNITS.findall(sass)),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S.*;", sass)),
        text=sass,
    )


def _read_amd(compiled: Any) -> Binary:
    text = compiled.asm["amdgcn"]
    return Binary(
        registers=_number(r"\.vgpr_count:\s*(\d+)", text),
        shared=compiled.metadata.shared,
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s*(\d+)", text)
        + _number(r"\.sgpr_spill_count:\s*(\d+)", text),
        matrix=len(MATRIX_UNITS.findall(text)),
        instructions=len(re.findall(r"^\t[sv]_|^\t(?:global|ds|buffer)_", text, re.MULTILINE)),
        text=text,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in what the compiler reports"
    return int(found[1])


def _main() -> int:
    """Compile the kernels ahead of time and print what the binaries use."""
    parser = argparse.ArgumentParser(prog="python -m sssd_hpc.ops.aot", description=_main.__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="such as nplr; default: all")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    arguments = parser.parse_args()
    breaches = []
    print(f"{'':48}target   registers shared stack spills matrix instructions")
    for compilation in (c for op in arguments.ops or with_triton() for c in collect(op)):
        for target in arguments.target or TARGETS:
            if target not in compilation.targets:
                continue
            made = build(compilation, target)
            print(
                f"{compilation.name:48}{target:9}{made.registers:9}{made.shared:7}{made.stack:6}"
                f"{made.spills:7}{made.matrix:7}{made.instructions:13}",
                flush=True,
            )
            breaches += check(compilation, made, target)
    print(*breaches, sep="\n")
    return bool(breaches)


if __name__ == "__main__":
    sys.exit(_main())
