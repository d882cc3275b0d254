"""Turn a PTB-XL root (real, simulated or synthetic) into a checked training store.

Every record is read once, in the table's order. Those that cannot be used go to `rejected.csv` with
the reason; nothing is repaired in silence. Work in progress lies in `OUT/partial/`: samples are
flushed before the journal line that vouches for them, so a run killed anywhere continues from its
last whole chunk and ends in the same bytes. Free text of the source (comments, reports, names)
never reaches the store: `ptbxl.PtbxlRow` is all that enters.

Signals are stored unfiltered by default: the SSSD-ECG paper speaks of filtered signals without
naming the filter, both public codes train on the signals as published, and so do their results.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg import ptbxl, statements, store
from sssd_hpc.ecg.journal import Journal, Outcome, finish_signals
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.ptbxl import PtbxlRow, Rejected
from sssd_hpc.ecg.store import Store
from sssd_hpc.ecg.wfdb_io import MAX_ADC, RecordError, read_record
from sssd_hpc.errors import UserError
from sssd_hpc.files import (
    atomic_write_bytes,
    fsync_path,
    is_temporary,
    locked,
    read_json,
    sha256_bytes,
    sha256_file,
    write_csv,
    write_json,
)
from sssd_hpc.progress import Progress

RATES_HZ = (100, 500)
RECORD_S = 10
COMMAND = "command.json"
JOURNAL = "journal.jsonl"

_log = logging.getLogger(__name__)


def prepare(
    source: Path,
    out: Path,
    *,
    rate: int = 100,
    labels: str = "all",
    min_likelihood: float | None = None,
    band_pass: tuple[float, float] | None = None,
    allow_leakage: bool = False,
) -> Store:
    """Prepare `source` into the store `out`, or continue, or return the finished one.

    `rate` in Hz picks PTB-XL's 100 or 500 Hz files (no resampling), `labels` is a selection of
    `statements.label_names`, `min_likelihood` in percent is explained at `statements.encode`,
    `band_pass` (low, high) in Hz filters forward and backward (Butterworth, order 3, no phase
    shift). `allow_leakage` accepts patients in several folds, and equal waveforms in training,
    validation and test folds, and records that.

    Raises:
        UserError: bad arguments or source, no usable record, leakage between folds, or `out` holds
            something else: a store of other arguments, its unfinished work, foreign files.
    """
    _check_arguments(rate, min_likelihood, band_pass)
    command = {
        "rate_hz": rate,
        "labels": labels,
        "min_likelihood": None if min_likelihood is None else float(min_likelihood),
        "band_pass_hz": None if band_pass is None else [float(edge) for edge in band_pass],
        "table_sha256": _source_hash(source, ptbxl.FILE),
        "statements_sha256": _source_hash(source, statements.FILE),
    }
    partial = out / store.PARTIAL
    if (out / store.MANIFEST).is_file():
        return _finished(out, command, allow_leakage)
    table = ptbxl.read_table(source, allow_leakage=allow_leakage)
    codes = statements.load_statements(source)
    names = statements.label_names(labels, codes)
    _claim(out, command)
    busy = f"another process is preparing {out}; wait for it or stop it"
    with locked(partial / COMMAND, busy):
        if not (partial / store.MANIFEST).is_file():
            job = _Job(source, partial, command, table, codes, names)
            outcomes = _read_all(job)
            _finish(job, outcomes, allow_leakage)
        _publish(out)
    return Store.open(out)


@dataclass(frozen=True)
class _Job:
    """What stays the same from the first record to the last."""

    source: Path
    partial: Path
    command: dict[str, Any]
    table: ptbxl.Table
    codes: statements.Statements
    names: tuple[str, ...]

    @property
    def rate_hz(self) -> int:
        return int(self.command["rate_hz"])

    @property
    def length(self) -> int:
        return RECORD_S * self.rate_hz

    @property
    def record_bytes(self) -> int:
        return 2 * len(LEADS) * self.length

    def file_of(self, row: PtbxlRow) -> str:
        return row.filename_lr if self.rate_hz == 100 else row.filename_hr

    def labels_of(self, row: PtbxlRow) -> NDArray[np.uint8]:
        return statements.encode(
            row.scp_codes,
            self.command["labels"],
            self.names,
            self.codes,
            self.command["min_likelihood"],
        )


def _check_arguments(
    rate: int, min_likelihood: float | None, band_pass: tuple[float, float] | None
) -> None:
    if rate not in RATES_HZ:
        raise UserError(f"rate is {rate} Hz; PTB-XL has files at 100 and 500 Hz: give one of them")
    if min_likelihood is not None and not 0 <= min_likelihood <= 100:
        raise UserError(f"min_likelihood is {min_likelihood}; give a percentage from 0 to 100")
    if band_pass is not None and not 0 < band_pass[0] < band_pass[1] < rate / 2:
        raise UserError(
            f"band_pass is {band_pass[0]:g} to {band_pass[1]:g} Hz; give two rising frequencies "
            f"between 0 and {rate / 2:g} Hz, half the rate"
        )


def _source_hash(source: Path, name: str) -> str:
    try:
        return sha256_file(source / name)
    except OSError as error:
        raise UserError(
            f"{source} is no PTB-XL root: {name} cannot be read ({error.strerror}); give the "
            f"folder that holds {ptbxl.FILE} and {statements.FILE}"
        ) from error


def _differences(found: object, command: dict[str, Any]) -> str:
    """Say how an earlier command differs from this one, or return ''."""
    earlier = found if isinstance(found, dict) else {}
    names = [name for name in command if earlier.get(name, "absent") != command[name]]
    return ", ".join(
        f"another {name.removesuffix('_sha256')} in the source"
        if name.endswith("_sha256")
        else f"{name} was {earlier.get(name, 'absent')}, now {command[name]}"
        for name in names
    )


def _finished(out: Path, command: dict[str, Any], allow_leakage: bool) -> Store:
    """Return the store that is already there if this command made it and every hash is right."""
    finished = Store.open(out, verify=True)
    differences = _differences(finished.manifest.get("command"), command)
    if differences:
        raise UserError(
            f"{out} is a finished store of other arguments ({differences}); name another folder"
        )
    if finished.manifest.get("leakage") and not allow_leakage:
        raise UserError(f"{out} was prepared with leakage allowed; allow it again or prepare anew")
    shutil.rmtree(out / store.PARTIAL, ignore_errors=True)
    return finished


def _claim(out: Path, command: dict[str, Any]) -> None:
    """Make `out/partial` this command's, or refuse a folder that is something else's."""
    partial = out / store.PARTIAL
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder that does not exist or is empty")
    if (partial / COMMAND).is_file():
        differences = _differences(read_json(partial / COMMAND), command)
        if differences:
            raise UserError(
                f"{out} holds unfinished work of other arguments ({differences}); give the same "
                f"arguments to continue it, or remove it or name another folder"
            )
        return
    held = out.iterdir() if out.exists() else ()
    foreign = [entry for entry in held if entry != partial and not is_temporary(entry)]
    if foreign or not all(map(is_temporary, partial.glob("*"))):
        raise UserError(f"{out} is not empty and no store; name a folder that is new or empty")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / COMMAND, command)


def _read_all(job: _Job) -> list[Outcome]:
    """Read every record that the journal does not have yet."""
    rows = job.table.rows
    signals, lines = job.partial / store.SIGNALS, job.partial / JOURNAL
    with Journal(signals, lines, job.record_bytes, len(rows)) as journal:
        done = len(journal.outcomes)
        num_rejected = sum(1 for outcome in journal.outcomes if outcome.reason)
        with Progress("prepare", total=len(rows), unit="records", done=done) as progress:
            for row in rows[done:]:
                try:
                    adc, flags = _read_one(job, row)
                except RecordError as error:
                    journal.add(Outcome(reason=error.reason))
                    num_rejected += 1
                else:
                    samples = adc.tobytes()
                    journal.add(Outcome(sha256=sha256_bytes(samples), flags=flags), samples)
                progress.advance(1, rejected=num_rejected)
        journal.flush()
    return journal.outcomes


def _read_one(job: _Job, row: PtbxlRow) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """Return a record's samples (12, L) and quality flags.

    Raises:
        RecordError: it cannot be used.
    """
    file = job.file_of(row)
    if not file:
        raise RecordError(file, f"the table names no {job.rate_hz} Hz file for it")
    unknown = [code for code in row.scp_codes if code not in job.codes]
    if unknown:
        raise RecordError(file, f"{statements.FILE} lacks {len(unknown)} of its codes")
    record = read_record(job.source, file)
    if record.rate_hz != job.rate_hz:
        raise RecordError(file, f"it has {record.rate_hz:g} Hz, not {job.rate_hz}")
    if record.adc.shape[1] != job.length:
        raise RecordError(file, f"it has {record.adc.shape[1]} samples, not {job.length}")
    adc = record.adc
    if job.command["band_pass_hz"] is not None:
        filtered = np.rint(_band_pass(adc, job.rate_hz, job.command["band_pass_hz"]))
        if not bool((np.abs(filtered) <= MAX_ADC).all()):
            raise RecordError(file, "it exceeds the 16-bit range once filtered")
        adc = filtered.astype(np.int16)
    return np.ascontiguousarray(adc, dtype="<i2"), record.flags


def _band_pass(
    adc: NDArray[np.int16], rate_hz: int, edges_hz: Sequence[float]
) -> NDArray[np.float64]:
    """Filter (12, L) by a Butterworth band-pass of order 3, forward and backward."""
    from scipy.signal import butter, sosfiltfilt

    sections = butter(3, edges_hz, btype="bandpass", fs=rate_hz, output="sos")
    return np.asarray(sosfiltfilt(sections, adc.astype(np.float64), axis=-1))


def _finish(job: _Job, outcomes: list[Outcome], allow_leakage: bool) -> None:
    """Write the store's small files and its manifest into `partial`."""
    pairs = list(zip(job.table.rows, outcomes, strict=True))
    accepted = [(row, outcome) for row, outcome in pairs if not outcome.reason]
    rejected = job.table.rejected + [Rejected(r, o.reason) for r, o in pairs if o.reason]
    if not accepted:
        shutil.rmtree(job.partial)
        common = Counter(entry.reason for entry in rejected).most_common(3)
        reasons = "; ".join(f"{reason} ({count} records)" for reason, count in common)
        raise UserError(f"no record of {job.source} can be used at {job.rate_hz} Hz: {reasons}")
    copies = _equal_waveforms(accepted)
    leakage = _leakage(job, copies, allow_leakage)
    labels = np.stack([job.labels_of(row) for row, _ in accepted])
    buffer = io.BytesIO()
    np.save(buffer, labels, allow_pickle=False)
    atomic_write_bytes(job.partial / store.LABELS, buffer.getvalue())
    write_csv(
        job.partial / store.RECORDS,
        store.RECORD_COLUMNS,
        (
            {
                "ecg_id": row.ecg_id,
                "patient_id": row.patient_id,
                "strat_fold": row.strat_fold,
                "file": job.file_of(row),
                "scp_codes": json.dumps(row.scp_codes),
                "flags": " ".join(outcome.flags),
            }
            for row, outcome in accepted
        ),
    )
    write_csv(
        job.partial / store.REJECTED,
        ("file", "reason", "ecg_id"),
        (
            {"file": job.file_of(e.row)[:200], "reason": e.reason, "ecg_id": e.row.ecg_id}
            for e in rejected
        ),
    )
    finish_signals(job.partial / store.SIGNALS, (len(accepted), len(LEADS), job.length))
    folds = Counter(row.strat_fold for row, _ in accepted)
    files = {
        name: {
            "bytes": (job.partial / name).stat().st_size,
            "sha256": sha256_file(job.partial / name),
        }
        for name in store.FILES
    }
    manifest = {
        "format_version": store.FORMAT_VERSION,
        "source": {
            "layout": "PTB-XL",
            "version": job.table.version,
            "synthetic": job.table.synthetic,
        },
        "command": job.command,
        "rate_hz": job.rate_hz,
        "length": job.length,
        "lead_names": list(LEADS),
        "gain_per_mv": store.GAIN_PER_MV,
        "label_names": list(job.names),
        "num_records": len(accepted),
        "num_rejected": len(rejected),
        "records_per_fold": {str(fold): folds[fold] for fold in ptbxl.FOLDS},
        "records_per_label": {
            name: int(count) for name, count in zip(job.names, labels.sum(axis=0), strict=True)
        },
        "equal_waveforms": [[first.ecg_id, copy.ecg_id] for first, copy in copies],
        "leakage": leakage,
        "files": files,
    }
    write_json(job.partial / store.MANIFEST, manifest)
    if rejected:
        _log.warning(
            "%d of %d records are rejected; %s says why",
            len(rejected),
            len(rejected) + len(accepted),
            store.REJECTED,
        )


