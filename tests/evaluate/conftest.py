"""Small stores with a planted sign, for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd_hpc.ecg import simulate
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate.classify import Recipe

LENGTH, RATE_HZ = 400, 100
StoreMaker = Callable[..., Store]


@dataclass(frozen=True)
class Simulated:
    """Simulated records with what is known of them."""

    signals_mv: np.ndarray
    """(n, 12, 1000) at 100 Hz."""
    places: list[simulate.Place]

    @property
    def kinds(self) -> np.ndarray:
        return np.array([where.kind for where in self.places])


@pytest.fixture(scope="session")
def simulated() -> Simulated:
    """Return the first 120 records of seed 5: every kind six times or more."""
    places = [simulate.place(5, index) for index in range(120)]
    adc = np.stack([simulate.simulate_record(5, where)[1] for where in places])
    return Simulated((adc / 1000).astype(np.float32), places)


@pytest.fixture
def tiny() -> Recipe:
    """A network and a training short enough for a test."""
    return Recipe(epochs=6, batch_size=16, num_blocks=(1, 1), width=8)


@pytest.fixture
def make_store(tmp_path: Path) -> StoreMaker:
    """Return a maker of stores whose positive records carry a wave that others lack."""

    def make(
        name: str,
        *,
        num_records: int = 200,
        seed: int = 0,
        folds: tuple[int, ...] = tuple(range(1, 11)),
        label_names: tuple[str, ...] = ("MI", "NORM"),
        rate_hz: int = RATE_HZ,
    ) -> Store:
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, (num_records, len(label_names)))
        strat_fold = np.array([folds[row % len(folds)] for row in range(num_records)])
        signals = generator.normal(0, 100, (num_records, len(LEADS), LENGTH))
        wave = 300 * np.sin(2 * np.pi * 5 * np.arange(LENGTH) / rate_hz)
        signals[labels[:, -1] == 1] += wave
        path = tmp_path / name
        path.mkdir()
        manifest: dict[str, Any] = {"rate_hz": rate_hz, "label_names": list(label_names)}
        (path / "manifest.json").write_text(json.dumps(manifest))
        return Store(
            path=path,
            manifest=manifest,
            signals=signals.round().astype(np.int16),
            labels=labels.astype(np.uint8),
            ecg_id=np.arange(1, num_records + 1),
            patient_id=np.array([f"{name}-{row}" for row in range(num_records)]),
            strat_fold=strat_fold,
            scp_codes=({},) * num_records,
            flags=((),) * num_records,
        )

    return make
