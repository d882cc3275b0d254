"""The backends that every op's own tests run over."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch

from sssd_hpc.ops import backends


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument `backend` on every backend of the op that its file names."""
    op = metafunc.module.__name__.rpartition("test_")[2]
    if "backend" not in metafunc.fixturenames or op not in backends.OPS:
        return
    names = [
        name
        for name, file in backends.FILES.items()
        if name != "reference" and importlib.util.find_spec(f"sssd_hpc.ops.{op}.{file}")
    ]
    skip = pytest.mark.skipif(_lacks_keops(), reason="pykeops is not installed")
    metafunc.parametrize(
        "backend",
        [pytest.param(name, marks=skip) if name == "keops" else name for name in names],
    )


def _lacks_keops() -> bool:
    """Say whether to leave KeOps out, visibly; where CI is set it must be there."""
    return not (importlib.util.find_spec("pykeops") or os.environ.get("CI"))


@pytest.fixture
def opcheck() -> Callable[..., object]:
    """torch.library.opcheck; filling uninitialised memory would fail its comparison of outputs."""
    torch.use_deterministic_algorithms(False)
    return torch.library.opcheck
