"""What the model's tests share: the parity arrays, small models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_hpc.model import SSSDECG
from sssd_hpc.model.reference import public_name, public_shape

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
def public_state() -> Callable[..., dict[str, np.ndarray]]:
    """Spell a model's weights as the public codes do: "ecg" or "nle", with its nodes."""

    def spell(model: SSSDECG, code: str) -> dict[str, np.ndarray]:
        table = {"ecg": "embedding.weight", "nle": "label_embedding.table"}[code]
        angle = -2 * np.pi / model.config["lmax"] * np.arange(model.config["lmax"] // 2 + 1)
        omega = np.exp(1j * angle)
        nodes = {"omega": omega, "z": 2 * (1 - omega) / (1 + omega + 1e-7)}
        state: dict[str, np.ndarray] = {}
        for name, tensor in model.state_dict().items():
            key = public_name(name, {table: 0})
            if code == "ecg":
                key = key.replace("parametrizations.weight.original0", "weight_g")
                key = key.replace("parametrizations.weight.original1", "weight_v")
            state[key] = tensor.numpy().reshape(public_shape(name, tensor.shape))
            if name.endswith(".w"):
                for node, value in nodes.items():
                    planes = np.stack([value.real, value.imag], axis=-1).astype(np.float32)
                    state[key.removesuffix("w") + node] = planes
        if code == "nle":
            for label, rows in enumerate(state.pop(table)):
                state[f"label_embedding.{label}.weight"] = rows
        return state

    return spell


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, t and labels with one of each value."""
    labels = torch.tensor([[1, 0, -1], [0, 1, 0]])
    return torch.randn(2, 8, 25), torch.tensor([0, 199]), labels