def _equal_waveforms(accepted: list[tuple[PtbxlRow, Outcome]]) -> list[tuple[PtbxlRow, PtbxlRow]]:
    """Return the records whose samples repeat an earlier one's: (earlier, copy)."""
    first: dict[str, PtbxlRow] = {}
    pairs = [(first.setdefault(outcome.sha256, row), row) for row, outcome in accepted]
    return [(earlier, row) for earlier, row in pairs if earlier is not row]


def _leakage(
    job: _Job, copies: list[tuple[PtbxlRow, PtbxlRow]], allow_leakage: bool
) -> dict[str, Any] | None:
    """Return what lies in training, validation and test folds at once, and shared patients.

    Copies among the training folds alone are told, not refused: PTB-XL itself has some before
    version 1.0.3 (145 and 463 at 500 Hz).

    Raises:
        UserError: a waveform does so and `allow_leakage` is not given.
    """
    leaks = [pair for pair in copies if len({ptbxl.part_of(row.strat_fold) for row in pair}) > 1]
    if leaks and not allow_leakage:
        first, copy = leaks[0]
        raise UserError(
            f"{len(leaks)} waveform(s) lie in two of training, validation and test folds, the "
            f"first is that of ecg_id {first.ecg_id} (fold {first.strat_fold}) and {copy.ecg_id} "
            f"(fold {copy.strat_fold}); remove the copies from the source's table and prepare "
            f"into another folder (or allow leakage)"
        )
    if copies:
        _log.warning(
            "%d records repeat another's waveform; %s lists them", len(copies), store.MANIFEST
        )
    patients = job.table.patients_in_several_folds
    if not leaks and not patients:
        return None
    _log.warning(
        "leakage allowed: %d waveforms and %d patients lie in several folds",
        len(leaks),
        len(patients),
    )
    return {"num_patients": len(patients), "num_waveforms": len(leaks)}


def _publish(out: Path) -> None:
    """Move the finished files to their places, the manifest last; safe to repeat."""
    partial = out / store.PARTIAL
    for name in (*store.FILES, store.MANIFEST):
        if (partial / name).exists():
            os.replace(partial / name, out / name)
        fsync_path(out)
    shutil.rmtree(partial)
