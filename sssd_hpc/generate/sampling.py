"""From a trained run and a store of real records to a synthetic root in PTB-XL's layout.

Joins model, diffusion and ecg; refuses a model and a store that do not belong together.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sssd_hpc.diffusion import Denoiser, NoiseSchedule
from sssd_hpc.diffusion.denoiser import in_bfloat16
from sssd_hpc.diffusion.method import Method, choose
from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.ecg.wfdb_io import read_record, to_adc
from sssd_hpc.errors import UserError
from sssd_hpc.files import BusyError, sha256_file
from sssd_hpc.generate.manifest import Manifest, Request, build
from sssd_hpc.generate.merge import card_text, lacking, merge
from sssd_hpc.generate.names import REQUEST_FILE, SUMS_FILE
from sssd_hpc.generate.root import (
    check,
    claim,
    damaged,
    differences,
    has_record,
    held_batch_size,
    locked,
    reopen,
    shard_locked,
)
from sssd_hpc.generate.shard import run_shard
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.draw import Sampler, draw_signals, fitting_batch, ready
from sssd_hpc.model.export import check_store, export_path, load_export

_log = logging.getLogger(__name__)

ALL_FOLDS = tuple(range(1, 11))
MAX_SEED = 2**64 - 1
WAIT_S = 900.0
"""How long one of several shards waits for the lock that another process holds."""
TOLERANCE_UV = 1
"""Two drawings less than 1 uV apart are at most one step apart once they are rounded."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be made and by what: everything is checked, nothing is written."""

    manifest: Manifest
    request: Request
    metadata: Mapping[str, Any]
    model: SSSDECG
    schedule: NoiseSchedule
    method: Method
    device: torch.device
    store: Mapping[str, Any]
    """The manifest of the store whose labels are taken."""

    def card(self) -> str:
        """Return the data card of the set."""
        return card_text(self.metadata, self.manifest, self.request, self.store)

    def sampler(self) -> Sampler:
        """Return the model ready to draw, on its device."""
        names = ("prediction", "leads", "length", "scale_mv")
        return ready(
            self.model,
            self.schedule,
            self.method,
            device=self.device,
            precision=self.request.precision,
            **{name: self.metadata[name] for name in names},
        )


def sample(
    run: Path, like: Store, out: Path, *, shard: tuple[int, int] = (0, 1), **options: Any
) -> int:
    """Write one synthetic record for each record of `like`, with its labels; see `plan`, `make`.

    Returns:
        How many records were drawn now.

    Raises:
        UserError: those of `plan` and `make`.
    """
    return make(plan(run, like, **options), out, shard)


