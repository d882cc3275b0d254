"""Fixtures shared by every room's tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

# pytest-xdist gives each worker one core; more threads only contend.
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


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
