"""Rows of a manifest to WFDB records: per-record noise, fixed batches, whole files only.

A shard is a set of whole batches, so that the number of shards changes no byte. Knows nothing of
other shards. Refuses signals that WFDB cannot hold rather than clip them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc.diffusion import Denoiser, NoiseSchedule
from sssd_hpc.diffusion.denoiser import wrapped
from sssd_hpc.diffusion.method import Method
from sssd_hpc.ecg.leads import to_twelve
from sssd_hpc.ecg.wfdb_io import to_adc, write_record
from sssd_hpc.errors import UserError
from sssd_hpc.generate.beats import Beat
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.root import has_record
from sssd_hpc.generate.writer import Writer
from sssd_hpc.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A trained model ready to draw: signals of `leads`, `length` samples, model units."""

    denoiser: Denoiser
    """Not guided: that is `method`'s."""
    schedule: NoiseSchedule
    method: Method = field(default_factory=Method)
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
    `on_step(i)` is called before network call i = 0, 1, ..
    """
    count = len(ecg_ids)
    padding = np.minimum(np.arange(batch_size), count - 1)
    shape = (len(sampler.leads), sampler.length)

    def noise(step: int) -> torch.Tensor:
        drawn = np.stack([record_noise(seed, int(ecg_id), step, shape) for ecg_id in ecg_ids])
        return torch.from_numpy(drawn[padding]).to(sampler.device)

    def counted(network: Denoiser) -> Denoiser:
        calls = itertools.count()

        def call(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            on_step(next(calls))
            return network(x_t, t, labels)

        return call

    conditions = torch.from_numpy(labels[padding]).to(sampler.device)
    # Without these, cuDNN may round to TF32 and choose another algorithm from run to run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        x_0 = sampler.method.draw(
            wrapped(sampler.denoiser, counted), noise(0), conditions, sampler.schedule, noise
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
    shard: tuple[int, int] = (0, 1),
) -> int:
    """Write the records of `batches` that are not in `out` yet; return how many those were.

    A batch with a record missing is drawn again with all its rows, each in its place, so that a
    resumed root equals an undisturbed one. `shard` (number, count) names the progress file.

    Raises:
        UserError: a signal is not finite or beyond the 16-bit range.
    """
    missing = [
        [
            place
            for place, row in enumerate(batch)
            if not has_record(out, manifest, request, int(row))
        ]
        for batch in batches
    ]
    calls = sampler.method.num_calls(sampler.schedule)
    made, total = sum(map(len, missing)), sum(map(len, batches))
    label = "sample" if shard == (0, 1) else "sample {}/{}".format(*shard)
    with (
        Beat(out, *shard, total=total, done=total - made) as beat,
        Progress(label, total=total, unit="records", done=total - made) as progress,
        Writer(lambda row, signal: write_row(out, manifest, request, row, signal)) as writer,
    ):
        told = 0

        def tell(**note: str) -> None:
            nonlocal told
            written = writer.written
            progress.advance(written - told, **note)
            beat.beat(total - made + written)
            told = written

        for batch, lacking in zip(batches, missing, strict=True):
            if not lacking:
                continue
            signals = draw_signals(
                sampler,
                manifest.ecg_id[batch],
                manifest.labels[batch],
                seed=request.seed,
                batch_size=request.batch_size,
                on_step=lambda step: tell(step=f"{step + 1}/{calls}"),
            )
            writer.put(batch[lacking], signals[lacking])
        writer.finish()
        tell()
    return made


def write_row(
    out: Path, manifest: Manifest, request: Request, row: int, signal_mv: NDArray[np.float64]
) -> None:
    """Write the record of a row from its signal (12, L).

    Raises:
        UserError: a sample is not finite or beyond the 16-bit range.
    """
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