def plan(
    run: Path,
    like: Store,
    *,
    checkpoint: str | None = None,
    folds: Sequence[int] = ALL_FOLDS,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    guidance: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    begun: Path | None = None,
    shards: int = 1,
    weights: Literal["ema", "raw"] = "ema",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Plan:
    """Return what makes one synthetic record for each record of `like` in `folds`.

    Records differ between batch sizes by rounding alone, 1 uV here and there. Without `batch_size`
    it is that of the set in `begun`, where one was begun there; else 16 on a CPU, and on a GPU what
    its memory holds, by measurement; several `shards` on GPUs might not agree and need it said.

    `checkpoint` names one of the run, see `model.export.export_path`; the weights of each have an
    export of their own, whose hash and samples seen the set tells.

    Raises:
        UserError: no usable export or no such checkpoint in `run`; model and store differ in
            labels, rate or length; an option out of range.
    """
    _check_options(seed, batch_size)
    export = export_path(run, checkpoint)
    digest = sha256_file(export)
    model, metadata = load_export(export, weights=weights)
    check_store(metadata, like, run)
    leads = sorted(metadata["leads"])
    if leads not in (sorted(EIGHT), sorted(LEADS)):
        raise UserError(
            f"the model in {run} has the leads {','.join(metadata['leads'])}; a record needs the "
            f"8 leads {','.join(EIGHT)} or all 12"
        )
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
    if metadata["prediction"] == "epsilon" and schedule.terminal_snr == 0.0:
        raise UserError(
            f"{export} predicts epsilon on a schedule that ends in pure noise, where it says "
            f"nothing of the signal; train with diffusion.prediction velocity"
        )
    method = choose(
        schedule,
        sampler=sampler,
        steps=steps,
        eta=eta,
        guidance=guidance,
        guidance_interval=guidance_interval,
        distilled_steps=metadata.get("distilled_steps", 0),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if batch_size is None and begun is not None and (begun / REQUEST_FILE).is_file():
        batch_size = held_batch_size(begun)
    if batch_size is None and shards > 1 and device.type == "cuda":
        raise UserError(
            "--batch-size is missing: shards on GPUs need one for all; `sssd-hpc sample` without "
            "--shard measures on such a GPU what its memory holds, and says so"
        )
    if batch_size is None:

        def network() -> Denoiser:
            built: Denoiser = model.to(device).for_sampling(metadata["length"], schedule.num_steps)
            return in_bfloat16(built, device) if precision == "bf16" else built

        sizes = (len(metadata["leads"]), metadata["length"], len(metadata["labels"]))
        batch_size = fitting_batch(network, *sizes, device, guided=guidance != 0.0)
        _log.info("batches of %d records", batch_size)
    manifest = build(like, folds)
    request = Request(
        model_sha256=digest,
        weights=weights,
        precision=precision,
        **dataclasses.asdict(method),
        seed=seed,
        batch_size=batch_size,
        folds=tuple(sorted(set(folds))),
        manifest_sha256=manifest.sha256(),
        device=device_kind(device),
    )
    if sha256_file(export) != digest:
        raise UserError(f"{export} changed while it was read; let the training finish, then repeat")
    return Plan(
        manifest=manifest,
        request=request,
        metadata=metadata,
        model=model,
        schedule=schedule,
        method=method,
        device=device,
        store=like.manifest,
    )


def device_kind(device: torch.device) -> str:
    """Return what rounds alike: GPUs of one model, or CPUs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def make(plan: Plan, out: Path, shard: tuple[int, int] = (0, 1)) -> int:
    """Draw the records of a plan into `out`: all of them, or shard k of n, given as (k, n).

    The unit of drawing is the batch; shard k draws batches k, k + n, k + 2n, .. The one that ends
    last proves the root complete and writes its tables. Any number of shards, in any order, at any
    time, on any machines, ends in the same bytes. They are a function of the plan, the kind of
    device and torch's number of threads (left at its default: OMP_NUM_THREADS, or the physical
    cores). Again, it goes on where a killed one stopped; on a finished root it checks every hash,
    returns, or makes again what differs.

    Returns:
        How many records were drawn now; `out` is finished if it has SHA256SUMS.txt.

    Raises:
        UserError: `out` is of another request; another process is at work; a signal WFDB cannot
            hold. One of several shards waits for up to 15 minutes for another process.
    """
    number, count = shard
    assert 0 <= number < count
    manifest, request = plan.manifest, plan.request
    patience_s = 0.0 if count == 1 else WAIT_S
    claim(out, manifest, request)
    if is_finished(out):
        with locked(out, patience_s=patience_s):
            if is_whole(plan, out):
                return 0
    with (
        locked(out, shared=count > 1, patience_s=patience_s),
        shard_locked(out, number, count, patience_s=patience_s),
    ):
        batches = manifest.batches(request.batch_size)[number::count]
        made = run_shard(plan.sampler(), manifest, request, batches, out, shard=shard)
    try:
        with locked(out):
            if not is_finished(out) and (count == 1 or lacking(out, manifest, request) is None):
                # Once more: the manifest may have been edited while records were drawn.
                claim(out, manifest, request)
                merge(out, manifest, request, plan.card())
    except BusyError:
        _log.info("other shards are at work; the last one finishes %s", out)
    return made


def is_finished(out: Path) -> bool:
    """Tell whether `out` was finished: proven complete, its tables and hashes written."""
    return (out / SUMS_FILE).exists()


def is_whole(plan: Plan, out: Path) -> bool:
    """Tell whether `out` is finished and every hash right; else make it unfinished.

    Nobody else may be at work in `out`.
    """
    broken = damaged(out, plan.manifest)
    if broken:
        _log.warning("%s has %d damaged files; they are made again", out, len(broken))
        reopen(out, plan.manifest, broken)
    elif broken is not None:
        _log.info("%s is finished and every hash is right", out)
    return broken is not None and not broken


def redraw(plan: Plan, out: Path, ecg_id: int) -> tuple[int, bool]:
    """Draw one record of `out` alone and compare; nothing is written.

    Returns:
        How far the two are apart at most, in uV, and whether they must be equal: bit for bit at
        the batch size and the kind of device of `out`, and with as many threads of torch.

    Raises:
        UserError: `out` is of another request or lacks the record; or the two differ by more than
            they may: anything where they must be equal, else TOLERANCE_UV.
    """
    manifest, request = plan.manifest, plan.request
    row = manifest.row_of(ecg_id)
    check(out, request, besides=("batch_size", "device", "folds", "manifest_sha256"))
    if not has_record(out, manifest, request, row):
        raise UserError(f"{out} does not hold record {ecg_id}, {manifest.name(row)}; sample it")
    exact = not {"batch_size", "device"} & differences(out, request).keys()
    rows = np.array([row])
    signal = draw_signals(
        plan.sampler(),
        manifest.ecg_id[rows],
        manifest.labels[rows],
        seed=request.seed,
        batch_size=request.batch_size,
    )[0]
    held = read_record(out, manifest.name(row)).adc.astype(np.int64)
    apart = int(np.abs(to_adc(signal) - held).max())
    if apart > (0 if exact else TOLERANCE_UV):
        raise UserError(
            f"record {ecg_id} drawn alone is {apart} uV from the one in {out}; "
            + ("they must be equal" if exact else f"{TOLERANCE_UV} uV is allowed")
        )
    return apart, exact


def _check_options(seed: int, batch_size: int | None) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed is {seed}; it must be between 0 and 2^64 - 1")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; it must be at least 1")
