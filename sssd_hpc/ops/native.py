"""Load the compiled extension once, or say plainly why it cannot be used.

The library is bound to the version of torch that it was built with, and its name carries it. One
built for another version is never loaded: C++ has no stable interface between torch versions, and
what would come of it is a crash rather than an error.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).parents[1]
REMEDY = "run `make setup` or `pip install --no-build-isolation -e .`"


@functools.cache
def load() -> Any:
    """Load the extension and return its operators, `torch.ops.sssd_hpc_cpp`.

    Raises:
        RuntimeError: it was not built, was built for another torch, or does not load.
    """
    library = find(PACKAGE, torch.__version__)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"the compiled extension does not load: {reason}; {REMEDY}") from error
    return torch.ops.sssd_hpc_cpp


def find(folder: Path, version: str) -> Path:
    """Return the extension in `folder` that was built for this version of torch.

    Raises:
        RuntimeError: there is none; the message says why and what to do.
    """
    library = folder / f"_C.torch-{version}.so"
    if library.is_file():
        return library
    others = sorted(
        path.name[len("_C.torch-") : -len(".so")] for path in folder.glob("_C.torch-*.so")
    )
    if others:
        raise RuntimeError(
            f"the compiled extension was built for torch {', '.join(others)} and this is torch "
            f"{version}; {REMEDY}"
        )
    raise RuntimeError(
        "the compiled extension is missing: it was not built when sssd_hpc was installed (needs a "
        f"C++ compiler and torch at install time); {REMEDY}"
    )
