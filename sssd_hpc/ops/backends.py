"""Which implementation of an op runs: probe, choose, report.

An op is a folder `ops/<op>/` whose `op.py` holds the public function and `one_row(run)`, the
smallest call that exercises a backend. A backend of it is the file named in `FILES` with a function
`run` of the op's contract; adding that file is all that adding a backend takes, besides its place
in `AUTO_ORDER`. A backend is never judged by whether it imports: it is judged by running one row.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sssd_hpc.errors import UserError

logger = logging.getLogger(__name__)

OPS = ("nplr", "cauchy", "fftconv")
FILES = {
    "reference": "reference",
    "torch": "plain",
    "cpp": "cpp",
    "keops": "keops",
    "triton": "triton",
}
# What "auto" tries, the fastest first.
AUTO_ORDER = ("torch",)
VARIABLE = "SSSD_HPC_BACKEND"

Run = Callable[..., Tensor]


def choose(op: str, backend: str) -> Run:
    """Return the implementation of `op` that `backend` names.

    "auto" is what the environment variable SSSD_HPC_BACKEND names, otherwise the first of
    `AUTO_ORDER` that works; it is decided once and logged.

    Raises:
        UserError: unknown backend, or one asked for by name that cannot run here.
    """
    if backend == "auto":
        return _automatic(op, os.environ.get(VARIABLE, ""))
    return _named(op, backend, "backend")


def report() -> list[tuple[str, str, bool, str]]:
    """List (op, backend, usable, reason) for every op and backend; the reason is "" if usable."""
    rows = []
    for op in OPS:
        for backend in FILES:
            reason = probe(op, backend)
            rows.append((op, backend, not reason, reason))
    return rows


@functools.cache
def probe(op: str, backend: str) -> str:
    """Run one row through a backend; return why it cannot be used, "" if it can."""
    module = _module_name(op, backend)
    if importlib.util.find_spec(module) is None:
        return f"the {backend} backend of {op} is not part of this version"
    try:
        row = importlib.import_module(f"sssd_hpc.ops.{op}.op").one_row(_load(op, backend))
    except Exception as error:  # noqa: BLE001 - a broken driver or compiler may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if bool(torch.isfinite(row).all()) else "one row came out not finite"


@functools.cache
def _automatic(op: str, wish: str) -> Run:
    if wish and wish != "auto":
        run = _named(op, wish, VARIABLE)
        logger.info("%s: backend %s, from %s", op, wish, VARIABLE)
        return run
    usable = [backend for backend in AUTO_ORDER if not probe(op, backend)]
    if not usable:
        raise UserError(f"no backend of {op} works here: {probe(op, AUTO_ORDER[-1])}")
    logger.info("%s: backend %s", op, usable[0])
    return _load(op, usable[0])


@functools.cache
def _named(op: str, backend: str, source: str) -> Run:
    if backend not in FILES:
        allowed = ", ".join(["auto", *FILES])
        raise UserError(f"{source} is {backend!r}; use one of {allowed}")
    if reason := probe(op, backend):
        raise UserError(f"{source} {backend!r} cannot run {op}: {reason}; use 'auto' or 'torch'")
    return _load(op, backend)


def _module_name(op: str, backend: str) -> str:
    return f"sssd_hpc.ops.{op}.{FILES[backend]}"


def _load(op: str, backend: str) -> Run:
    module: Any = importlib.import_module(_module_name(op, backend))
    run: Run = module.run
    return run
