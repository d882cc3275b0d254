"""The exports: what each library reads back, bounded memory, and whole or absent."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb
from numpy.typing import NDArray

from sssd_hpc import cli, generate
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.errors import UserError
from sssd_hpc.generate import export as exporting

from .conftest import ECG_IDS, FOLDS, LABELS, LENGTH, make_store

KINDS: tuple[exporting.Format, ...] = ("npy", "zarr", "hdf5")
COLUMNS = ("signals", "labels", "ecg_id", "strat_fold")


@pytest.fixture(scope="module")
def root(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canary")
    generate.sample(run, make_store(folder / "store"), folder / "root", seed=3)
    return folder / "root"


def read(path: Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    if kind == "npy":
        found = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        return found, json.loads((path / exporting.ATTRIBUTES).read_text())
    if kind == "zarr":
        import zarr

        group = zarr.open_group(str(path), mode="r")
        return {name: np.asarray(group[name]) for name in COLUMNS}, dict(group.attrs)
    import h5py

    with h5py.File(path, "r") as file:
        return {name: file[name][:] for name in COLUMNS}, dict(file.attrs)


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_the_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: exporting.Format, rows: int
) -> None:
    monkeypatch.setattr(exporting, "ROWS", rows)
    assert exporting.export(root, tmp_path / "new" / "out", kind) == len(ECG_IDS)
    found, attributes = read(tmp_path / "new" / "out", kind)
    order = np.argsort(ECG_IDS)
    assert found["signals"].dtype == np.float32
    assert found["signals"].shape == (len(ECG_IDS), 12, LENGTH)
    assert np.array_equal(found["ecg_id"], np.sort(ECG_IDS))
    assert np.array_equal(found["strat_fold"], np.array(FOLDS)[order])
    assert found["labels"].dtype == np.uint8
    assert np.array_equal(found["labels"], make_store(root).labels[order])
    for row in (0, 10):
        names = (root / "RECORDS").read_text().split()
        record = wfdb.rdrecord(str(root / names[row]))
        assert np.array_equal(found["signals"][row], record.p_signal.T.astype(np.float32))
    assert list(attributes["leads"]) == list(LEADS)
    assert list(attributes["labels"]) == list(LABELS)
    assert (attributes["rate_hz"], attributes["unit"], attributes["request_seed"]) == (100, "mV", 3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def test_what_is_in_memory_does_not_grow_with_the_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read a few at a time: the peak is far below the array."""
    monkeypatch.setattr(exporting, "ROWS", 2)
    long = np.ones((12, 200_000), dtype=np.float32)
    monkeypatch.setattr(exporting, "_signal", lambda *_: long.copy())
    tracemalloc.start()
    exporting.export(root, tmp_path / "out", "npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "signals.npy").stat().st_size > len(ECG_IDS) * long.nbytes
    # Two records, the block of the two, and one on its way.
    assert peak < 6 * long.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_set_is_not_exported_and_nothing_is_left(
    root: Path, tmp_path: Path, kind: exporting.Format
) -> None:
    spoiled = shutil.copytree(root, tmp_path / "root")
    data = spoiled / "records100/00000/00011_lr.dat"
    samples = np.fromfile(data, dtype="<i2").reshape(-1, 12)
    samples[[0, 1]] = samples[[1, 0]]
    data.write_bytes(samples.tobytes())
    with pytest.raises(UserError, match=r"00011_lr.dat differs from SHA256SUMS.txt"):
        exporting.export(spoiled, tmp_path / "out", kind)
    (spoiled / "SHA256SUMS.txt").unlink()
    with pytest.raises(UserError, match="is not finished"):
        exporting.export(spoiled, tmp_path / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: exporting.Format
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.rename", full)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        exporting.export(root, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_library_that_is_missing_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: exporting.Format
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'sssd_hpc\[arrays\]'"):
        exporting.export(root, tmp_path / "out", kind)


def test_the_command_line_exports_and_never_replaces(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["export", str(root), "--out", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert f"{len(ECG_IDS)} record(s) as npy" in capsys.readouterr().out
    assert cli.main(args) == 2
    assert "exists; give a new path" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    assert "not a folder that sample made" in capsys.readouterr().err
