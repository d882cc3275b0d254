"""Which implementation of an op runs: probe, choose, report.

An op is a folder `ops/<op>/`. Its `op.py` holds the public function and `one_row(backend, device)`,
the smallest call that exercises a backend. A backend is a file of the name in `FILES` with the
functions of plain.py; adding that file is all that adding a backend takes, besides its place in
`AUTO_ORDER`. It is never judged by whether it imports: it is judged by running one row.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any

import torch

from sssd_hpc.errors import UserError

logger = logging.getLogger(__name__)

OPS = ("nplr", "cauchy", "fftconv", "block")
FILES = {
    "reference": "reference",
    "torch": "plain",
    "cpp": "cpp",
    "keops": "keops",
    "triton": "triton",
}
# What "auto" tries on a device, the fastest first; bench/results shows why.
AUTO_ORDER = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}
VARIABLE = "SSSD_HPC_BACKEND"
WIDE = (torch.float32, torch.float64)


# Constant under torch.compile: the choice is made while tracing.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    """Return the name of the backend that runs `op` on a device type in a real dtype.

    "auto" is what the environment variable SSSD_HPC_BACKEND names for the op ("cpp", or
    "nplr=keops,fftconv=torch"), otherwise the first of `AUTO_ORDER` that works and takes the dtype;
    it is decided once and logged. "reference" is plain autograd and never automatic.

    Raises:
        UserError: unknown backend, or one asked for by name that cannot run here.
    """
    if backend == "auto":
        return _automatic(op, _wish(op, os.environ.get(VARIABLE, "")), device, dtype)
    return _named(op, backend, "backend", device, dtype)


def unless_wished(op: str, backend: str) -> str:
    """Return `backend`, or "auto" where SSSD_HPC_BACKEND names one for `op`."""
    return "auto" if _wish(op, os.environ.get(VARIABLE, "")) else backend


def module(op: str, backend: str) -> Any:
    """Return the module that implements `op` by the resolved name `backend`."""
    return importlib.import_module(_module_name(op, backend))


def report(device: str = "cpu") -> list[tuple[str, str, bool, str]]:
    """List (op, backend, usable, reason) on a device type; the reason is "" if usable."""
    rows = []
    for op in OPS:
        for backend in FILES:
            reason = probe(op, backend, device)
            rows.append((op, backend, not reason, reason))
    return rows


@functools.cache
def probe(op: str, backend: str, device: str) -> str:
    """Run one row through a backend; return why it cannot be used, "" if it can."""
    if importlib.util.find_spec(_module_name(op, backend)) is None:
        return f"there is no {backend} backend of {op}"
    try:
        row = importlib.import_module(f"sssd_hpc.ops.{op}.op").one_row(backend, device)
        finite = bool(torch.isfinite(row).all())
    except Exception as error:  # noqa: BLE001 - a broken driver or compiler may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if finite else "one row came out not finite"


def _wish(op: str, text: str) -> str:
    """Return what SSSD_HPC_BACKEND asks for `op`: one name for all, or `op=name` pairs."""
    if "=" not in text:
        return "" if text == "auto" else text
    wishes = {}
    for part in text.split(","):
        name, _, backend = part.partition("=")
        if name not in OPS or backend not in ("auto", *FILES):
            raise UserError(
                f"{VARIABLE} holds {part!r}; write one backend for all ops, or pairs of an op "
                f"({', '.join(OPS)}) and a backend ({', '.join(['auto', *FILES])}) like nplr=cpp"
            )
        wishes[name] = backend
    wish = wishes.get(op, "")
    return "" if wish == "auto" else wish


@functools.cache
def _automatic(op: str, wish: str, device: str, dtype: torch.dtype) -> str:
    if wish:
        name = _named(op, wish, VARIABLE, device, dtype)
        logger.info("%s: backend %s on %s, from %s", op, name, device, VARIABLE)
        return name
    order = AUTO_ORDER.get(device, ("torch",))
    reasons: list[str] = []
    for name in order:
        reason = _unusable(op, name, device, dtype)
        if not reason:
            logger.info("%s: backend %s on %s%s", op, name, device, "".join(reasons))
            return name
        reasons.append(f" ({name}: {reason})")
    raise UserError(f"no backend of {op} works on {device}:{''.join(reasons)}")


@functools.cache
def _named(op: str, backend: str, source: str, device: str, dtype: torch.dtype) -> str:
    if backend not in FILES:
        allowed = ", ".join(["auto", *FILES])
        raise UserError(f"{source} is {backend!r}; use one of {allowed}")
    if reason := _unusable(op, backend, device, dtype):
        raise UserError(
            f"{source} {backend!r} cannot run {op} on {device}: {reason}; use 'auto' or 'torch'"
        )
    return backend


def _unusable(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    if reason := probe(op, backend, device):
        return reason
    allowed = getattr(module(op, backend), "DTYPES", WIDE)
    if dtype not in allowed:
        return f"it takes {', '.join(map(str, allowed))}, not {dtype}"
    return ""


def _module_name(op: str, backend: str) -> str:
    return f"sssd_hpc.ops.{op}.{FILES[backend]}"
