"""A store small enough to train on in a blink, and the settings for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sssd_hpc.config import Config, DiffusionConfig, ModelConfig, TrainConfig
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store


def make_store(num_records: int = 10, length: int = 40, name: str = "a", folds: int = 8) -> Store:
    """Return records of sines whose frequency the first label decides."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, (num_records, 2), dtype=np.uint8)
    time = np.arange(length) / length
    cycles = 2.0 + 3.0 * labels[:, :1, None]
    wave = np.sin(2 * np.pi * (cycles * time + rng.random((num_records, 1, 1))))
    gains = np.linspace(-1, 1, 12)[None, :, None]
    signals = np.round(500 * gains * wave).astype(np.int16)
    files = {f: {"sha256": f"{f}-{name}"} for f in ("signals.npy", "labels.npy", "records.csv")}
    manifest: dict[str, Any] = {
        "rate_hz": 100,
        "lead_names": list(LEADS),
        "label_names": ["NORM", "AFIB"],
        "num_records": num_records,
        "length": length,
        "files": files,
    }
    return Store(
        path=Path(f"store-{name}"),
        manifest=manifest,
        signals=signals,
        labels=labels,
        ecg_id=np.arange(1, num_records + 1),
        patient_id=np.arange(num_records).astype(str),
        strat_fold=np.arange(num_records) % folds + 1,
        scp_codes=({},) * num_records,
        flags=((),) * num_records,
    )


def make_config(**train: Any) -> Config:
    """Return a model of a few hundred weights; keywords go to `TrainConfig`."""
    given: dict[str, Any] = {
        "samples": 32,
        "batch_size": 4,
        "checkpoint_every": 8,
        "checkpoint_gap_s": 0,
        "log_every": 12,
        "ema_half_life_samples": 16,
        **train,
    }
    return Config(
        model=ModelConfig(
            num_blocks=2, channels=4, d_state=4, lmax=40, label_dim=4, step_dims=(8, 8, 8)
        ),
        diffusion=DiffusionConfig(num_steps=10, beta_end=0.3, scale_mv=0.5),
        train=TrainConfig(**given),
    )


def with_model(config: Config, **model: Any) -> Config:
    """Return the configuration with other model settings."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


@pytest.fixture
def small() -> SimpleNamespace:
    """What the tests of this room share: `store`, `config` and `with_model` make things."""
    return SimpleNamespace(store=make_store, config=make_config, with_model=with_model)
