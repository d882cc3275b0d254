"""The folder that a set is made in: claimed once, by one request, however many come at once."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.files import BusyError
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.names import MANIFEST_FILE, REQUEST_FILE
from sssd_hpc.generate.root import claim, damaged, locked, read_back, shard_locked

from .conftest import ANY_REQUEST

MANIFEST = Manifest(
    ecg_id=np.array([1]),
    strat_fold=np.array([9]),
    labels=np.array([[1, 0]]),
    label_names=("MI", "XYZ"),
    rate_hz=100,
)
REQUEST = dataclasses.replace(ANY_REQUEST, manifest_sha256=MANIFEST.sha256())


def test_a_root_claimed_twice_by_the_same_request_stays_its_own(tmp_path: Path) -> None:
    claim(tmp_path / "out", MANIFEST, REQUEST)
    before = (tmp_path / "out" / REQUEST_FILE).read_bytes()
    claim(tmp_path / "out", MANIFEST, REQUEST)
    assert (tmp_path / "out" / REQUEST_FILE).read_bytes() == before


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Request)])
def test_another_request_is_refused_and_the_difference_named(tmp_path: Path, field: str) -> None:
    claim(tmp_path, MANIFEST, REQUEST)
    value = getattr(REQUEST, field)
    other = {str: "other", int: 99, float: 9.5, tuple: (1,)}[type(value)]
    with pytest.raises(
        UserError, match=rf"{field} .* [(]now .*(repeat that command|go on where).* another --out"
    ):
        claim(tmp_path, MANIFEST, dataclasses.replace(REQUEST, **{field: other}))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="did not write"):
        claim(tmp_path, MANIFEST, REQUEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "out", MANIFEST, REQUEST)


def test_a_claim_killed_at_any_write_is_made_good(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{REQUEST_FILE}-1-abcd").write_text('{"format"')
    claim(tmp_path, MANIFEST, REQUEST)
    assert json.loads((tmp_path / REQUEST_FILE).read_text())["seed"] == 3
    whole = (tmp_path / MANIFEST_FILE).read_bytes()
    (tmp_path / MANIFEST_FILE).unlink()
    claim(tmp_path, MANIFEST, REQUEST)
    assert (tmp_path / MANIFEST_FILE).read_bytes() == whole


def test_a_damaged_request_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / REQUEST_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        claim(tmp_path, MANIFEST, REQUEST)


def test_files_that_differ_from_the_list_or_are_not_in_it_are_damaged(tmp_path: Path) -> None:
    manifest = MANIFEST
    names = sorted({*manifest.files(), "README.md", "RECORDS", "ptbxl_database.csv"})
    names.append("scp_statements.csv")
    assert damaged(tmp_path, manifest) is None
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    sums = tmp_path / "SHA256SUMS.txt"
    sums.write_text("".join(f"{empty} {name}\n" for name in [*names, "../../etc/passwd"]))
    assert damaged(tmp_path, manifest) == set(names)
    (tmp_path / "records100/00000").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text("")
    assert damaged(tmp_path, manifest) == set()
    (tmp_path / "README.md").write_text("changed")
    assert damaged(tmp_path, manifest) == {"README.md"}
    sums.write_text(f"{empty} RECORDS\n")
    assert damaged(tmp_path, manifest) == set(names) - {"RECORDS"}


def test_of_many_that_claim_at_once_one_request_wins(tmp_path: Path) -> None:
    requests = [dataclasses.replace(REQUEST, seed=seed) for seed in (1, 2) for _ in range(8)]
    won: list[int] = []
    start = threading.Barrier(len(requests))

    def come(request: Request) -> None:
        start.wait()
        try:
            claim(tmp_path / "out", MANIFEST, request)
        except UserError as error:
            assert "was begun with seed" in str(error)  # noqa: PT017
        else:
            won.append(request.seed)

    threads = [threading.Thread(target=come, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 8
    assert set(won) == {read_back(tmp_path / "out")[1].seed}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [REQUEST_FILE, MANIFEST_FILE]


def test_a_disk_without_hard_links_can_be_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claim(tmp_path, MANIFEST, REQUEST)
    claim(tmp_path, MANIFEST, REQUEST)
    assert read_back(tmp_path)[1] == REQUEST


EDITS = {
    "a label": ('"labels": ["MI"], ', '"labels": ["XYZ"], '),
    "an unknown label": ('"labels": ["MI"], ', '"labels": ["MII"], '),
    "a seed": ('"seed": 3', '"seed": 4'),
    "a batch": ('"batch": 0', '"batch": 1'),
    "a row away": ('{"record"', '[]\n{"record"'),
    "half a line": ('"batch": 0}', '"bat'),
    "another rate": ('"rate_hz": 100', '"rate_hz": 500'),
    "a name": ("00001_lr", "00002_lr"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused_by_its_hash(tmp_path: Path, edit: str) -> None:
    claim(tmp_path, MANIFEST, REQUEST)
    path = tmp_path / MANIFEST_FILE
    text = path.read_text()
    path.write_text(text.replace(*EDITS[edit]))
    assert path.read_text() != text
    with pytest.raises(UserError, match="is not the manifest that"):
        read_back(tmp_path)
    with pytest.raises(UserError, match="was changed after it was written; remove it"):
        claim(tmp_path, MANIFEST, REQUEST)
    path.unlink()
    claim(tmp_path, MANIFEST, REQUEST)
    assert path.read_text() == text


def test_a_request_of_another_version_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder that sample made"):
        read_back(tmp_path)
    claim(tmp_path, MANIFEST, REQUEST)
    path = tmp_path / REQUEST_FILE
    for old, new in (('"format": 1', '"format": 2'), ('"seed"', '"seeds"')):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=r"format 2|not a request of this version"):
            read_back(tmp_path)
        path.write_text(text)


def test_shards_share_a_root_and_not_a_shard(tmp_path: Path) -> None:
    claim(tmp_path, MANIFEST, REQUEST)
    with (
        locked(tmp_path, shared=True),
        shard_locked(tmp_path, 0, 2),
        locked(tmp_path, shared=True),
        shard_locked(tmp_path, 1, 2),
    ):
        with pytest.raises(BusyError, match="makes shard 0/2 of"), shard_locked(tmp_path, 0, 2):
            pass
        with pytest.raises(BusyError, match="another process is sampling"), locked(tmp_path):
            pass
    with locked(tmp_path), pytest.raises(BusyError), locked(tmp_path, shared=True):
        pass


def test_a_lock_that_is_given_back_in_time_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim(tmp_path, MANIFEST, REQUEST)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    threading.Timer(0.1, free.set).start()
    with caplog.at_level("INFO"), locked(tmp_path, patience_s=60):
        pass
    thread.join()
    assert caplog.text.count("waiting for up to 60 s") == 1
