"""What is to be made: the table of records, and the request that an output root belongs to.

Decides nothing about how signals are drawn. Refuses a root that holds anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc import files
from sssd_hpc.ecg import ptbxl, statements
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.files import inside, read_json, remove_temporaries, sha256_file, write_json

REQUEST_FILE = ".generation.json"
REQUEST_FORMAT = 1
SUMS_FILE = "SHA256SUMS.txt"
TABLES = ("README.md", "RECORDS", ptbxl.FILE, statements.FILE)
# One invented patient a record, past every number that PTB-XL or a hospital list of its kind uses:
# numeric, because code written for PTB-XL converts the column; nobody's, so that a synthetic set
# beside the real one adds no record to a real patient, and folds stay disjoint.
FIRST_PATIENT = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The records to make, one row each, ascending by `ecg_id`.

    `ecg_id` (R,) int64 is that of the real record whose labels are used, `strat_fold` (R,) int64
    its fold, `labels` (R, K) int64 of 0 and 1 what the model is conditioned on.
    """

    ecg_id: NDArray[np.int64]
    strat_fold: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    rate_hz: int

    def __len__(self) -> int:
        return len(self.ecg_id)

    def codes(self, row: int) -> tuple[str, ...]:
        """Return the names of the labels that are present in a row."""
        return tuple(self.label_names[k] for k in np.flatnonzero(self.labels[row]))

    def name(self, row: int) -> str:
        """Return a row's record name in PTB-XL's layout, such as `records100/00000/00001_lr`."""
        ecg_id = int(self.ecg_id[row])
        suffix = "lr" if self.rate_hz == 100 else "hr"
        return f"records{self.rate_hz}/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_{suffix}"

    def files(self) -> set[str]:
        """Return the names of all record files."""
        return {f"{self.name(row)}.{kind}" for row in range(len(self)) for kind in ("dat", "hea")}

    def patient_id(self, row: int) -> str:
        """Return the invented patient of a row."""
        return str(FIRST_PATIENT + int(self.ecg_id[row]))

    def batches(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Return the rows of each batch; a row's place is fixed, whatever is made already."""
        rows = np.arange(len(self), dtype=np.int64)
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def sha256(self) -> str:
        """Return the hash of every row, so that a root can tell whose rows it holds."""
        digest = hashlib.sha256(repr((self.rate_hz, self.label_names)).encode())
        for column in (self.ecg_id, self.strat_fold, self.labels):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return digest.hexdigest()


def build(like: Store, folds: Sequence[int]) -> Manifest:
    """Return one row for each record of `like` in `folds`.

    Raises:
        UserError: no record lies in these folds, an ecg_id is below 0 or twice there, or a label's
            name is not ASCII.
    """
    if not all(name.isascii() and name.isprintable() for name in like.label_names):
        raise UserError(f"{like.path} has a label that is not plain ASCII; headers cannot hold it")
    rows = like.indices(folds)
    if len(rows) == 0:
        raise UserError(f"{like.path} has no record in the folds {list(folds)}; choose others")
    ecg_id = np.asarray(like.ecg_id[rows], dtype=np.int64)
    order = np.argsort(ecg_id, kind="stable")
    rows, ecg_id = rows[order], ecg_id[order]
    if ecg_id[0] < 0 or np.any(np.diff(ecg_id) == 0):
        raise UserError(f"{like.path} has an ecg_id below 0 or twice; ecg_ids name the new records")
    return Manifest(
        ecg_id=ecg_id,
        strat_fold=np.asarray(like.strat_fold[rows], dtype=np.int64),
        labels=np.asarray(like.labels_of(rows), dtype=np.int64),
        label_names=tuple(like.label_names),
        rate_hz=int(like.rate_hz),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """All that the bytes of a root depend on; two equal requests make equal roots."""

    model_sha256: str
    """SHA-256 of the exported checkpoint file."""
    weights: str
    sampler: str
    steps: int
    guidance: float
    seed: int
    batch_size: int
    folds: tuple[int, ...]
    manifest_sha256: str
    device: str
    """Kind of device; others round differently, so that one root is of one kind."""

    def comments(self, codes: Sequence[str]) -> tuple[str, ...]:
        """Return the header comments of a record that answers this request."""
        return (
            "synthetic: made by a diffusion model, a recording of nobody",
            f"labels: {' '.join(codes) or 'none'}",
            f"model: sha256 {self.model_sha256} {self.weights}",
            f"sampler: {self.sampler} {self.steps} steps, guidance {self.guidance:g}",
            f"seed: {self.seed}",
        )


def claim(out: Path, request: Request) -> None:
    """Make `out` the root of `request`, or see that it already is.

    Raises:
        UserError: `out` is a file, belongs to another request, or holds what this did not write.
    """
    path = out / REQUEST_FILE
    wanted = _as_json(request)
    if path.exists():
        held = read_json(path)
        held = held if isinstance(held, dict) else {}
        unequal = [name for name, value in wanted.items() if held.get(name) != value]
        if unequal:
            told = ", ".join(f"{name} {held.get(name)} (now {wanted[name]})" for name in unequal)
            raise UserError(
                f"{out} was begun with {told}; repeat that command to go on, or give another --out"
            )
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    remove_temporaries(out)
    if any(out.iterdir()):
        raise UserError(f"--out {out} holds files that sampling did not write; give a new folder")
    write_json(path, wanted)


def locked(out: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other processes off a claimed root; the lock dies with the process.

    Raises:
        UserError: another process holds it.
    """
    busy = f"another process is sampling into {out}; wait for it or stop it"
    return files.locked(out / REQUEST_FILE, busy)


def damaged(out: Path, manifest: Manifest) -> set[str] | None:
    """Return the files of a finished root that differ from its list of hashes; None if unfinished.

    Finished means that the list, written last, is there; a file that it lacks counts as damaged.
    """
    sums = out / SUMS_FILE
    if not sums.is_file():
        return None
    right = set()
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition(" ")
        with contextlib.suppress(UserError, OSError):
            if sha256_file(inside(out, name)) == digest:
                right.add(name)
    return {*manifest.files(), *TABLES} - right


def _as_json(request: Request) -> dict[str, Any]:
    values = dataclasses.asdict(request)
    return {"format": REQUEST_FORMAT, **values, "folds": list(request.folds)}
