"""The trained run that a student is distilled from: weights to start from and to match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sssd_hpc import files
from sssd_hpc.config import Config
from sssd_hpc.diffusion import Denoiser
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.export import check_store, export_path, load_export
from sssd_hpc.train.build import model_arguments, model_leads, schedule_arguments


@dataclass(frozen=True)
class Teacher:
    """A model on the CPU and the SHA-256 of the export that it was read from."""

    model: SSSDECG
    sha256: str

    def network(self, length: int, num_steps: int, device: torch.device) -> Denoiser:
        """Return the network, frozen, for signals of `length` samples."""
        return self.model.to(device).for_sampling(length, num_steps)


def load_teacher(run: Path, config: Config, store: Store) -> Teacher:
    """Return the teacher of a run of this configuration on this store.

    Raises:
        UserError: `run` has no export, was trained on other labels, rates or lengths, or differs
            from the configuration in its model or diffusion; or one of its steps cannot be halved.
    """
    path, steps = export_path(run), config.diffusion.distilled_steps
    digest = files.sha256_file(path)
    model, metadata = load_export(path, weights="ema")
    check_store(metadata, store, run)
    schedule = schedule_arguments(config)
    pairs = (
        ("model", dict(metadata["model"]), model_arguments(config, store)),
        ("leads", list(metadata["leads"]), list(model_leads(config))),
        # Older exports do not say that theirs was not rescaled.
        ("diffusion", {"zero_terminal_snr": False, **metadata["diffusion"]}, schedule),
        ("prediction", metadata["prediction"], config.diffusion.prediction),
        ("scale_mv", metadata["scale_mv"], config.diffusion.scale_mv),
    )
    for name, theirs, ours in pairs:
        if _plain(theirs) != _plain(ours):
            raise UserError(
                f"the student's {name} is {_plain(ours)} but that of its teacher {run} is "
                f"{_plain(theirs)}; leave out what changes it"
            )
    taught = metadata.get("distilled_steps", 0)
    if taught and taught != 2 * steps:
        raise UserError(
            f"--steps is {steps} but the teacher {run} takes {taught} steps, so its student takes "
            f"{taught // 2}: half as many"
        )
    if 2 * steps > config.diffusion.num_steps:
        raise UserError(
            f"--steps is {steps}; the schedule of the teacher {run} has "
            f"{config.diffusion.num_steps} steps, so its student takes at most "
            f"{config.diffusion.num_steps // 2}"
        )
    return Teacher(model, digest)


def _plain(value: object) -> object:
    """Return a value as JSON would give it back: tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
