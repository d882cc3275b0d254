"""What the launcher of many shards asks: which have work to do, and whether the set is finished.

It may run where nothing can be drawn, as on a login node without a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sssd_hpc.generate.merge import merge
from sssd_hpc.generate.names import MANIFEST_FILE, REQUEST_FILE
from sssd_hpc.generate.root import (
    check,
    claim,
    damaged,
    differences,
    has_record,
    locked,
    read_back,
)
from sssd_hpc.generate.sampling import WAIT_S, Plan, is_finished


def settled(plan: Plan, out: Path) -> Plan:
    """Return the plan on the kind of device that `out` was begun on, where it was begun.

    Raises:
        UserError: `out` belongs to another request, or its manifest was edited.
    """
    if not (out / REQUEST_FILE).is_file():
        return plan
    check(out, plan.request, besides=("device",))
    # A claim that was killed between its two files is made good by the first shard.
    if (out / MANIFEST_FILE).exists():
        read_back(out)
    held = differences(out, plan.request).get("device")
    return replace(plan, request=replace(plan.request, device=held[0])) if held else plan


def unfinished(plan: Plan, out: Path, count: int) -> list[int]:
    """Return the shards, of `count`, with a record to make; none if every hash is right.

    One of them at least where the set is not finished: the last shard to end finishes it.
    """
    manifest, request = plan.manifest, plan.request
    batches = manifest.batches(request.batch_size)
    broken = damaged(out, manifest)
    if broken is not None and not broken:
        return []

    def lacks(row: int) -> bool:
        name = manifest.name(row)
        spoiled = broken is not None and not broken.isdisjoint((f"{name}.dat", f"{name}.hea"))
        return spoiled or not has_record(out, manifest, request, row)

    shards = [
        number
        for number in range(count)
        if any(lacks(int(row)) for batch in batches[number::count] for row in batch)
    ]
    return shards or [0]


def finish(plan: Plan, out: Path) -> None:
    """Prove `out` complete and write its tables, unless its last shard did so.

    Raises:
        UserError: a record is missing; another process is at work for 15 minutes.
    """
    with locked(out, patience_s=WAIT_S):
        if not is_finished(out):
            claim(out, plan.manifest, plan.request)
            merge(out, plan.manifest, plan.request, plan.card())
