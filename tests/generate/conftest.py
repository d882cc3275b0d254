"""A tiny trained run and a store of real records to copy the labels of, both made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sssd_hpc.ecg.leads import EIGHT
from sssd_hpc.ecg.store import Store
from sssd_hpc.generate.manifest import Request
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.export import save_export

LENGTH, STEPS = 64, 5
# Ids out of order, folds repeated, labels from none to all.
ECG_IDS = (1003, 7, 21837, 12, 1004, 9, 10, 11, 2000, 6, 5)
FOLDS = (1, 1, 2, 3, 8, 9, 10, 10, 1, 9, 2)
LABELS = ("1AVB", "AFIB", "NORM")
ANY_REQUEST = Request(
    model_sha256="a" * 64,
    weights="ema",
    sampler="ddpm",
    steps=5,
    guidance=0.0,
    seed=3,
    batch_size=4,
    folds=(1, 2),
    manifest_sha256="b" * 64,
    device="cpu",
)


def make_store(path: Path, label_names: tuple[str, ...] = LABELS, **manifest: Any) -> Store:
    """Return a store in memory whose private cells hold canaries."""
    count, num_labels = len(ECG_IDS), len(label_names)
    labels = np.arange(count)[:, None] >> np.arange(num_labels)[None, :] & 1
    length = manifest.pop("length", LENGTH)
    facts = {
        "source": {"layout": "PTB-XL", "version": "1.0.3", "synthetic": False},
        "command": {"labels": ",".join(label_names)},
        "canary": "/home/canary/ptbxl",
    }
    return Store(
        path=path,
        manifest={"rate_hz": 100, "label_names": list(label_names), **facts, **manifest},
        signals=np.full((count, 12, length), 4321, dtype=np.int16),
        labels=labels.astype(np.uint8),
        ecg_id=np.array(ECG_IDS, dtype=np.int64),
        patient_id=np.array([f"canary{i}" for i in range(count)]),
        strat_fold=np.array(FOLDS, dtype=np.int64),
        scp_codes=tuple({"canary": 0.0} for _ in range(count)),
        flags=tuple(() for _ in range(count)),
    )


def make_run(
    path: Path, label_names: tuple[str, ...] = LABELS, *, kind: str = "nle", **facts: Any
) -> Path:
    """Export a network with random weights; the averaged ones differ from the raw ones."""
    shape = {
        "num_leads": 8,
        "num_labels": len(label_names),
        "num_blocks": 2,
        "channels": 8,
        "d_state": 8,
        "lmax": facts.get("length", LENGTH),
        "label_embedding": kind,
        "label_dim": 8,
        "step_dims": (8, 16, 16),
    }
    torch.manual_seed(4)
    model = SSSDECG(**shape)
    with torch.no_grad():
        # A new network's head is zero: its estimate would depend on nothing.
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    raw = model.state_dict()
    ema = {name: 0.9 * value if value.is_floating_point() else value for name, value in raw.items()}
    metadata = {
        "model": shape,
        "leads": list(EIGHT),
        "labels": list(label_names),
        "rate_hz": 100,
        "length": LENGTH,
        "diffusion": {"num_steps": STEPS, "beta_start": 1e-4, "beta_end": 0.5},
        "prediction": "epsilon",
        "label_dropout": 0.1,
        "scale_mv": 0.5,
        "samples_seen": 4000,
        **facts,
    }
    (path / "export").mkdir(parents=True)
    save_export(path / "export" / "model.safetensors", shape, raw, ema, metadata)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("canary") / "run")


@pytest.fixture
def like(tmp_path: Path) -> Store:
    return make_store(tmp_path / "canary-store")
