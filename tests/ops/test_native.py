"""The compiled extension: its loader's reasons, its build that never fails, its CPU levels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sssd_hpc.ops import native

ROOT = Path(__file__).parents[2]


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads, with one tiny source."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    project = '[project]\nname = "sssd_hpc"\nversion = "0"\n'
    packages = '[tool.setuptools]\npackages = ["sssd_hpc"]\n'
    (tmp_path / "pyproject.toml").write_text(project + packages)
    (tmp_path / "sssd_hpc").mkdir()
    (tmp_path / "sssd_hpc" / "__init__.py").touch()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cpp").write_text("int one() { return 1; }\n")
    return tmp_path


def test_a_missing_extension_says_how_to_get_it(tmp_path):
    with pytest.raises(RuntimeError, match=r"is missing: it was not built.*make setup"):
        native.find(tmp_path, "2.13.0")


def test_an_extension_for_another_torch_is_refused_by_name(tmp_path):
    (tmp_path / "_C.torch-2.9.1+cu128.so").touch()
    with pytest.raises(
        RuntimeError, match=r"built for torch 2\.9\.1\+cu128 and this is torch 2.13"
    ):
        native.find(tmp_path, "2.13.0+cpu")


def test_the_extension_for_this_torch_is_found_beside_others(tmp_path):
    for version in ("2.9.1", "2.13.0+cpu"):
        (tmp_path / f"_C.torch-{version}.so").touch()
    assert native.find(tmp_path, "2.13.0+cpu").name == "_C.torch-2.13.0+cpu.so"


def test_an_extension_that_does_not_load_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path / f"_C.torch-{torch.__version__}.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    with pytest.raises(RuntimeError, match=r"does not load: .*; run `make setup`") as caught:
        native.load.__wrapped__()
    assert "\n" not in str(caught.value)


def test_a_build_names_its_library_by_the_version_of_torch(checkout):
    built = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout)
    assert built.returncode == 0, built.stderr
    assert native.find(checkout / "sssd_hpc", torch.__version__).stat().st_size > 0


@pytest.mark.parametrize("source", ["no compiler", "does not compile"])
def test_a_build_that_fails_installs_without_the_extension(checkout, source):
    environment = {}
    if source == "no compiler":
        environment = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}
    else:
        (checkout / "csrc" / "op.cpp").write_text("int one( {\n")
    built = python("setup.py", "-q", "build_ext", "--inplace", cwd=checkout, **environment)
    assert built.returncode == 0, built.stderr
    assert "sssd_hpc: the C++ extension is not built: " in built.stderr
    assert not list((checkout / "sssd_hpc").glob("*.so"))


def test_a_build_without_torch_installs_without_the_extension(checkout):
    hide = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['-q', 'build_ext']; "
    built = python("-c", hide + "runpy.run_path('setup.py')", cwd=checkout)
    assert built.returncode == 0, built.stderr
    assert "the C++ extension is not built: " in built.stderr
    assert "--no-build-isolation" in built.stderr


def test_a_build_can_be_switched_off(checkout):
    built = python("setup.py", "-q", "build_ext", cwd=checkout, SSSD_HPC_BUILD="0")
    assert built.returncode == 0, built.stderr
    assert built.stderr.strip() == "sssd_hpc: the C++ extension is not built: SSSD_HPC_BUILD=0"


def test_the_environment_forces_a_level_of_instructions():
    library = str(native.find(native.PACKAGE, torch.__version__))
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); "
        "print(torch.ops.sssd_hpc_cpp.cpu_level())"
    )
    assert python("-c", code, library, SSSD_HPC_CPU="baseline").stdout == "baseline\n"
    wrong = python("-c", code, library, SSSD_HPC_CPU="mmx")
    assert "SSSD_HPC_CPU is 'mmx'; this processor runs baseline" in wrong.stderr


def test_the_widest_level_is_the_default():
    extension = native.load()
    assert extension.cpu_level() == os.environ.get("SSSD_HPC_CPU", extension.widest_cpu_level())
