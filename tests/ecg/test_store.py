"""The store: what it gives, and what it refuses to open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.store import FILES, Store
from sssd_hpc.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root_maker) -> Path:
    """One store for the module; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("store")
    root = root_maker(folder / "root")
    prepare(root, folder / "store")
    return folder / "store"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "store"))


def edit_manifest(path: Path, **fields: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def resize(path: Path, name: str, data: bytes) -> None:
    """Replace a file and let the manifest agree about its size."""
    (path / name).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name]["bytes"] = len(data)
    edit_manifest(path, files=files)


def test_a_store_tells_what_it_holds(finished):
    store = Store.open(finished, verify=True)
    assert (store.num_records, store.length, store.rate_hz) == (12, 1000, 100)
    assert store.lead_names == LEADS
    assert len(store.label_names) == 71
    assert store.ecg_id.tolist() == list(range(1, 13))
    assert store.patient_id.tolist() == [str(1000 + number) for number in range(1, 13)]
    assert store.strat_fold.tolist() == [*range(1, 11), 1, 2]
    assert list(store.scp_codes[0]) == ["AFIB"]
    assert store.scp_codes[3] == {"NORM": 100.0, "SR": 0.0}
    assert store.flags == ((),) * 12
    assert isinstance(store.signals, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.signals[0, 0, 0] = 1


def test_records_are_picked_by_fold_and_lead_name(finished, signal_of):
    store = Store.open(finished)
    indices = store.indices((2, 10))
    assert (indices.tolist(), indices.dtype) == ([1, 9, 11], np.int64)
    assert store.indices(()).tolist() == []
    found = store.signals_mv(indices, EIGHT)
    assert (found.shape, found.dtype) == ((3, 8, 1000), np.float32)
    expected = signal_of(10)[[LEADS.index(lead) for lead in EIGHT]]
    assert np.array_equal(np.rint(found[1] * 1000), expected)
    assert np.array_equal(found, store.signals_mv(indices, LEADS)[:, [0, 5, *range(6, 12)]])
    assert store.signals_mv([], EIGHT).shape == (0, 8, 1000)
    labels = store.labels_of(indices)
    assert (labels.shape, labels.dtype) == ((3, 71), np.int64)
    assert [store.label_names[k] for k in np.flatnonzero(labels[0])] == ["IMI", "PVC"]


def test_a_lead_that_does_not_exist_is_refused(finished):
    with pytest.raises(ValueError, match="missing lead"):
        Store.open(finished).signals_mv([0], ["V7"])


def test_hashes_tell_copies(finished):
    hashes = Store.open(finished).waveform_hashes()
    assert len(set(hashes)) == 12


def test_no_store_is_an_error(tmp_path):
    with pytest.raises(UserError, match="absent"):
        Store.open(tmp_path / "absent")
    with pytest.raises(UserError, match="give the folder that prepare wrote"):
        Store.open(tmp_path)
    (tmp_path / "partial").mkdir()
    with pytest.raises(UserError, match="run the same prepare again"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Store.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(data) - 1} bytes"):
        Store.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_by_verifying(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        Store.open(copy, verify=True)


@pytest.mark.parametrize("name", ["signals.npy", "labels.npy"])
@pytest.mark.parametrize("kind", ["pickle", "objects", "zip", "garbage", "shape", "dtype"])
def test_an_array_file_of_another_kind_is_refused_unpickled(copy, tmp_path, name, kind):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    target = tmp_path / "bad.npy"
    with open(target, "wb") as stream:
        if kind == "pickle":
            import pickle

            pickle.dump(Bomb(), stream)
        elif kind == "objects":
            np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
        elif kind == "zip":
            np.savez(stream, a=np.zeros(3))
        elif kind == "garbage":
            stream.write(b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 500)
        elif kind == "shape":
            np.save(stream, np.zeros((12, 11), np.int16))
        else:
            np.save(stream, np.load(copy / name).astype(np.float32))
    resize(copy, name, target.read_bytes())
    with pytest.raises(UserError, match=name):
        Store.open(copy)
    assert not (tmp_path / "exploded").exists()


def test_an_array_that_claims_more_than_its_file_is_refused(copy):
    data = (copy / "signals.npy").read_bytes()
    resize(copy, "signals.npy", data.replace(b"(12, 12,", b"(99, 12,", 1))
    with pytest.raises(UserError, match="not a plain numpy array"):
        Store.open(copy)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"rate_hz": "100"}, "damaged"),
        ({"num_records": -1}, "damaged"),
        ({"num_records": 13}, "holds"),
        ({"length": 10**30}, "holds"),
        ({"label_names": ["A", "A"]}, "damaged"),
        ({"label_names": []}, "damaged"),
        ({"label_names": ["A"]}, "holds"),
        ({"files": []}, "damaged"),
        ({"files": {}}, "does not list signals.npy"),
        ({"lead_names": list(reversed(LEADS))}, "other leads"),
        ({"gain_per_mv": 200}, "another gain"),
        ({"records_per_fold": {}}, "records in folds"),
    ],
    ids=str,
)
def test_a_manifest_that_disagrees_is_refused(copy, fields, reason):
    edit_manifest(copy, **fields)
    with pytest.raises(UserError, match=reason):
        Store.open(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"format_version": 1}'])
def test_a_manifest_of_another_kind_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Store.open(copy)


def test_labels_other_than_0_and_1_are_refused(copy):
    labels = np.load(copy / "labels.npy")
    labels[0, 0] = 2
    np.save(copy / "labels.npy", labels)
    with pytest.raises(UserError, match="labels are 0 or 1"):
        Store.open(copy)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1,1001,1,", "x,1001,1,"),
        ("1,1001,1,", "1,1001,5,"),
        ('""AFIB""', '""AFIB'),
        ("0.0}", "[]}"),
    ],
)
def test_damaged_record_rows_are_refused(copy, old, new):
    text = (copy / "records.csv").read_text()
    assert old in text
    resize(copy, "records.csv", text.replace(old, new, 1).encode())
    with pytest.raises(UserError, match=r"records\.csv"):
        Store.open(copy)
