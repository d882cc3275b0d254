"""prepare: what enters the store, what is rejected, and that it resumes from anywhere."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import wfdb
from scipy.signal import welch

from sssd_hpc.ecg import journal
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.ptbxl import finish_root
from sssd_hpc.ecg.statements import aggregate
from sssd_hpc.ecg.store import Store
from sssd_hpc.ecg.wfdb_io import write_record
from sssd_hpc.errors import UserError
from sssd_hpc.files import read_csv


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reasons(store: Path) -> dict[str, str]:
    return {row["file"][-8:]: row["reason"] for row in read_csv(store / "rejected.csv", ())}


def rewrite(root: Path, number: int, signal: np.ndarray, rate: int = 100) -> None:
    write_record(root / "records100" / "00000", f"{number:05d}_lr", signal, rate)


# Real records


@pytest.fixture(scope="module")
def real(ptbxl_root, tmp_path_factory) -> Store:
    return prepare(ptbxl_root, tmp_path_factory.mktemp("real") / "store")


def test_all_real_records_are_stored_exactly(ptbxl_root, real):
    assert (real.num_records, reasons(real.path)) == (500, {})
    for row, signal in zip(read_csv(real.path / "records.csv", ()), real.signals, strict=True):
        raw = np.fromfile(ptbxl_root / (row["file"] + ".dat"), dtype="<i2")
        assert np.array_equal(signal, raw.reshape(-1, 12).T)
    for index in range(0, 500, 25):
        name = ptbxl_root / f"records100/00000/{real.ecg_id[index]:05d}_lr"
        record = wfdb.rdrecord(str(name))
        assert record.sig_name == list(LEADS)
        assert np.array_equal(real.signals[index] / 1000.0, record.p_signal.T)


def test_real_labels_and_folds_are_the_tables(ptbxl_root, real):
    with open(ptbxl_root / "ptbxl_database.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    count = Counter(code for row in table for code in ast.literal_eval(row["scp_codes"]))
    assert dict(zip(real.label_names, real.labels.sum(axis=0).tolist(), strict=True)) == {
        name: count[name] for name in real.label_names
    }
    assert real.manifest["records_per_label"]["NORM"] == count["NORM"] > 0
    assert real.strat_fold.tolist() == [int(row["strat_fold"]) for row in table]
    folds = Counter(row["strat_fold"] for row in table)
    assert real.manifest["records_per_fold"] == {
        str(fold): folds[str(fold)] for fold in range(1, 11)
    }
    assert Store.open(real.path, verify=True).num_records == 500


def test_real_records_at_500_hz(ptbxl_root, tmp_path, caplog):
    store = prepare(ptbxl_root, tmp_path / "store", rate=500, labels="super")
    assert (store.rate_hz, store.length, store.num_records) == (500, 5000, 500)
    raw = np.fromfile(ptbxl_root / "records500/00000/00042_hr.dat", dtype="<i2")
    assert np.array_equal(store.signals[store.ecg_id == 42][0], raw.reshape(-1, 12).T)
    # PTB-XL before 1.0.3 has copies, among them a pair in the training folds 3 and 1.
    assert [145, 463] in store.manifest["equal_waveforms"]
    assert len(store.manifest["equal_waveforms"]) == 5
    assert store.manifest["leakage"] is None
    assert "5 records repeat another's waveform" in caplog.text


# What is stored


def test_the_manifest_describes_the_store(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    manifest = prepare(root, tmp_path / "store", labels="NORM,AFIB").manifest
    assert manifest["label_names"] == ["AFIB", "NORM"]
    assert manifest["records_per_label"] == {"AFIB": 3, "NORM": 6}
    assert manifest["source"] == {"layout": "PTB-XL", "version": None, "synthetic": False}
    assert manifest["leakage"] is None
    assert set(manifest["files"]) == {"signals.npy", "labels.npy", "records.csv", "rejected.csv"}
    assert sorted(os.listdir(tmp_path / "store")) == sorted([*manifest["files"], "manifest.json"])  # noqa: PTH208


def test_a_store_does_not_depend_on_where_its_source_lies(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    (root / "records100" / "00000" / "00003_lr.dat").unlink()
    prepare(root, tmp_path / "one")
    shutil.move(root, tmp_path / "elsewhere")
    prepare(tmp_path / "elsewhere", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_minimal_likelihood_changes_the_labels(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    store = prepare(root, tmp_path / "store", labels="NORM,SR,IMI,PVC", min_likelihood=80)
    assert store.manifest["records_per_label"] == {"IMI": 0, "NORM": 3, "PVC": 3, "SR": 3}
    assert store.scp_codes[2] == {"NORM": 50.0}


def test_a_synthetic_root_of_classes_is_prepared_by_class(tmp_path, make_root, rows_of):
    root = make_root(tmp_path / "root")
    rows = [replace(row, scp_codes={"MI": 100.0}, filename_hr="", seed=1) for row in rows_of(12)]
    finish_root(root, rows, statements_extra=[aggregate("MI")], card="")
    store = prepare(root, tmp_path / "store", labels="super")
    assert store.manifest["records_per_label"] == {
        "CD": 0,
        "HYP": 0,
        "MI": 12,
        "NORM": 0,
        "STTC": 0,
    }
    assert store.manifest["source"]["synthetic"] is True


def test_the_band_pass_keeps_its_band_and_does_not_shift(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    t = np.arange(1000) / 100
    tone = np.sin(2 * np.pi * 10 * t)
    rewrite(root, 1, np.tile(tone + 3.0 * np.sin(2 * np.pi * 0.1 * t) + 2.0, (12, 1)))
    plain = prepare(root, tmp_path / "plain").signals[0, 0] / 1000
    assert np.abs(plain - tone).max() > 2
    store = prepare(root, tmp_path / "filtered", band_pass=(1.0, 40.0))
    middle = slice(200, 800)
    assert np.abs(store.signals[0, 0, middle] / 1000 - tone[middle]).max() < 0.02
    frequency, power = welch(store.signals[1, 0] / 1000.0, fs=100, nperseg=500)
    assert power[frequency < 0.3].max() < 0.05 * power[(frequency > 5) & (frequency < 30)].mean()
    assert store.manifest["command"]["band_pass_hz"] == [1.0, 40.0]


# What is rejected


def test_unusable_records_are_rejected_with_the_reason(tmp_path, make_root, signal_of):
    root = make_root(tmp_path / "root", 20)
    folder = root / "records100" / "00000"
    rewrite(root, 2, signal_of(2)[:, :999])
    rewrite(root, 3, signal_of(3, 500)[:, :1001])
    rewrite(root, 4, signal_of(4, 500), 500)
    rewrite(root, 5, signal_of(5), 250)
    (folder / "00006_lr.dat").write_bytes((folder / "00006_lr.dat").read_bytes()[:-2])
    (folder / "00007_lr.hea").unlink()
    header = (folder / "00008_lr.hea").read_text()
    (folder / "00008_lr.hea").write_text(header.replace(" V6", " VX"))
    (folder / "00009_lr.hea").write_text("")
    text = (root / "ptbxl_database.csv").read_text()
    assert "{'AFIB': 0.0}" in text
    text = text.replace("{'AFIB': 0.0}", "{'NOPE': 0.0}", 1)
    (root / "ptbxl_database.csv").write_text(text.replace("records100/00000/00010_lr", "../10"))
    flat = signal_of(11)
    flat[4] = 0
    rewrite(root, 11, flat)
    store = prepare(root, tmp_path / "store")
    found = reasons(store.path)
    assert store.num_records == 20 - len(found)
    assert found == {
        "00001_lr": "scp_statements.csv lacks 1 of its codes",
        "00002_lr": "it has 999 samples, not 1000",
        "00003_lr": "it has 1001 samples, not 1000",
        "00004_lr": "it has 500 Hz, not 100",
        "00005_lr": "it has 250 Hz, not 100",
        "00006_lr": "its data file has 23998 bytes, its header promises 24000",
        "00007_lr": "its header cannot be read: No such file or directory",
        "00008_lr": "missing lead(s) V6",
        "00009_lr": "its header does not begin with 'name signals rate length'",
        "../10": "its name or a link leads out of the root",
    }
    assert store.flags[store.ecg_id.tolist().index(11)] == ("flat:AVL",)
    assert store.manifest["num_rejected"] == 10


def test_rejections_are_told(tmp_path, make_root, caplog):
    root = make_root(tmp_path / "root")
    (root / "records100" / "00000" / "00002_lr.dat").unlink()
    prepare(root, tmp_path / "store")
    assert "1 of 12 records are rejected; rejected.csv says why" in caplog.text


def test_no_usable_record_is_an_error_and_can_be_mended(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    (root / "records100").rename(root / "moved")
    with pytest.raises(UserError, match=r"no record .* its header cannot be read.*12 records"):
        prepare(root, tmp_path / "store")
    (root / "moved").rename(root / "records100")
    assert prepare(root, tmp_path / "store").num_records == 12


def test_a_rate_without_files_is_an_error(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    with pytest.raises(UserError, match="the table names no 500 Hz file"):
        prepare(root, tmp_path / "store", rate=500)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rate": 250}, "rate is 250 Hz"),
        ({"min_likelihood": -1}, "min_likelihood is -1"),
        ({"min_likelihood": 101}, "min_likelihood is 101"),
        ({"min_likelihood": float("nan")}, "min_likelihood is nan"),
        ({"band_pass": (0.0, 40.0)}, "band_pass is 0 to 40"),
        ({"band_pass": (0.5, 50.0)}, "band_pass is 0.5 to 50"),
        ({"band_pass": (40.0, 0.5)}, "band_pass is 40 to 0.5"),
        ({"labels": "NORMAL"}, "unknown code 'NORMAL'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_an_error_and_leave_nothing(tmp_path, make_root, arguments, reason):
    root = make_root(tmp_path / "root")
    with pytest.raises(UserError, match=reason):
        prepare(root, tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


def test_a_source_that_is_no_root_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no PTB-XL root: ptbxl_database\.csv"):
        prepare(tmp_path, tmp_path / "store")


# Leakage


def test_a_waveform_in_training_and_validation_folds_is_an_error_unless_allowed(
    tmp_path, make_root, signal_of, caplog
):
    root = make_root(tmp_path / "root")
    rewrite(root, 9, signal_of(2))
    rewrite(root, 12, signal_of(2))
    with pytest.raises(UserError, match=r"ecg_id 2 \(fold 2\) and 9 \(fold 9\)"):
        prepare(root, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()
    store = prepare(root, tmp_path / "store", allow_leakage=True)
    assert store.num_records == 12
    assert store.manifest["leakage"] == {"num_patients": 0, "num_waveforms": 1}
    assert store.manifest["equal_waveforms"] == [[2, 9], [2, 12]]
    assert "leakage allowed: 1 waveforms and 0 patients" in caplog.text
    with pytest.raises(UserError, match="with leakage allowed"):
        prepare(root, tmp_path / "store")
    assert prepare(root, tmp_path / "store", allow_leakage=True).num_records == 12


def test_a_waveform_in_validation_and_test_folds_is_an_error(tmp_path, make_root, signal_of):
    root = make_root(tmp_path / "root")
    rewrite(root, 10, signal_of(9))
    with pytest.raises(UserError, match=r"ecg_id 9 \(fold 9\) and 10 \(fold 10\)"):
        prepare(root, tmp_path / "store")


def test_copies_among_training_folds_are_told_and_recorded(tmp_path, make_root, signal_of, caplog):
    root = make_root(tmp_path / "root")
    rewrite(root, 3, signal_of(1))
    manifest = prepare(root, tmp_path / "store").manifest
    assert (manifest["equal_waveforms"], manifest["leakage"]) == ([[1, 3]], None)
    assert "1 records repeat another's waveform; manifest.json lists them" in caplog.text


def test_a_patient_in_two_folds_is_an_error_unless_allowed(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    table = root / "ptbxl_database.csv"
    table.write_text(table.read_text().replace("\n9,1009,", "\n9,1002,"))
    with pytest.raises(UserError, match="several folds"):
        prepare(root, tmp_path / "store")
    store = prepare(root, tmp_path / "store", allow_leakage=True)
    assert store.manifest["leakage"] == {"num_patients": 1, "num_waveforms": 0}


# Private data


def test_no_free_text_of_the_source_reaches_the_store(tmp_path, make_root, caplog, capsys):
    canary = "Canaryname"
    root = make_root(tmp_path / "root")
    folder = root / "records100" / "00000"
    for header in folder.glob("*.hea"):
        header.write_text(header.read_text() + f"# Patient: {canary} 1950\n#{canary}\n")
    # Three records that are rejected for a reason that the canary is part of.
    for number, old, new in (
        (2, " V6\n", f" {canary}\n"),
        (3, "/mV", f"/{canary}"),
        (4, "00004_lr 12", f"{canary} 12"),
    ):
        header = folder / f"{number:05d}_lr.hea"
        header.write_text(header.read_text().replace(old, new, 1))
    with open(root / "ptbxl_database.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[4]["scp_codes"] = f"{{'{canary}': 100}}"
    rows[5]["scp_codes"] = f"['{canary}']"
    private = [name for name in rows[0] if not rows[0][name]] + ["surname", canary]
    for row in rows:
        row.update({name: f"=cmd|{canary}" for name in private if name != "filename_hr"})
    with open(root / "ptbxl_database.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    store = prepare(root, tmp_path / "store")
    assert len(private) > 20
    assert (store.num_records, len(reasons(store.path))) == (7, 5)
    for name, data in contents(tmp_path / "store").items():
        assert canary.lower().encode() not in (name.encode() + data).lower(), name
    heard = caplog.text + "".join(capsys.readouterr())
    assert canary not in heard


# Resuming


def interrupted(monkeypatch, after: int) -> None:
    """Make the `after`-th reading of a record raise KeyboardInterrupt."""
    from sssd_hpc.ecg import prepare as module

    calls = iter(range(after, -1, -1))
    original = module.read_record

    def read(*args):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "read_record", read)


@pytest.fixture
def undisturbed(tmp_path, make_root, monkeypatch) -> dict[str, bytes]:
    """Make a root with a rejected record, and the bytes of its store; chunks are small."""
    monkeypatch.setattr(journal, "CHUNK", 4)
    root = make_root(tmp_path / "root")
    (root / "records100" / "00000" / "00006_lr.dat").unlink()
    prepare(root, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("after", [0, 1, 3, 4, 9, 11])
def test_an_interrupted_prepare_continues(tmp_path, undisturbed, monkeypatch, after):
    root, out = tmp_path / "root", tmp_path / "store"
    with monkeypatch.context() as patch:
        interrupted(patch, after)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, out)
    with pytest.raises(UserError, match="run the same prepare again"):
        Store.open(out)
    with monkeypatch.context() as patch:
        # What was flushed is not read again.
        interrupted(patch, 12 - after // 4 * 4)
        prepare(root, out)
    assert contents(out) == undisturbed


KILL_EVERYWHERE = """
import os, sys
from pathlib import Path
from sssd_hpc.ecg import journal
from sssd_hpc.ecg.prepare import prepare

