"""Fixtures shared by every room's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported; without a GPU its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# What cuBLAS wants set before its first product to give the same bits every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# pytest-xdist gives each worker one core; more threads only contend.
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fill uninitialised tensors with NaN where arithmetic is tested: reading one shows."""
    if request.path.parent.name not in ("ops", "s4", "model", "diffusion"):
        yield
        return
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    # A GPU lacks a deterministic form of some of what tests draw their inputs with, as cumsum.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ptbxl_root() -> Path:
    """The real PTB-XL records: absent is a failure in CI, a visible skip elsewhere."""
    default = Path(__file__).parents[2] / "shared" / "data" / "ptbxl"
    root = Path(os.environ.get("PTBXL_ROOT", default))
    if not (root / "ptbxl_database.csv").is_file():
        message = f"no PTB-XL at {root}; set PTBXL_ROOT"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out, visibly, what needs a GPU where there is none."""
    gpu = torch.cuda.is_available()
    for item in items:
        if gpu:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic implementation"))
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
