"""Which room may import which: the floors of CONTRIBUTING.md, read from the source with ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sssd_hpc"
FLOORS = [
    {"errors"},
    {"ops", "diffusion", "config", "files", "progress"},
    {"s4", "ecg", "doctor"},
    {"model", "evaluate"},
    {"train", "generate", "review"},
    {"cli"},
]
HEAVY = {
    "deepspeed": {"train/engine.py"},
    "wfdb": {"ecg/wfdb_io.py"},
    "submitit": set(),
    "neurokit2": {"evaluate/delineate.py"},
    "zarr": {"generate/export.py"},
    "h5py": {"generate/export.py"},
    "triton": {
        "ops/aot.py",
        "ops/launch.py",
        "ops/*/triton.py",
        "ops/fftconv/butterfly.py",
        "ops/fftconv/monarch.py",
        "ops/fftconv/packing.py",
        "ops/fftconv/toeplitz.py",
    },
    "pykeops": {"ops/formulas.py"},
}


def floor_of(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_floors_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "sssd_hpc" or parts[1] in (room, "__version__"):
            continue
        other = parts[1]
        allowed = floor_of(other) < floor_of(room)
        # Long work shows progress and writes files: these two serve their own floor.
        allowed |= other in ("files", "progress") and floor_of(room) >= 1
        assert allowed, f"{room} imports {other}, which is beside or above it"


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_is_imported_in_its_own_file_alone(library: str) -> None:
    for path in FILES:
        if any(name.split(".")[0] == library for name in imports_of(path)):
            room = path.relative_to(PACKAGE)
            assert any(room.match(pattern) for pattern in HEAVY[library]), room


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, sssd_hpc, sssd_hpc.cli; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "deepspeed", "wfdb", "matplotlib", "sklearn"} & set(result.stdout.split())
