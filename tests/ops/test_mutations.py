"""Plausible typos in the kernel's formulas turn the op's own tests red.

Each mutation is made in a copy of the package, where tests of test_nplr.py run in a process of
their own; what it replaces must be in the source, so that it cannot fade away when code moves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = "sssd_hpc/ops/nplr"
TESTS = ("tests/conftest.py", "tests/ops/conftest.py", "tests/ops/test_nplr.py")
CHOSEN = "every_gradient_equals or frozen_kernel_and_its_gradient"
MUTATIONS = {
    "conjugate": ("torch", f"{OPS}/op.py", "(v * w.conj()).real", "(v * w).real"),
    "frozen-conjugate": ("torch", f"{OPS}/op.py", "y = x * torch.conj_physical(w)", "y = x * w"),
    "nyquist-gradient": ("torch", f"{OPS}/op.py", "if L % 2 == 0:", "if L % 2:"),
    "nyquist-of-odd-lengths": ("torch", f"{OPS}/nodes.py", "if L % 2 == 0:", "if L > 1:"),
    "denominator": ("torch", f"{OPS}/plain.py", "(cv - 2 * s)", "(cv + 2 * s)"),
    "denominator-imaginary": ("torch", f"{OPS}/plain.py", "di = -4 * s", "di = 4 * s"),
    "woodbury": ("torch", f"{OPS}/plain.py", "/ (1 + c * R[1, -1]), R", "/ (1 - c * R[1, -1]), R"),
    "frozen-woodbury": ("torch", f"{OPS}/op.py", "(1 + c * R_PQ)", "(1 - c * R_PQ)"),
    "woodbury-gradient": ("torch", f"{OPS}/plain.py", "u = 1 / (1 + c", "u = 1 / (1 - c"),
    "triton-denominator": ("triton", f"{OPS}/triton.py", "di = (-2 * s2", "di = (2 * s2"),
    "triton-conjugate": ("triton", f"{OPS}/triton.py", "-di * inverse", "di * inverse"),
    "triton-woodbury": ("triton", f"{OPS}/triton.py", "1 + c * Pr, c", "1 - c * Pr, c"),
    "cpp-conjugate": (
        "cpp",
        "csrc/nplr_kernels.h",
        "V(minus_di * inverse)",
        "V(-minus_di * inverse)",
    ),
    "cpp-woodbury": (
        "cpp",
        "csrc/nplr_kernels.h",
        "T(1) + c * load(PQ + l)",
        "T(1) - c * load(PQ + l)",
    ),
    "cpp-denominator": ("cpp", "csrc/nplr_kernels.h", "(c * wi_n - t)", "(c * wi_n + t)"),
}


def test_the_unchanged_package_is_green(tmp_path):
    copy_package(tmp_path)
    result = check(tmp_path, "(torch or cpp or triton)")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_the_ops_own_tests_red(tmp_path, name):
    backend, file, old, new = MUTATIONS[name]
    copy_package(tmp_path)
    source = (tmp_path / file).read_text()
    assert source.count(old) >= 1, f"{old!r} is no longer in {file}"
    (tmp_path / file).write_text(source.replace(old, new))
    if backend == "cpp":
        build(tmp_path)
    result = check(tmp_path, backend)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "AssertionError" in result.stdout, result.stdout


def copy_package(folder: Path) -> None:
    """Copy the package, its sources and the op's own tests."""
    for name in ("sssd_hpc", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "ops").mkdir(parents=True)
    for name in ("pyproject.toml", *TESTS):
        shutil.copy(ROOT / name, folder / name)


def build(folder: Path) -> None:
    """Build of the extension of the copy what is called, and that in haste."""
    for source in folder.glob("csrc/*.cpp"):
        if source.stem != "nplr":
            source.unlink()
    for library in folder.glob("sssd_hpc/*.so"):
        library.unlink()
    dispatch = folder / "csrc" / "dispatch.h"
    dispatch.write_text(dispatch.read_text().replace("#define SSSD_X86 1", "#define SSSD_X86 0"))
    setup = (ROOT / "setup.py").read_text()
    assert '"-O3"' in setup
    (folder / "setup.py").write_text(setup.replace('"-O3"', '"-O0"'))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def check(folder: Path, backend: str) -> subprocess.CompletedProcess[str]:
    """Run the chosen tests of a backend in a copy, on the CPU."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", TESTS[-1], *options, "-k", f"{backend} and ({CHOSEN})"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
