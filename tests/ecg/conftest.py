"""Small PTB-XL-shaped roots, made as functions that tests get as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg.ptbxl import COLUMNS, PtbxlRow, finish_root
from sssd_hpc.ecg.wfdb_io import write_record
from sssd_hpc.files import write_csv

CODES = ({"NORM": 100.0, "SR": 0.0}, {"AFIB": 0.0}, {"IMI": 35.0, "PVC": 0.0}, {"NORM": 50.0})


def record_signal(number: int, rate_hz: int = 100) -> np.ndarray:
    """Return the samples (12, 10 s) of one record, different for each number."""
    generator = np.random.default_rng(number)
    return generator.integers(-1500, 1500, (12, 10 * rate_hz)).astype(np.int16)


def sound_rows(num_records: int) -> list[PtbxlRow]:
    """Return rows with folds 1 to 10 in turn, each patient in one fold."""
    return [
        PtbxlRow(
            ecg_id=number,
            patient_id=str(1000 + number),
            strat_fold=(number - 1) % 10 + 1,
            scp_codes=CODES[number % len(CODES)],
            filename_lr=f"records100/00000/{number:05d}_lr",
            filename_hr=f"records500/00000/{number:05d}_hr",
        )
        for number in range(1, num_records + 1)
    ]


def _make_root(root: Path, num_records: int = 12, *, rates: Sequence[int] = (100,)) -> Path:
    """Write a root of random records and finish it."""
    table = sound_rows(num_records)
    for rate in rates:
        folder = root / f"records{rate}" / "00000"
        folder.mkdir(parents=True)
        for row in table:
            name = Path(row.filename_lr if rate == 100 else row.filename_hr).name
            write_record(folder, name, record_signal(row.ecg_id, rate), rate)
    if 500 not in rates:
        table = [PtbxlRow(**{**vars(row), "filename_hr": ""}) for row in table]
    finish_root(root, table, card="# A test set\n")
    return root


def _write_table(root: Path, **columns: Sequence[object]) -> Path:
    """Write a sound table with some columns replaced, one cell a row; return the root."""
    num_rows = len(next(iter(columns.values())))
    cells = []
    for row, number in zip(sound_rows(num_rows), range(num_rows), strict=True):
        cell: dict[str, object] = {**vars(row), "scp_codes": repr(row.scp_codes)}
        cell |= {name: values[number] for name, values in columns.items()}
        cells.append(cell)
    write_csv(root / "ptbxl_database.csv", COLUMNS, cells)
    return root


@pytest.fixture(scope="session", name="root_maker")
def _root_maker() -> Callable[..., Path]:
    return _make_root


@pytest.fixture
def make_root(root_maker: Callable[..., Path]) -> Callable[..., Path]:
    return root_maker


@pytest.fixture
def write_table() -> Callable[..., Path]:
    return _write_table


@pytest.fixture
def rows_of() -> Callable[[int], list[PtbxlRow]]:
    return sound_rows


@pytest.fixture
def signal_of() -> Callable[..., np.ndarray]:
    return record_signal
