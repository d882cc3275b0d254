"""From a trained run and a store of real records to a synthetic root in PTB-XL's layout.

Joins model, diffusion and ecg; refuses a model and a store that do not belong together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sssd_hpc.diffusion import Denoiser, NoiseSchedule, captured, from_velocity, guided
from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.files import sha256_file
from sssd_hpc.generate.manifest import Request, build, claim, damaged, locked
from sssd_hpc.generate.merge import card_text, merge
from sssd_hpc.generate.shard import Sampler, run_shard
from sssd_hpc.model.export import load_export

_log = logging.getLogger(__name__)

ALL_FOLDS = tuple(range(1, 11))
MAX_SEED = 2**64 - 1


def sample(
    run: Path,
    like: Store,
    out: Path,
    *,
    folds: Sequence[int] = ALL_FOLDS,
    sampler: str = "ddpm",
    steps: int | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    weights: Literal["ema", "raw"] = "ema",
) -> int:
    """Write one synthetic record for each record of `like` in `folds`, with its labels.

    The same call again goes on where a killed one stopped and ends in the same bytes; on a finished
    root it checks every hash and returns. Bytes are a function of the arguments, the kind of device
    and torch's number of threads (left at its default: OMP_NUM_THREADS, or the physical cores).

    Records differ between batch sizes by rounding alone, 1 uV here and there. Up to 32 records a
    batch stay in a CPU's cache; a GPU wants as many as its memory holds.

    Returns:
        How many records were drawn now.

    Raises:
        UserError: no usable export in `run`; model and store differ in labels, rate or length;
            an option out of range; `out` is of another request; a signal WFDB cannot hold.
    """
    _check_options(sampler, guidance, seed, batch_size)
    export = run / "export" / "model.safetensors"
    if not export.is_file():
        raise UserError(
            f"{run} has no export/model.safetensors; train it first, or let its training finish"
        )
    digest = sha256_file(export)
    model, metadata = load_export(export, weights=weights)
    _check_fits(metadata, like, run)
    if guidance != 0.0 and not model.has_unknown:
        raise UserError(
            f"--guidance is {guidance:g} but the model in {run} has no row for unknown labels "
            f"(label_embedding {model.config['label_embedding']}); sample without guidance"
        )
    if guidance != 0.0 and not metadata["label_dropout"]:
        raise UserError(
            f"--guidance is {guidance:g} but the model in {run} was trained with label_dropout 0, "
            f"so it never saw unknown labels; sample without guidance"
        )
    try:
        schedule = NoiseSchedule.linear(**metadata["diffusion"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{export} describes no noise schedule: {error}") from error
    if metadata["prediction"] not in ("epsilon", "velocity"):
        raise UserError(
            f"{export} predicts {metadata['prediction']!r}: epsilon or velocity is known"
        )
    if steps not in (None, schedule.num_steps):
        raise UserError(
            f"--steps is {steps}; ddpm takes all {schedule.num_steps} steps of the model's schedule"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = build(like, folds)
    request = Request(
        model_sha256=digest,
        weights=weights,
        sampler=sampler,
        steps=schedule.num_steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        folds=tuple(sorted(set(folds))),
        manifest_sha256=manifest.sha256(),
        device=device.type,
    )
    if sha256_file(export) != digest:
        raise UserError(f"{export} changed while it was read; let the training finish, then repeat")
    claim(out, request)
    with locked(out):
        broken = damaged(out, manifest)
        if broken is not None and not broken:
            _log.info("%s is finished and every hash is right", out)
            return 0
        denoiser: Denoiser = model.to(device).for_sampling(metadata["length"], schedule.num_steps)
        del model
        if metadata["prediction"] == "velocity":
            denoiser = from_velocity(denoiser, schedule.to(device))
        ready = Sampler(
            denoiser=captured(guided(denoiser, guidance)),
            schedule=schedule,
            leads=tuple(metadata["leads"]),
            length=metadata["length"],
            scale_mv=metadata["scale_mv"],
            device=device,
        )
        batches = manifest.batches(batch_size)
        made = run_shard(ready, manifest, request, batches, out, distrust=broken or ())
        merge(out, manifest, request, card_text(metadata, manifest, request, like.manifest))
    return made


def _check_options(sampler: str, guidance: float, seed: int, batch_size: int) -> None:
    if sampler in ("ddim", "dpmpp"):
        raise UserError(f"--sampler {sampler} is not part of this version; use ddpm")
    if sampler != "ddpm":
        raise UserError(f"--sampler is {sampler!r}; this version has ddpm")
    if not (math.isfinite(guidance) and guidance >= 0.0):
        raise UserError(f"--guidance is {guidance}; it must be finite and at least 0 (0 is off)")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed is {seed}; it must be between 0 and 2^64 - 1")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")


def _check_fits(metadata: dict[str, Any], like: Store, run: Path) -> None:
    pairs = (
        ("labels", tuple(metadata["labels"]), tuple(like.label_names)),
        ("rate in Hz", metadata["rate_hz"], like.rate_hz),
        ("length in samples", metadata["length"], like.length),
    )
    for what, trained, given in pairs:
        if trained != given:
            raise UserError(
                f"the model in {run} was trained with {what} {_short(trained)}, the store "
                f"{like.path} has {_short(given)}; prepare a store as the model's own was prepared"
            )
    leads = sorted(metadata["leads"])
    if leads not in (sorted(EIGHT), sorted(LEADS)):
        raise UserError(
            f"the model in {run} has the leads {','.join(metadata['leads'])}; a record needs the "
            f"8 leads {','.join(EIGHT)} or all 12"
        )


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    names = ",".join(value[:8])
    return f"{names} and {len(value) - 8} more" if len(value) > 8 else names
