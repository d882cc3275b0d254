"""Proof of completeness: nothing missing, nothing doubled, nothing foreign."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg.wfdb_io import write_record
from sssd_hpc.errors import UserError
from sssd_hpc.generate.manifest import Manifest
from sssd_hpc.generate.merge import merge, prove

from .conftest import ANY_REQUEST

MANIFEST = Manifest(
    ecg_id=np.array([3, 1500]),
    strat_fold=np.array([9, 10]),
    labels=np.array([[1, 0], [0, 0]]),
    label_names=("MI", "XYZ"),
    rate_hz=100,
)
REQUEST = dataclasses.replace(ANY_REQUEST, folds=(9, 10), manifest_sha256=MANIFEST.sha256())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for row in range(2):
        path = tmp_path / MANIFEST.name(row)
        path.parent.mkdir(parents=True)
        adc = np.arange(12 * 20, dtype=np.int16).reshape(12, 20) + row
        write_record(path.parent, path.name, adc, 100, REQUEST.comments(MANIFEST.codes(row)))
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_merging_twice_changes_nothing(root: Path) -> None:
    merge(root, MANIFEST, REQUEST, "card\n")
    once = contents(root)
    merge(root, MANIFEST, REQUEST, "card\n")
    assert contents(root) == once
    assert (root / "README.md").read_text() == "card\n"
    rows = (root / "scp_statements.csv").read_text().splitlines()
    assert any(row.startswith("MI,") for row in rows)
    assert any(row.startswith("XYZ,") for row in rows)


@pytest.mark.parametrize("suffix", ["hea", "dat"])
def test_a_missing_file_is_named_and_nothing_is_finished(root: Path, suffix: str) -> None:
    (root / f"records100/01000/01500_lr.{suffix}").unlink()
    with pytest.raises(
        UserError, match="lacks 1 of 2 records, the first records100/01000/01500_lr"
    ):
        merge(root, MANIFEST, REQUEST, "card\n")
    assert not (root / "SHA256SUMS.txt").exists()


def test_a_record_with_other_labels_is_not_this_manifests(root: Path) -> None:
    header = root / "records100/00000/00003_lr.hea"
    header.write_text(header.read_text().replace("labels: MI", "labels: none"))
    with pytest.raises(UserError, match="lacks 1 of 2"):
        prove(root, MANIFEST, REQUEST)


def test_a_record_that_was_never_asked_for_is_named(root: Path) -> None:
    shutil.copytree(root / "records100", root / "records500")
    with pytest.raises(UserError, match=r"records500/00000/00003_lr\.dat and 3 more"):
        prove(root, MANIFEST, REQUEST)


def test_what_killed_processes_left_is_removed(root: Path) -> None:
    (root / "records100/00000/.tmp-00003_lr.dat-1-abcd").write_bytes(b"")
    (root / ".tmp-.manifest.jsonl-1-abcd").write_bytes(b"")
    (root / ".shards").mkdir()
    (root / ".shards/00000-of-00001.json").write_text("{}")
    prove(root, MANIFEST, REQUEST)
    assert len(list(root.rglob(".*"))) == 3
    merge(root, MANIFEST, REQUEST, "card\n")
    assert not list(root.rglob(".*"))
