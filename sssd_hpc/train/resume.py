"""Whether a run folder may be gone on with: one owner, the same settings, the same data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sssd_hpc import config as configs
from sssd_hpc import files
from sssd_hpc.config import Config
from sssd_hpc.ecg.store import MANIFEST, Store
from sssd_hpc.errors import UserError
from sssd_hpc.model.checkpoint import Checkpoint
from sssd_hpc.model.export import METADATA_KEY

# How long, how often, in what memory and on how many machines, not what: these may change when a
# run goes on.
CHANGEABLE = (
    "train.samples",
    "train.checkpoint_every",
    "train.checkpoint_gap_s",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.log_every",
    "train.activation_checkpointing",
    "train.zero_stage",
    "train.accumulation_steps",
    "train.bad_steps",
    "train.tensorboard",
    "train.timeout_s",
)


@contextlib.contextmanager
def sole_owner(run: Path) -> Iterator[None]:
    """Make the run folder and hold its lock inside the block.

    Raises:
        UserError: another process trains in it, or it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".lock").touch()
    except OSError as error:
        raise UserError(f"--run {run} cannot be used: {error}") from error
    busy = f"another process is training in {run}; stop it or give another --run"
    with files.locked(run / ".lock", busy):
        yield


def check(config: Config, data: Mapping[str, Any], run: Path, found: Checkpoint | None) -> None:
    """Check that `run` is new, or was begun with these settings and on this data; see `data_facts`.

    Raises:
        UserError: names the settings or the properties of the data that differ.
    """
    files.remove_temporaries(run / "export")
    if found is None:
        if (run / "export" / "model.safetensors").exists():
            raise UserError(
                f"{run} holds exported weights but no checkpoint to go on from; give another --run"
            )
        if (run / MANIFEST).exists():
            raise UserError(f"{run} holds a store; give --run a folder of its own")
        if (run / "config.yaml").exists():
            # Begun and stopped before its first checkpoint; any other file of that name stays.
            _begun_with(run)
        return
    before, now = _flat(_begun_with(run)), _flat(configs.as_dict(config))
    differing = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and name not in CHANGEABLE
    ]
    if differing:
        raise UserError(
            f"{run} was begun with other settings: {'; '.join(differing)}; "
            "give the old ones or another --run"
        )
    trained_on = found.state.get("data")
    if trained_on != data:
        old = trained_on if isinstance(trained_on, dict) else {}
        names = [name for name in data if old.get(name) != data[name]]
        raise UserError(
            f"{run} was trained on other data than this: {', '.join(names)} differ; "
            "give its own --data (and --distill-from) or another --run"
        )


def data_facts(store: Store, teacher: str = "") -> dict[str, Any]:
    """Return what identifies a store, wherever it lies, and a student's teacher by its SHA-256."""
    return {
        **({"teacher": teacher} if teacher else {}),
        "label_names": list(store.label_names),
        "lead_names": list(store.lead_names),
        "rate_hz": store.rate_hz,
        "length": store.length,
        "files": {
            name: store.manifest["files"][name]["sha256"]
            for name in ("signals.npy", "labels.npy", "records.csv")
        },
    }


def exported_samples(run: Path) -> int | None:
    """Return how many samples the exported weights had seen, or None without a readable export."""
    path = run / "export" / "model.safetensors"
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
        return int(json.loads(metadata[METADATA_KEY])["samples_seen"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _begun_with(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing, so the settings of the run are unknown; restore it")
    return configs.as_dict(configs.load(path))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
