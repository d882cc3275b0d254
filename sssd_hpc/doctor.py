"""What this machine can run: each part is tried, not guessed, and a failure names its reason."""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MIN_FREE_GB = 2.0
PROBE_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `needed` says whether the main job depends on it."""

    name: str
    usable: bool
    detail: str
    needed: bool


def examine(folder: Path) -> list[Finding]:
    """Try everything that the commands need; `folder` is where free disk is measured."""
    findings = [_python()]
    findings += [_library(name) for name in ("torch", "numpy", "scipy", "wfdb", "sklearn")]
    findings += [_library(name) for name in ("matplotlib", "safetensors", "tyro", "rich", "yaml")]
    gpu = _gpu()
    findings += [_deepspeed(), gpu, *_ops(), _compiler(has_gpu=gpu.usable), _slurm()]
    findings += [_disk(folder)]
    return findings


def can_run(findings: list[Finding]) -> bool:
    """Say whether prepare, train, sample and evaluate can run here."""
    return all(finding.usable for finding in findings if finding.needed)


def _try(name: str, probe: Callable[[], str], *, needed: bool) -> Finding:
    try:
        return Finding(name, True, probe(), needed)
    except Exception as error:  # noqa: BLE001 - whatever fails is the finding
        text = str(error).strip() or type(error).__name__
        return Finding(name, False, text.splitlines()[-1], needed)


def _python() -> Finding:
    usable = (3, 10) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} on {platform.platform()}"
    return Finding("python", usable, detail, True)


def _library(name: str) -> Finding:
    def probe() -> str:
        return str(getattr(importlib.import_module(name), "__version__", "imported"))

    return _try(name, probe, needed=True)


def _deepspeed() -> Finding:
    def probe() -> str:
        # In a process of its own: the import takes seconds and sets up logging.
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", "import deepspeed as d; print(d.__version__)"],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(result.stderr)
        return result.stdout.split()[-1]

    return _try("deepspeed", probe, needed=True)


def _gpu() -> Finding:
    def probe() -> str:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("no GPU that torch can use; everything runs on the CPU")
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"

    return _try("gpu", probe, needed=False)


def _ops() -> list[Finding]:
    try:
        import torch

        from sssd_hpc.ops import backends
    except ImportError as error:
        return [Finding("ops", False, str(error), True)]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        Finding(
            f"op {op} [{backend}] on {device}", usable, reason or "one row ran", backend == "torch"
        )
        for device in devices
        for op, backend, usable, reason in backends.report(device)
    ]


def _compiler(*, has_gpu: bool) -> Finding:
    def probe() -> str:
        missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool, path=_search_path())]
        if missing:
            raise RuntimeError(f"{' and '.join(missing)} not found; DeepSpeed on a CPU needs both")
        return "g++ and ninja, for DeepSpeed's CPU communication"

    return _try("compiler", probe, needed=not has_gpu)


def _search_path() -> str:
    """Return PATH with this environment's own bin folder, where pip puts ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _slurm() -> Finding:
    def probe() -> str:
        if not shutil.which("sbatch"):
            raise RuntimeError("no sbatch here; jobs run on this machine alone")
        result = subprocess.run(
            ["sinfo", "--version"],  # noqa: S607 - found on PATH just above
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return result.stdout.strip()

    return _try("slurm", probe, needed=False)


def _disk(folder: Path) -> Finding:
    free_gb = shutil.disk_usage(folder).free / 1e9
    detail = f"{free_gb:.0f} GB free at {folder.resolve()}"
    return Finding("disk", free_gb >= MIN_FREE_GB, detail, True)
