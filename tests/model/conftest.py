"""What the model's tests share: the parity arrays, small models, poisoned memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_hpc.model import SSSDECG

PARITY = Path(__file__).parents[1] / "data" / "parity"
SMALL: dict[str, Any] = {
    "num_leads": 8,
    "num_labels": 3,
    "num_blocks": 2,
    "channels": 6,
    "d_state": 4,
    "lmax": 25,
    "label_dim": 5,
    "step_dims": (8, 12, 10),
}


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that reading it shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def parity() -> Callable[[str], dict[str, np.ndarray]]:
    """Read a file of arrays computed by the public codes."""

    @functools.cache
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(PARITY / f"{name}.npz") as archive:
            return dict(archive)

    return read


@pytest.fixture
def small_model() -> SSSDECG:
    """A small model with weights in its head, since a fresh one outputs zero."""
    model = SSSDECG(**SMALL)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t and labels with one of each value."""
    labels = torch.tensor([[1, 0, -1], [0, 1, 0]])
    return torch.randn(2, 8, 25), torch.tensor([0, 199]), labels
