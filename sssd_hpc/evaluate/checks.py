"""What must hold before a real and a synthetic set may be compared; leakage is a hard error."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np

from sssd_hpc.ecg.leads import EIGHT, positions
from sssd_hpc.ecg.ptbxl import part_of
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 256


@dataclass(frozen=True)
class Finding:
    """One check, whether it held, and what was found; `ok=False` stands only where allowed."""

    name: str
    ok: bool
    detail: str


def check(
    real: Store, synthetic: Store, *, name: str = "synthetic", allow_leakage: bool = False
) -> list[Finding]:
    """Return every check's finding; `name` is what to call the synthetic set.

    Raises:
        UserError: the stores do not fit together; or, unless `allow_leakage`, a patient stands in
            two folds or one waveform on both sides of a split.
    """
    same_shape(real, synthetic)
    real_digests, synthetic_digests = waveform_digests(real), waveform_digests(synthetic)
    findings = [
        Finding("same labels, rate and leads", True, "equal in both stores"),
        patients_in_one_fold("real", real),
        patients_in_one_fold(name, synthetic),
        waveforms_in_one_part("real", real, real_digests),
        waveforms_in_one_part(name, synthetic, synthetic_digests),
        no_copies(real, real_digests, name, synthetic, synthetic_digests),
    ]
    failed = [finding for finding in findings if not finding.ok]
    if failed and not allow_leakage:
        raise UserError(
            f"leakage: {'; '.join(finding.detail for finding in failed)}; mend the data, "
            f"or go on with --allow-leakage, which the report will say"
        )
    for finding in failed:
        logger.warning("leakage allowed: %s", finding.detail)
    return findings


def same_shape(real: Store, synthetic: Store) -> None:
    """Refuse two stores of other labels, rates or leads.

    Raises:
        UserError: they differ.
    """
    for what, ours, theirs in (
        ("sampling rates in Hz", real.rate_hz, synthetic.rate_hz),
        ("samples a record", real.length, synthetic.length),
        ("leads", tuple(real.lead_names), tuple(synthetic.lead_names)),
        ("label names", tuple(real.label_names), tuple(synthetic.label_names)),
    ):
        if ours != theirs:
            raise UserError(
                f"the {what} differ: {_short(ours)} in {real.path.name}, {_short(theirs)} in "
                f"{synthetic.path.name}; run `prepare` with the same --rate and --labels for both, "
                f"on records of one length"
            )


def patients_in_one_fold(side: str, store: Store) -> Finding:
    """Find patients whose records stand in more than one fold."""
    pairs = np.unique(
        np.stack([store.patient_id.astype(str), store.strat_fold.astype(str)]), axis=1
    )
    patients, counts = np.unique(pairs[0], return_counts=True)
    split = patients[counts > 1]
    name = f"{side} patients stand in one fold each"
    if len(split) == 0:
        return Finding(name, True, f"{len(patients)} patients")
    first = store.ecg_id[np.flatnonzero(store.patient_id.astype(str) == split[0])]
    ids = ", ".join(str(ecg_id) for ecg_id in first[:4])
    return Finding(
        name, False, f"{len(split)} {side} patient(s) in two folds or more, as of ecg_id {ids}"
    )


def waveforms_in_one_part(side: str, store: Store, digests: list[bytes]) -> Finding:
    """Find a waveform in two of training, validation and test folds; count harmless repeats."""
    first: dict[bytes, int] = {}
    repeats = 0
    leaks = []
    for row, digest in enumerate(digests):
        earlier = first.setdefault(digest, row) if digest else row
        if earlier == row:
            continue
        repeats += 1
        if part_of(int(store.strat_fold[earlier])) != part_of(int(store.strat_fold[row])):
            leaks.append((int(store.ecg_id[earlier]), int(store.ecg_id[row])))
    name = f"{side} waveforms stand in one of training, validation and test folds"
    if not leaks:
        return Finding(name, True, f"{repeats} repeated inside one of them")
    return Finding(
        name,
        False,
        f"{len(leaks)} {side} waveform(s) stand in two of training, validation and test folds, "
        f"as ecg_id {leaks[0][0]} and {leaks[0][1]}",
    )


def no_copies(
    real: Store,
    real_digests: list[bytes],
    side: str,
    synthetic: Store,
    synthetic_digests: list[bytes],
) -> Finding:
    """Find synthetic records that equal a real one sample for sample in the independent leads."""
    known = {digest: row for row, digest in enumerate(real_digests) if digest}
    copies = [
        (int(synthetic.ecg_id[row]), int(real.ecg_id[known[digest]]))
        for row, digest in enumerate(synthetic_digests)
        if digest in known
    ]
    name = f"no {side} record is a copy of a real one"
    if not copies:
        return Finding(name, True, "no two are equal sample for sample")
    ours, theirs = copies[0]
    return Finding(
        name,
        False,
        f"{len(copies)} {side} record(s) copy a real one sample for sample, "
        f"as ecg_id {ours} copies real ecg_id {theirs}",
    )


def waveform_digests(store: Store) -> list[bytes]:
    """Return a digest of each record's independent leads; empty for a flat record.

    The other four leads are left out: a model of eight leads recomputes them, so a copy would
    differ there by rounding.
    """
    columns = positions(store.lead_names, EIGHT)
    digests = []
    for begin in range(0, store.num_records, CHUNK):
        for record in store.signals[begin : begin + CHUNK]:
            leads = np.ascontiguousarray(record[columns])
            flat = not np.diff(leads, axis=1).any()
            digests.append(b"" if flat else hashlib.sha256(leads.tobytes()).digest())
    return digests


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
