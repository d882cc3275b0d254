"""How fast records become a store, and records are written, on one core.

    python -m bench.prepare [--records 600] [--repeats 3]

Everything runs on made-up records in a temporary folder; `wfdb` alone is the floor of reading.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import wfdb

from bench.timing import measure, record
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.ptbxl import PtbxlRow, finish_root
from sssd_hpc.ecg.wfdb_io import is_whole, read_record, write_record
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.shard import write_row
from sssd_hpc.generate.writer import Writer

REQUEST = Request(
    model_sha256="0" * 64,
    weights="ema",
    sampler="ddpm",
    steps=200,
    guidance=0.0,
    seed=0,
    batch_size=16,
    folds=(1,),
    manifest_sha256="0" * 64,
    device="cpu",
)


def make_root(root: Path, num_records: int) -> tuple[list[PtbxlRow], list[np.ndarray]]:
    """Write records of random walks at 100 Hz in PTB-XL's layout."""
    generator = np.random.default_rng(0)
    folder = root / "records100" / "00000"
    folder.mkdir(parents=True)
    rows, signals = [], []
    for number in range(1, num_records + 1):
        steps = generator.integers(-20, 21, (len(LEADS), 1000))
        signals.append(np.cumsum(steps, axis=1).astype(np.int16))
        write_record(folder, f"{number:05d}_lr", signals[-1], 100)
        file = f"records100/00000/{number:05d}_lr"
        codes = {"NORM": 100.0, "SR": 0.0}
        rows.append(PtbxlRow(number, str(number), (number - 1) % 10 + 1, codes, file, ""))
    finish_root(root, rows, card="benchmark\n")
    return rows, signals


def quiet_prepare(root: Path, out: Path) -> None:
    """Prepare without the progress lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        prepare(root, out)


def main() -> None:
    """Time the reading and writing of records and store the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    # One core, whatever numpy's libraries would take.
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        rows, signals = make_root(folder / "root", options.records)
        files = [row.filename_lr for row in rows]
        outs = (folder / f"out{number}" for number in itertools.count())
        root = folder / "root"

        def write_ours() -> None:
            """Write new files, as a generator does: replacing makes some file systems flush."""
            written = next(outs)
            written.mkdir()
            for number, signal in enumerate(signals):
                write_record(written, f"{number:05d}", signal, 100, ["seed 1"])

        manifest = Manifest(
            ecg_id=np.arange(len(signals)),
            strat_fold=np.ones(len(signals), dtype=np.int64),
            labels=np.ones((len(signals), 1), dtype=np.int64),
            label_names=("NORM",),
            rate_hz=100,
        )
        drawn = np.stack(signals) / 1000.0

        def write_set() -> None:
            """Write as a shard does: its thread rounds, checks and writes what was drawn."""
            written = next(outs)
            with Writer(lambda row, mv: write_row(written, manifest, REQUEST, row, mv)) as writer:
                for rows in manifest.batches(REQUEST.batch_size):
                    writer.put(rows, drawn[rows])
                writer.finish()

        def write_wfdb() -> None:
            written = next(outs)
            written.mkdir()
            for number, signal in enumerate(signals[:20]):
                wfdb.wrsamp(
                    f"{number:05d}",
                    fs=100,
                    units=["mV"] * 12,
                    sig_name=list(LEADS),
                    d_signal=signal.T,
                    fmt=["16"] * 12,
                    adc_gain=[1000.0] * 12,
                    baseline=[0] * 12,
                    write_dir=str(written),
                )

        works = {
            "prepare": (lambda: quiet_prepare(root, next(outs)), len(files)),
            "read_record": (lambda: [read_record(root, file) for file in files], len(files)),
            "wfdb_rdrecord": (
                lambda: [wfdb.rdrecord(str(root / file), physical=False) for file in files],
                len(files),
            ),
            "write_record": (write_ours, len(signals)),
            "write_set": (write_set, len(signals)),
            "wfdb_wrsamp": (write_wfdb, 20),
            "is_whole": (lambda: [is_whole(root, file) for file in files], len(files)),
        }
        result: dict[str, object] = {"records": len(files), "rate_hz": 100, "cores": 1}
        for name, (work, count) in works.items():
            times = measure(work, repeats=options.repeats)
            result[name] = {"records_per_s": round(count / times["median_s"], 1), **times}
    record("prepare", result)


if __name__ == "__main__":
    main()
