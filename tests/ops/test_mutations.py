"""Plausible typos in the kernel's formulas turn the comparison with the reference red.

Each mutation is made in a copy of the package, in a process of its own; what it replaces must be in
the source, so that a mutation cannot fade away when the code moves.
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
MUTATIONS = {
    "conjugate": ("torch", f"{OPS}/op.py", "(v * w.conj()).real", "(v * w).real"),
    "frozen-conjugate": ("torch", f"{OPS}/op.py", "y = x * torch.conj_physical(w)", "y = x * w"),
    "nyquist-node": ("torch", f"{OPS}/nodes.py", "c[-1] = 0.0", "c[-1] = 1.0"),
    "denominator": ("torch", f"{OPS}/plain.py", "(cv - 2 * s)", "(cv + 2 * s)"),
    "denominator-imaginary": ("torch", f"{OPS}/plain.py", "di = -4 * s", "di = 4 * s"),
    "woodbury": ("torch", f"{OPS}/plain.py", "/ (1 + c * R[1, -1]), R", "/ (1 - c * R[1, -1]), R"),
    "frozen-woodbury": ("torch", f"{OPS}/op.py", "(1 + c * R_PQ)", "(1 - c * R_PQ)"),
    "woodbury-gradient": ("torch", f"{OPS}/plain.py", "u = 1 / (1 + c", "u = 1 / (1 - c"),
    "triton-denominator": ("triton", f"{OPS}/triton.py", "di = (-2 * s2", "di = (2 * s2"),
    "cpp-denominator": ("cpp", "csrc/nplr_kernels.h", "(c * wi_n - t)", "(c * wi_n + t)"),
}


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_the_unchanged_package_is_green(tmp_path, backend):
    result = check(tmp_path, backend)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_turns_the_comparison_red(tmp_path, name):
    backend, file, old, new = MUTATIONS[name]
    path = copy_package(tmp_path) / file
    source = path.read_text()
    assert source.count(old) >= 1, f"{old!r} is no longer in {file}"
    path.write_text(source.replace(old, new))
    if backend == "cpp":
        build(tmp_path)
    result = check(tmp_path, backend)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout.startswith("RED")


def copy_package(folder: Path) -> Path:
    """Copy the package and its sources without the tests."""
    shutil.copytree(
        ROOT / "sssd_hpc", folder / "sssd_hpc", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def build(folder: Path) -> None:
    """Build the extension of the copy: only the file of this op, which is what is called."""
    for source in folder.glob("csrc/*.cpp"):
        if source.stem not in ("nplr", "dispatch"):
            source.unlink()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for library in folder.glob("sssd_hpc/*.so"):
        library.unlink()
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def check(folder: Path, backend: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "sssd_hpc").exists():
        copy_package(folder)
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutated_kernel.py")), backend],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
