"""What is to be made: the table of records, and the request for them.

Decides nothing about how signals are drawn, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError

# One invented patient a record, past every number that PTB-XL or a hospital list of its kind uses:
# numeric, because code written for PTB-XL converts the column; nobody's, so that a synthetic set
# beside the real one adds no record to a real patient, and folds stay disjoint.
FIRST_PATIENT = 1_000_000_000
FORMAT = 1


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

    def row_of(self, ecg_id: int) -> int:
        """Return the row of a record.

        Raises:
            UserError: no row has that number.
        """
        row = int(np.searchsorted(self.ecg_id, ecg_id))
        if row == len(self) or self.ecg_id[row] != ecg_id:
            raise UserError(
                f"no record has the number {ecg_id}; they are {self.ecg_id[0]} to "
                f"{self.ecg_id[-1]}, {len(self)} in all"
            )
        return row

    def lines(self, seed: int, batch_size: int) -> str:
        """Return the manifest as JSON lines: what is common, then one row each, with its batch."""
        common = {"format": FORMAT, "records": len(self), "rate_hz": self.rate_hz}
        lines = [json.dumps({**common, "labels": list(self.label_names)})]
        for row in range(len(self)):
            told = {
                "record": self.name(row),
                "source_ecg_id": int(self.ecg_id[row]),
                "strat_fold": int(self.strat_fold[row]),
                "labels": list(self.codes(row)),
                "seed": seed,
                "batch": row // batch_size,
            }
            lines.append(json.dumps(told))
        return "".join(f"{line}\n" for line in lines)

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


def parse(text: str) -> Manifest:
    """Return the manifest that `Manifest.lines` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    common, *rows = [json.loads(line) for line in text.splitlines()]
    names = {name: column for column, name in enumerate(common["labels"])}
    labels = np.zeros((len(rows), len(names)), dtype=np.int64)
    for number, row in enumerate(rows):
        labels[number, [names[name] for name in row["labels"]]] = 1
    return Manifest(
        ecg_id=np.array([row["source_ecg_id"] for row in rows], dtype=np.int64),
        strat_fold=np.array([row["strat_fold"] for row in rows], dtype=np.int64),
        labels=labels,
        label_names=tuple(names),
        rate_hz=int(common["rate_hz"]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """All that the bytes of a root depend on; two equal requests make equal roots."""

    model_sha256: str
    """SHA-256 of the exported checkpoint file."""
    weights: str
    precision: str = "fp32"
    sampler: str
    steps: int
    eta: float = 0.0
    guidance: float
    guidance_interval: tuple[float, ...] = ()
    """Lowest and highest noise level that is guided; empty: all are."""
    seed: int
    batch_size: int
    folds: tuple[int, ...]
    manifest_sha256: str
    device: str
    """Model of GPU, or cpu; others round differently, so that one root is of one kind."""

    def method(self) -> str:
        """Return the sampler and its options in words."""
        words = f"{self.sampler}, {self.steps} steps"
        if self.eta:
            words += f", eta {self.eta:g}"
        words += f", guidance {self.guidance:g}"
        if self.guidance_interval:
            words += " at noise levels {:g} to {:g}".format(*self.guidance_interval)
        return words if self.precision == "fp32" else f"{words}, in {self.precision}"

    def comments(self, codes: Sequence[str]) -> tuple[str, ...]:
        """Return the header comments of a record that answers this request."""
        return (
            "synthetic: made by a diffusion model, a recording of nobody",
            f"labels: {' '.join(codes) or 'none'}",
            f"model: sha256 {self.model_sha256} {self.weights}",
            f"sampler: {self.method()}",
            f"seed: {self.seed}",
        )
