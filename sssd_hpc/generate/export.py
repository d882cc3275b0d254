"""A finished set as plain arrays, for people who train on it with code of their own.

`signals` (R, 12, L) float32 in mV, `labels` (R, K) uint8, `ecg_id` and `strat_fold` (R,) int64, in
one order; attributes name leads and labels. Holds 64 records in memory; whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.wfdb_io import GAIN_PER_MV
from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_directory, atomic_file, sha256_bytes
from sssd_hpc.generate.manifest import Manifest
from sssd_hpc.generate.names import SUMS_FILE
from sssd_hpc.generate.root import read_back
from sssd_hpc.progress import Progress

Format = Literal["npy", "zarr", "hdf5"]
Rows = Callable[[NDArray[np.float32]], None]

ROWS = 64
ATTRIBUTES = "attributes.json"
MODULES = {"zarr": "zarr", "hdf5": "h5py"}


def export(root: Path, out: Path, kind: Format) -> int:
    """Write the set `root` as arrays to `out`: a folder (npy, zarr) or a file (hdf5).

    Every record is held to its hash as it is read.

    Returns:
        The number of records.

    Raises:
        UserError: `root` is unfinished or damaged, `out` exists, or a library is missing.
    """
    module = MODULES.get(kind)
    if module and importlib.util.find_spec(module) is None:
        raise UserError(
            f"--format {kind} needs {module}, which is not installed; "
            f"pip install 'sssd_hpc[arrays]', or take --format npy"
        )
    if out.exists():
        raise UserError(f"--out {out} exists; give a new path")
    manifest, request = read_back(root)
    sums = _sums(root)
    length = _signal(root, manifest, sums, 0).shape[1]
    attributes = {
        "synthetic": True,
        "leads": list(LEADS),
        "labels": list(manifest.label_names),
        "rate_hz": manifest.rate_hz,
        "unit": "mV",
        **{f"request_{name}": value for name, value in dataclasses.asdict(request).items()},
    }
    columns: dict[str, NDArray[Any]] = {
        "labels": manifest.labels.astype(np.uint8),
        "ecg_id": manifest.ecg_id,
        "strat_fold": manifest.strat_fold,
    }
    shape = (len(manifest), len(LEADS), length)
    out.parent.mkdir(parents=True, exist_ok=True)
    writers = {"npy": _npy, "zarr": _zarr, "hdf5": _hdf5}
    with (
        Progress("export", total=len(manifest), unit="records") as progress,
        writers[kind](out, shape, columns, attributes) as write,
    ):
        for first in range(0, len(manifest), ROWS):
            rows = range(first, min(first + ROWS, len(manifest)))
            signals = [_signal(root, manifest, sums, row) for row in rows]
            if any(signal.shape != shape[1:] for signal in signals):
                raise UserError(f"{root} has records of different lengths; they make no array")
            write(np.stack(signals))
            progress.advance(len(rows))
    return len(manifest)


def _sums(root: Path) -> dict[str, str]:
    path = root / SUMS_FILE
    if not path.is_file():
        raise UserError(f"{root} is not finished: it has no {SUMS_FILE}; repeat the sample command")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition(" ") for line in lines)}


def _signal(
    root: Path, manifest: Manifest, sums: Mapping[str, str], row: int
) -> NDArray[np.float32]:
    """Return a record (12, L) in mV; its hash says that it is as `write_record` wrote it."""
    file = f"{manifest.name(row)}.dat"
    try:
        data = (root / file).read_bytes()
    except OSError as error:
        raise UserError(f"{root / file} cannot be read: {error.strerror}") from error
    if sha256_bytes(data) != sums.get(file):
        raise UserError(f"{root / file} differs from {SUMS_FILE}; repeat the sample command")
    adc = np.frombuffer(data, dtype="<i2").reshape(-1, len(LEADS)).T
    return np.ascontiguousarray(adc / GAIN_PER_MV, dtype=np.float32)


@contextlib.contextmanager
def _npy(
    out: Path,
    shape: tuple[int, ...],
    columns: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
) -> Iterator[Rows]:
    with atomic_directory(out) as folder:
        for name, column in columns.items():
            np.save(folder / f"{name}.npy", column)
        text = json.dumps(attributes, indent=2, allow_nan=False) + "\n"
        (folder / ATTRIBUTES).write_text(text, encoding="utf-8")
        with open(folder / "signals.npy", "wb") as stream:
            # Written in order, not mapped: there a full disk would kill the process.
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)

            def write(signals: NDArray[np.float32]) -> None:
                stream.write(signals.astype("<f4", copy=False).data)

            yield write


@contextlib.contextmanager
def _zarr(
    out: Path,
    shape: tuple[int, ...],
    columns: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
) -> Iterator[Rows]:
    import zarr

    with atomic_directory(out) as folder:
        zarr.open_group(str(folder), mode="w").attrs.update(attributes)

        def create(name: str, shape: tuple[int, ...], dtype: str) -> Any:
            chunks = (min(ROWS, shape[0]), *shape[1:]) if len(shape) == 3 else shape
            place = str(folder / name)
            return zarr.open_array(place, mode="w", shape=shape, chunks=chunks, dtype=dtype)

        for name, column in columns.items():
            create(name, column.shape, column.dtype.str)[:] = column
        yield _filler(create("signals", shape, "<f4"))


@contextlib.contextmanager
def _hdf5(
    out: Path,
    shape: tuple[int, ...],
    columns: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
) -> Iterator[Rows]:
    import h5py

    with atomic_file(out) as temp, h5py.File(temp, "w") as file:
        file.attrs.update(attributes)
        for name, column in columns.items():
            file.create_dataset(name, data=column)
        chunks = (min(ROWS, shape[0]), *shape[1:])
        yield _filler(file.create_dataset("signals", shape, dtype="<f4", chunks=chunks))


def _filler(array: Any) -> Rows:
    """Return what writes rows to an array, one block after the other."""
    filled = 0

    def write(signals: NDArray[np.float32]) -> None:
        nonlocal filled
        array[filled : filled + len(signals)] = signals
        filled += len(signals)

    return write
