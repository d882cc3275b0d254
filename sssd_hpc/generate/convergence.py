"""How fast a run converges, the paper's Table IV: a set from each of its checkpoints, scored.

Sets are drawn by a quick sampler and lie in OUT/cache/sets, whole and proven like any set, so that
the same command goes on where it stopped; `evaluate` scores them and knows of no network.
Source: SSSD-ECG-nle (arXiv 2407.11108), section V-A, Table IV.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import protocols
from sssd_hpc.generate.sampling import make, plan
from sssd_hpc.generate.shard import BeyondRangeError
from sssd_hpc.model import checkpoint as checkpoints

_log = logging.getLogger(__name__)

SETS = "sets"


def convergence(
    run: Path,
    real: Store,
    out: Path,
    *,
    labels: Sequence[str] = (),
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    batch_size: int | None = None,
    allow_leakage: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score each checkpoint that is in `run`; write the report into `out` and return it.

    A checkpoint whose records WFDB cannot hold, as an early one may be, is left out and named.

    Args:
        run: folder of a run with checkpoints, trained on records such as those of `real`.
        real: store of the real records, whose labels and folds are copied.
        out: folder of the report, of the sets and of what was scored so far.
        labels: labels to classify; default: those of the paper that the store has.
        sampler: by default dpmpp with eta 1, of a distilled run its ddim.
        steps: of the sampler; by default its own, of dpmpp 20.
        eta: noise that the sampler adds.
        batch_size: records drawn at once; default: see `sampling.plan`.
        allow_leakage: see `evaluate.protocols.tabulate`, which takes the other options.

    Raises:
        UserError: no checkpoint, or none whose records can be held; those of `sampling.plan`,
            `sampling.make` and `protocols.tabulate`.
    """
    names = sorted(checkpoints.names(run / "checkpoints"))
    if not names:
        raise UserError(f"{run} has no checkpoints to compare; train it first")
    known = protocols.table_labels("convergence", real, labels)
    if sampler is None and not plan(run, real, batch_size=1).metadata.get("distilled_steps"):
        sampler, eta = "dpmpp", 1.0 if eta is None else eta
    sets, notes = {}, []
    cache = out / protocols.CACHE
    for name in names:
        planned = plan(
            run,
            real,
            checkpoint=name,
            sampler=sampler,
            steps=steps,
            eta=eta,
            batch_size=batch_size,
            begun=cache / SETS / name,
        )
        _log.info("%s: %s, in %s", name, planned.request.method(), cache / SETS / name)
        try:
            make(planned, cache / SETS / name)
        except BeyondRangeError as error:
            _log.warning("%s is left out: %s", name, error)
            notes.append(f"{name} is left out, its records cannot be held: {error}.")
            continue
        sets[name] = protocols.open_store_or_root(
            cache / SETS / name, cache, real, allow_leakage=allow_leakage
        )
    if not sets:
        raise UserError(f"no checkpoint of {run} draws records that can be held: {notes[0]}")
    notes.insert(0, f"Drawn with averaged weights by {planned.request.method()}.")
    return protocols.tabulate(
        "convergence",
        real,
        sets,
        out,
        labels=known,
        allow_leakage=allow_leakage,
        notes=notes,
        **options,
    )
