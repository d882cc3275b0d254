"""Rows of a manifest to WFDB records: fixed batches, whole files only.

A shard is a set of whole batches, so that the number of shards changes no byte. Knows nothing of
other shards. Refuses signals that WFDB cannot hold rather than clip them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.wfdb_io import to_adc, write_record
from sssd_hpc.errors import UserError
from sssd_hpc.generate.beats import Beat
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.root import has_record
from sssd_hpc.generate.writer import Writer
from sssd_hpc.model.draw import Sampler, draw_signals
from sssd_hpc.progress import Progress


class BeyondRangeError(UserError):
    """A drawn signal that WFDB cannot hold: the network diverged, or has learned too little."""


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
        BeyondRangeError: a signal is not finite or beyond the 16-bit range.
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
        BeyondRangeError: a sample is not finite or beyond the 16-bit range.
    """
    try:
        adc = to_adc(signal_mv)
    except ValueError as error:
        raise BeyondRangeError(
            f"record {manifest.ecg_id[row]}: {error}; nothing is clipped or written of it; train "
            f"longer, with a lower learning rate, or guide less, then sample into a new folder"
        ) from error
    path = out / manifest.name(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    comments = request.comments(manifest.codes(row))
    write_record(path.parent, path.name, adc, manifest.rate_hz, comments)
