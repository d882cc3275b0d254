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
            budgets={"sm_90": aot.Budget(registers=96)},            # others: the default budget
            tensor_cores=False,
        )
    ]

Pointers are taken as 16-byte aligned, which is how torch allocates; name in `divisible` the
integers that are multiples of 16 in the run that is meant. `python -m sssd_hpc.ops.aot [words]`
prints the table of those whose name has the words; `tests/ops/test_aot.py` holds the budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a binary may use."""

    registers: int = 255
    """32-bit registers a thread; the vector registers on AMD."""
    shared: int = 48 * 1024
    """Bytes of shared memory a program."""
    stack: int = 0
    """Bytes of local memory a thread (scratch on AMD)."""
    spills: int = 0
    """Loads and stores of local memory (registers spilled on AMD)."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One specialisation of one kernel, as it is launched, and what its binary may use."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    tensor_cores: bool = False