journal.CHUNK = 4
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
for point in range(1000):
    out = folder / str(point)
    child = os.fork()
    if child == 0:
        left = point
        def deadly(function):
            def call(*args, **kwargs):
                global left
                left -= 1
                # Odd points die before the act, even ones after it; no buffer is flushed.
                if left < 0 and point % 2:
                    os._exit(9)
                result = function(*args, **kwargs)
                if left < 0:
                    os._exit(9)
                return result
            return call
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        prepare(root, out)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), status
    prepare(root, out)
    if status == 0:
        break
print(point)
"""


def test_a_prepare_killed_at_any_disk_operation_ends_in_the_same_bytes(tmp_path, undisturbed):
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path / "root"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    num_points = int(done.stdout)
    assert num_points > 25
    for point in range(num_points + 1):
        assert contents(tmp_path / str(point)) == undisturbed, point


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: os.truncate(partial / "journal.jsonl", 100),
        lambda partial: (partial / "journal.jsonl").write_bytes(b""),
        lambda partial: (partial / "journal.jsonl").open("ab").write(b'{"reason": "", "sha'),
        lambda partial: (partial / "journal.jsonl").open("ab").write(b"[]\n"),
        lambda partial: os.truncate(partial / "signals.npy", 30_000),
        lambda partial: os.truncate(partial / "signals.npy", 0),
        lambda partial: (partial / "signals.npy").open("ab").write(b"x" * 30_000),
        lambda partial: (partial / "signals.npy").open("r+b").write(b"x" * 30_000),
        lambda partial: (partial / "signals.npy").unlink(),
        lambda partial: (partial / "journal.jsonl").unlink(),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_damaged_journal_is_believed_only_as_far_as_it_is_sound(
    tmp_path, undisturbed, monkeypatch, damage
):
    root, out = tmp_path / "root", tmp_path / "store"
    with monkeypatch.context() as patch:
        interrupted(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, out)
    damage(out / "partial")
    prepare(root, out)
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    "arguments",
    [{"labels": "super"}, {"min_likelihood": 50}, {"band_pass": (1.0, 40.0)}, {"rate": 500}],
    ids=str,
)
def test_another_command_does_not_touch_unfinished_or_finished_work(
    tmp_path, undisturbed, monkeypatch, arguments
):
    root, out = tmp_path / "root", tmp_path / "store"
    with monkeypatch.context() as patch:
        interrupted(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, out)
    before = contents(out)
    name = next(iter(arguments)).replace("rate", "rate_hz").replace("band_pass", "band_pass_hz")
    with pytest.raises(UserError, match=f"unfinished work of other arguments.*{name} was"):
        prepare(root, out, **arguments)
    assert contents(out) == before
    prepare(root, out)
    with pytest.raises(UserError, match=f"finished store of other arguments.*{name} was"):
        prepare(root, out, **arguments)
    assert contents(out) == undisturbed


def test_another_table_is_another_command(tmp_path, undisturbed):
    with open(tmp_path / "root" / "ptbxl_database.csv", "a") as stream:
        stream.write("\n")
    with pytest.raises(UserError, match=r"another table in the source"):
        prepare(tmp_path / "root", tmp_path / "undisturbed")


def test_a_finished_store_returns_at_once(tmp_path, undisturbed, monkeypatch):
    interrupted(monkeypatch, 0)
    assert prepare(tmp_path / "root", tmp_path / "undisturbed").num_records == 11
    assert contents(tmp_path / "undisturbed") == undisturbed


def test_a_finished_store_with_a_flipped_bit_is_not_taken_for_done(tmp_path, undisturbed):
    labels = tmp_path / "undisturbed" / "labels.npy"
    data = bytearray(labels.read_bytes())
    data[-1] ^= 1
    labels.write_bytes(data)
    with pytest.raises(UserError, match=r"labels\.npy is damaged.*remove the store and prepare"):
        prepare(tmp_path / "root", tmp_path / "undisturbed")


def test_a_folder_with_other_things_is_not_touched(tmp_path, make_root):
    root = make_root(tmp_path / "root")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and no store"):
        prepare(root, tmp_path / "store")
    with pytest.raises(UserError, match="is not empty and no store"):
        prepare(root, root)
    with pytest.raises(UserError, match="is a file"):
        prepare(root, root / "README.md")
    assert contents(tmp_path / "store") == {"thesis.tex": b"x"}


def test_two_processes_do_not_prepare_one_store(tmp_path, undisturbed, monkeypatch):
    import fcntl

    root, out = tmp_path / "root", tmp_path / "store"
    with monkeypatch.context() as patch:
        interrupted(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, out)
    with open(out / "partial" / "command.json", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(root, out)
    prepare(root, out)
    assert contents(out) == undisturbed


def test_the_journal_says_what_was_done(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "root", tmp_path / "store")
    lines = (tmp_path / "store" / "partial" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert "cannot be read" in json.loads(lines[5])["reason"]
