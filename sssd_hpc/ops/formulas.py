"""Sums written as KeOps formulas: the one file that imports pykeops.

KeOps turns a formula into C++ or CUDA and compiles it at its first use in a dtype, 5 to 10 s, into
a folder of the user; later processes load what stands there. Here that is made safe: one process
builds at a time, what a killed one left half-built is removed, the compiler's words become the
reason of a failure, and nothing is printed. The device is that of the tensors, never a guess;
tensors that KeOps cannot reach are refused.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import importlib
import importlib.util
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FOLDER = "KEOPS_CACHE_FOLDER"


class Sum:
    """For each i the sum over j of a formula of x_i and y_j, compiled when first called.

    Args:
        formula: in KeOps' language, of the named variables.
        variables: "name = Vi(dim)" and "name = Vj(dim)", in the order of the call.
    """

    def __init__(self, formula: str, *variables: str) -> None:
        self.formula, self.variables = formula, variables
        self._built: dict[tuple[str, torch.dtype], Callable[..., Tensor]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Return (..., i, dim of the formula) of contiguous tensors (..., i or j, dim).

        Leading dimensions, at least one, broadcast where they are 1.

        Raises:
            RuntimeError: KeOps is missing, cannot build here, or cannot reach the tensors' device.
        """
        first = tensors[0]
        key = (first.device.type, first.dtype)
        if key not in self._built:
            self._built[key] = self._build(*tensors)
        return _run(self._built[key], tensors)

    def _build(self, *tensors: Tensor) -> Callable[..., Tensor]:
        device = tensors[0].device.type
        if device not in ("cpu", "cuda"):
            raise RuntimeError(f"KeOps runs on cpu and cuda tensors, not on {device}")
        keops = _load()
        if keops.config.pykeops_base.get_cxx_compiler() is None:
            raise RuntimeError("KeOps finds no C++ compiler; install g++ or name one in CXX")
        if device == "cuda" and not keops.config.gpu_available:
            raise RuntimeError(
                "KeOps sees no GPU: the loader must find libcuda and libnvrtc of a CUDA toolkit "
                "(LD_LIBRARY_PATH)"
            )
        with _alone(Path(keops.get_build_folder())), _quiet("KeOps cannot build a formula"):
            from pykeops.torch import Genred

            genred = Genred(
                self.formula, self.variables, reduction_op="Sum", axis=1, use_fast_math=False
            )
            built = functools.partial(genred, backend="CPU" if device == "cpu" else "GPU_1D")
            # What another process built meanwhile must be seen.
            importlib.invalidate_caches()
            began = time.monotonic()
            _run(built, tensors)
        if (seconds := time.monotonic() - began) > 1:
            logger.info(
                "KeOps built a formula in %.0f s into %s", seconds, keops.get_build_folder()
            )
        return built


def _run(built: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
    """Run with torch's number of threads, after the work that the tensors wait for."""
    if tensors[0].is_cuda:
        # KeOps launches on the default stream, which does not wait for torch's other streams.
        stream = torch.cuda.current_stream(tensors[0].device)
        if stream != torch.cuda.default_stream(tensors[0].device):
            stream.synchronize()
    elif (openmp := _openmp()) is not None:
        openmp.omp_set_num_threads(torch.get_num_threads())
    return built(*tensors)


@functools.cache
def _openmp() -> Any:
    """Return the OpenMP runtime of what g++ builds, which is not torch's own, or None."""
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None


@functools.cache
def _load() -> Any:
    """Import pykeops once, with a build folder that other programs do not write to."""
    if "pykeops" in sys.modules:
        # Whoever imported it has chosen its folder.
        return sys.modules["pykeops"]
    if importlib.util.find_spec("pykeops") is None:
        raise RuntimeError("pykeops is not installed; pip install 'sssd_hpc[keops]'")
    folder = Path(os.environ.get(FOLDER) or _default_folder()).expanduser().absolute()
    with _alone(folder), _environment(FOLDER, str(folder)), _quiet("pykeops cannot be imported"):
        import pykeops
        from keopscore.get_keops_dll import get_keops_dll
        from pykeops.common.keops_io import keops_binder

        # KeOps would write indexes of its folder when the process ends, in place and unlocked, and
        # fail to import where it finds one half-written. Without them it looks at the builds.
        for index in (get_keops_dll, *keops_binder.values()):
            atexit.unregister(index.save_cache)
    return pykeops


def _default_folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "sssd_hpc" / f"keops-{metadata.version('pykeops')}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a build folder, first removing what a killed process left half-built."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "sssd_hpc.lock").open("a")
    except OSError as error:
        raise RuntimeError(
            f"KeOps needs a folder to build in and cannot write {folder}: {error.strerror}; "
            f"name another in {FOLDER}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds KeOps formulas in %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        building = folder / "sssd_hpc.building"
        if building.exists():
            _discard(folder, since=building.stat().st_mtime_ns)
        building.touch()
        yield
        building.unlink()


def _discard(folder: Path, since: int) -> None:
    for path in folder.rglob("*"):
        known = path.name.startswith("sssd_hpc.") or not path.is_file()
        if not known and path.stat().st_mtime_ns >= since:
            path.unlink()


@contextlib.contextmanager
def _quiet(failure: str) -> Iterator[None]:
    """Keep what KeOps prints from stdout; on failure make it the reason."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        # The compiler's complaint says more than the import that fails for want of a build.
        lines = [line for line in said.getvalue().splitlines() if line and "KeOps]" not in line]
        reason = next((line for line in lines if "error:" in line), lines[0] if lines else error)
        raise RuntimeError(f"{failure}: {reason}") from error
    finally:
        logger.debug("KeOps said: %s", said.getvalue().strip())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
