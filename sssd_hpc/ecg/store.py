"""The packed training store: checked when opened, memory-mapped, read by record and lead name.

A store is a folder that `prepare` made. Nothing here writes to it, and no file of it is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS, positions
from sssd_hpc.errors import UserError
from sssd_hpc.files import read_csv, read_json, sha256_bytes, sha256_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = "partial"
"""Folder of work in progress, in a store that is not finished."""
SIGNALS = "signals.npy"
LABELS = "labels.npy"
RECORDS = "records.csv"
REJECTED = "rejected.csv"
FILES = (SIGNALS, LABELS, RECORDS, REJECTED)
RECORD_COLUMNS = ("ecg_id", "patient_id", "strat_fold", "file", "scp_codes", "flags")
GAIN_PER_MV = 1000
MEND = "remove the store and prepare again"


@dataclass(frozen=True, eq=False)
class Store:
    """An opened store of R records, L samples each, K labels; see `Store.open`."""

    path: Path
    manifest: dict[str, Any]
    signals: NDArray[np.int16]
    """(R, 12, L) memory-mapped, 1000 units a mV, leads in `LEADS` order."""
    labels: NDArray[np.uint8]
    """(R, K): 1 present, 0 absent."""
    ecg_id: NDArray[np.int64]
    patient_id: NDArray[np.str_]
    strat_fold: NDArray[np.int64]
    scp_codes: tuple[dict[str, float], ...]
    """Each record's statement codes, with likelihoods in percent, as the source gave them."""
    flags: tuple[tuple[str, ...], ...]
    """Each record's quality flags (`flat:LEAD`, `saturated:LEAD`)."""

    @property
    def rate_hz(self) -> int:
        """Samples a second."""
        return int(self.manifest["rate_hz"])

    @property
    def lead_names(self) -> tuple[str, ...]:
        """The 12 leads, in the order of `signals`."""
        return LEADS

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the columns of `labels`."""
        return tuple(self.manifest["label_names"])

    @property
    def num_records(self) -> int:
        """R."""
        return int(self.signals.shape[0])

    @property
    def length(self) -> int:
        """L, samples a record."""
        return int(self.signals.shape[2])

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> Store:
        """Open a store: sizes, shapes and consistency are always checked, hashes with `verify`.

        Raises:
            UserError: no store there, an unfinished one, or one that is damaged or of another
                version; the message names the file.
        """
        manifest = _read_manifest(path)
        for name in FILES:
            _check_file(path / name, manifest["files"].get(name), verify=verify)
        num_records, length = manifest["num_records"], manifest["length"]
        num_labels = len(manifest["label_names"])
        signals = _load(path / SIGNALS, (num_records, len(LEADS), length), np.dtype("<i2"))
        labels = np.array(_load(path / LABELS, (num_records, num_labels), np.dtype("u1")))
        if labels.max(initial=0) > 1:
            raise UserError(f"{path / LABELS} is damaged: labels are 0 or 1; {MEND}")
        rows = read_csv(path / RECORDS, RECORD_COLUMNS)
        try:
            store = cls(
                path=path,
                manifest=manifest,
                signals=signals,
                labels=labels,
                ecg_id=np.array([int(row["ecg_id"]) for row in rows], dtype=np.int64),
                patient_id=np.array([row["patient_id"] for row in rows], dtype=np.str_),
                strat_fold=np.array([int(row["strat_fold"]) for row in rows], dtype=np.int64),
                scp_codes=tuple(_codes(row["scp_codes"]) for row in rows),
                flags=tuple(tuple(row["flags"].split()) for row in rows),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path / RECORDS} is damaged; {MEND}") from error
        folds = {str(fold): int((store.strat_fold == fold).sum()) for fold in range(1, 11)}
        if len(rows) != num_records or folds != manifest["records_per_fold"]:
            raise UserError(
                f"{path / RECORDS} has {len(rows)} records in folds {folds}, {MANIFEST} says "
                f"{num_records} in {manifest['records_per_fold']}; {MEND}"
            )
        return store

    def indices(self, folds: Iterable[int]) -> NDArray[np.int64]:
        """Return the indices of the records that lie in `folds`, in the store's order."""
        return np.flatnonzero(np.isin(self.strat_fold, list(folds))).astype(np.int64)

    def signals_mv(
        self, indices: NDArray[np.integer] | Sequence[int], leads: Sequence[str]
    ) -> NDArray[np.float32]:
        """Return the named leads of some records in mV, (n, len(leads), L)."""
        records = np.asarray(indices, dtype=np.int64)
        picked = self.signals[records[:, None], np.array(positions(LEADS, leads))[None, :]]
        return np.asarray(picked / np.float32(GAIN_PER_MV), dtype=np.float32)

    def labels_of(self, indices: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int64]:
        """Return the label rows of some records, (n, K)."""
        return self.labels[np.asarray(indices, dtype=np.int64)].astype(np.int64)

    def waveform_hashes(self) -> list[str]:
        """Return each record's SHA-256 over its samples: equal hashes are copies."""
        return [sha256_bytes(np.ascontiguousarray(record).tobytes()) for record in self.signals]


def _codes(text: str) -> dict[str, float]:
    return {str(code): float(likelihood) for code, likelihood in json.loads(text).items()}


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a store's manifest."""
    if not (path / MANIFEST).is_file():
        what = "give the folder that prepare wrote" if path.is_dir() else "absent"
        if (path / PARTIAL).is_dir():
            what = "an unfinished store: run the same prepare again"
        raise UserError(f"no store at {path}: it has no {MANIFEST} ({what})")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise UserError(f"{path / MANIFEST} does not describe a store; prepare one")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} is a store of format version {manifest['format_version']!r}, "
            f"this program reads version {FORMAT_VERSION}; {MEND}"
        )
    counts = [manifest.get(name) for name in ("rate_hz", "num_records", "length")]
    names = manifest.get("label_names")
    sound = (
        all(type(count) is int and count > 0 for count in counts)
        and isinstance(names, list)
        and all(isinstance(name, str) and name for name in names)
        and 0 < len(set(names)) == len(names)
        and isinstance(manifest.get("files"), dict)
        and isinstance(manifest.get("records_per_fold"), dict)
    )
    if not sound:
        raise UserError(f"{path / MANIFEST} is damaged: a field is missing or wrong")
    if manifest.get("lead_names") != list(LEADS) or manifest.get("gain_per_mv") != GAIN_PER_MV:
        raise UserError(f"{path / MANIFEST} has other leads or another gain than this program's")
    return manifest


def _check_file(path: Path, entry: object, *, verify: bool) -> None:
    """Compare a file with its manifest entry: size always, SHA-256 if asked."""
    if not isinstance(entry, dict):
        raise UserError(f"{path.parent / MANIFEST} does not list {path.name}; {MEND}")
    if not path.is_file():
        raise UserError(f"{path} is missing; {MEND}")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise UserError(f"{path} has {size} bytes, {MANIFEST} says {entry.get('bytes')}; {MEND}")
    if verify and sha256_file(path) != entry.get("sha256"):
        raise UserError(f"{path} is damaged: its SHA-256 differs; {MEND}")


def _load(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map an array whose shape and type are known beforehand; pickled objects are refused."""
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise UserError(f"{path} is damaged: it is not a plain numpy array") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, {MANIFEST} says {dtype} {shape}"
        )
    return array
