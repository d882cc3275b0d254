"""Every Triton kernel compiles for every target within its budget, and a breach is caught."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.ops import aot, launch

BINARY = aot.Binary(registers=96, shared=0, stack=0, spills=0, matrix=0, instructions=1000, text="")
COMPILATION = aot.Compilation(
    name="some kernel",
    kernel=None,
    signature={},
    budgets={"sm_90": aot.Budget(registers=96, shared=512)},
)


def compiler(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled, whatever this process does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("op", aot.with_triton())
def test_every_kernel_compiles_within_its_budget(op, target):
    run = compiler("-m", "sssd_hpc.ops.aot", op, "--target", target)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("op", aot.with_triton())
def test_what_a_launch_compiles_is_what_is_held(op):
    run = compiler(str(Path(__file__).with_name("launches.py")), op)
    assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


@pytest.mark.parametrize("op", aot.with_triton())
def test_compilations_have_names_of_their_own(op):
    names = [compilation.name for compilation in aot.collect(op)]
    assert names
    assert len(set(names)) == len(names)


def test_the_ops_of_the_triton_backend_are_found():
    assert {"nplr", "cauchy"} <= set(aot.with_triton())


@pytest.mark.parametrize(("target", "threads"), [("sm_90", 32), ("gfx942", 64)])
def test_a_kernel_that_spills_is_caught(target, threads):
    # 32 nodes a thread keep 512 sums: more than there are registers.
    script = f"""
import dataclasses
from sssd_hpc.ops import aot
usual = next(c for c in aot.collect("nplr") if c.name == "nplr forward frozen, 2 channels, fp32")
greedy = dataclasses.replace(
    usual, constexprs={{**usual.constexprs, "NODES": {32 * threads}, "UNROLL": 1}}
)
print(*aot.check(greedy, aot.build(greedy, "{target}"), "{target}"), sep="\\n")
"""
    run = compiler("-c", script)
    assert f"fp32 on {target}: spills " in run.stdout, run.stdout + run.stderr
    assert f"fp32 on {target}: stack " in run.stdout


def test_a_binary_at_its_budget_passes():
    assert aot.check(COMPILATION, BINARY, "sm_90") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 97}, "registers 97, at most 96"),
        ({"shared": 513}, "shared 513, at most 512"),
        ({"stack": 8}, "stack 8, at most 0"),
        ({"spills": 1}, "spills 1, at most 0"),
        ({"matrix": 4}, "4 tensor-core instructions, none expected"),
    ],
)
def test_each_measure_is_held(change, words):
    breaches = aot.check(COMPILATION, dataclasses.replace(BINARY, **change), "sm_90")
    assert breaches == [f"some kernel on sm_90: {words}"]


def test_missing_tensor_cores_are_a_breach():
    matrix = dataclasses.replace(COMPILATION, tensor_cores=True)
    assert aot.check(matrix, BINARY, "sm_90") == [
        "some kernel on sm_90: 0 tensor-core instructions, some expected"
    ]
    assert aot.check(matrix, dataclasses.replace(BINARY, matrix=4), "sm_90") == []


def test_other_targets_fall_back_on_their_own_default():
    large = dataclasses.replace(BINARY, registers=400)
    assert aot.check(COMPILATION, large, "gfx942") == []
    assert len(aot.check(COMPILATION, large, "sm_80")) == 1


@pytest.mark.skipif(not launch.interpreted(), reason="kernels are compiled here")
def test_kernels_of_the_interpreter_are_not_compiled():
    with pytest.raises(UserError, match="unset it before Python starts"):
        aot.build(aot.collect("nplr")[0], "sm_90")


def test_arguments_that_a_kernel_does_not_have_are_named():
    script = """
import dataclasses
from sssd_hpc.ops import aot
wrong = dataclasses.replace(aot.collect("nplr")[0], divisible=(), constexprs={"NOPE": 1})
aot.build(wrong, "sm_90")
"""
    run = compiler("-c", script)
    assert "UserError" in run.stderr
    assert "missing or unknown arguments" in run.stderr
    assert "NOPE" in run.stderr
