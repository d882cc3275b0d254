"""Rows of a manifest to WFDB records: per-record noise, fixed batches, whole files only.

Knows nothing of other shards. Refuses signals that WFDB cannot hold rather than clip them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc.diffusion import Denoiser, NoiseSchedule, ancestral_sample
from sssd_hpc.ecg.leads import to_twelve
from sssd_hpc.ecg.wfdb_io import is_whole, to_adc, write_record
from sssd_hpc.errors import UserError
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A trained model ready to draw: signals of `leads`, `length` samples, model units."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    leads: tuple[str, ...]
    length: int
    scale_mv: float
    """Millivolts per model unit."""
    device: torch.device


def record_noise(seed: int, ecg_id: int, step: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Draw the standard normal noise (leads, L) of one record in one step; step 0 is x_T.

    A function of its arguments alone: Philox with the key (seed, ecg_id), whose 256-bit counter
    starts at step * 2^64, so that no two steps or records share a number.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
    """
    key = np.array([seed, ecg_id], dtype=np.uint64)
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.standard_normal(shape, dtype=np.float32)


def draw_signals(
    sampler: Sampler,
    ecg_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    seed: int,
    batch_size: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> NDArray[np.float64]:
    """Return signals (n, 12, L) in mV, LEADS order, for n <= batch_size records.

    The model always sees `batch_size` rows, the last repeated where records lack: matrix routines
    round by shape, so one shape keeps a record the same whichever records stand beside it.
    `on_step(i)` is called when the noise of step i, of 0 .. num_steps - 1, is drawn.
    """
    count = len(ecg_ids)
    padding = np.minimum(np.arange(batch_size), count - 1)
    shape = (len(sampler.leads), sampler.length)

    def noise(step: int) -> torch.Tensor:
        on_step(step)
        drawn = np.stack([record_noise(seed, int(ecg_id), step, shape) for ecg_id in ecg_ids])
        return torch.from_numpy(drawn[padding]).to(sampler.device)

    conditions = torch.from_numpy(labels[padding]).to(sampler.device)
    # Without these, cuDNN may round to TF32 and choose another algorithm from run to run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        x_0 = ancestral_sample(
            sampler.denoiser, noise(0), conditions, sampler.schedule, noise=noise
        )
    model_units = x_0[:count].cpu().numpy().astype(np.float64)
    # A diverged model's infinities are refused, with their record's name, when they are written.
    with np.errstate(invalid="ignore", over="ignore"):
        return to_twelve(model_units * sampler.scale_mv, sampler.leads)


def run_shard(
    sampler: Sampler,
    manifest: Manifest,
    request: Request,
    batches: Sequence[NDArray[np.int64]],
    out: Path,
    *,
    distrust: Collection[str] = (),
) -> int:
    """Write the records of `batches` that are not in `out` yet; return how many those were.

    A batch with a record missing is drawn again with all its rows, each in its place, so that a
    resumed root equals an undisturbed one. Names in `distrust` count as missing.

    Raises:
        UserError: a signal is not finite or beyond the 16-bit range.
    """
    missing = [
        [
            place
            for place, row in enumerate(batch)
            if not has_record(out, manifest, request, int(row), distrust)
        ]
        for batch in batches
    ]
    made, total = sum(map(len, missing)), sum(map(len, batches))
    with Progress("sample", total=total, unit="records", done=total - made) as progress:
        for batch, lacking in zip(batches, missing, strict=True):
            if not lacking:
                continue
            signals = draw_signals(
                sampler,
                manifest.ecg_id[batch],
                manifest.labels[batch],
                seed=request.seed,
                batch_size=request.batch_size,
                on_step=lambda step: progress.advance(0, step=f"{step + 1}/{request.steps}"),
            )
            for place in lacking:
                _write(out, manifest, request, int(batch[place]), signals[place])
            progress.advance(len(lacking))
    return made


def has_record(
    out: Path, manifest: Manifest, request: Request, row: int, distrust: Collection[str] = ()
) -> bool:
    """Tell whether a row's record lies whole in `out` and answers this very request."""
    name = manifest.name(row)
    if f"{name}.hea" in distrust or f"{name}.dat" in distrust or not is_whole(out, name):
        return False
    with contextlib.suppress(OSError):
        lines = (out / f"{name}.hea").read_text(encoding="utf-8", errors="replace").splitlines()
        comments = tuple(line[1:].strip() for line in lines if line.startswith("#"))
        return comments == request.comments(manifest.codes(row))
    return False


def _write(
    out: Path, manifest: Manifest, request: Request, row: int, signal_mv: NDArray[np.float64]
) -> None:
    try:
        adc = to_adc(signal_mv)
    except ValueError as error:
        raise UserError(
            f"record {manifest.ecg_id[row]}: {error}; nothing is clipped or written of it; train "
            f"longer, with a lower learning rate, or guide less, then sample into a new folder"
        ) from error
    path = out / manifest.name(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    comments = request.comments(manifest.codes(row))
    write_record(path.parent, path.name, adc, manifest.rate_hz, comments)
