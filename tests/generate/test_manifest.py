"""The table of records to make and the request that owns an output root."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.generate.manifest import REQUEST_FILE, Request, build, claim, damaged

REQUEST = Request(
    model_sha256="a" * 64,
    weights="ema",
    sampler="ddpm",
    steps=5,
    guidance=0.0,
    seed=3,
    batch_size=4,
    folds=(1, 2),
    manifest_sha256="b" * 64,
    device="cpu",
)


def store(ecg_id: list[int], folds: list[int], rate_hz: int = 100) -> Any:
    labels = np.arange(2 * len(ecg_id)).reshape(-1, 2) % 3 % 2
    return SimpleNamespace(
        path=Path("STORE"),
        ecg_id=np.array(ecg_id),
        strat_fold=np.array(folds),
        rate_hz=rate_hz,
        label_names=("AFIB", "NORM"),
        indices=lambda chosen: np.flatnonzero(np.isin(folds, chosen)),
        labels_of=lambda rows: labels[rows],
    )


def test_rows_are_the_records_of_the_folds_by_ascending_id() -> None:
    manifest = build(store([30, 10, 20, 40], [1, 2, 2, 3]), folds=(1, 2))
    assert manifest.ecg_id.tolist() == [10, 20, 30]
    assert manifest.strat_fold.tolist() == [2, 2, 1]
    assert manifest.labels.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert [manifest.codes(row) for row in range(3)] == [(), ("AFIB",), ("NORM",)]


@pytest.mark.parametrize(
    ("ecg_id", "rate_hz", "name"),
    [
        (1, 100, "records100/00000/00001_lr"),
        (12345, 500, "records500/12000/12345_hr"),
        (21837, 100, "records100/21000/21837_lr"),
        (1234567, 100, "records100/1234000/1234567_lr"),
    ],
)
def test_record_names_follow_ptb_xl(ecg_id: int, rate_hz: int, name: str) -> None:
    assert build(store([ecg_id], [1], rate_hz), folds=(1,)).name(0) == name


def test_no_patient_has_two_records_or_a_number_of_ptb_xl() -> None:
    manifest = build(store([1, 2, 21837], [1, 2, 10]), folds=range(1, 11))
    patients = [int(manifest.patient_id(row)) for row in range(3)]
    assert len(set(patients)) == 3
    assert min(patients) > 10_000_000


def test_every_row_is_in_one_batch_at_a_fixed_place() -> None:
    manifest = build(store(list(range(10)), [1] * 10), folds=(1,))
    assert [batch.tolist() for batch in manifest.batches(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_the_hash_changes_with_any_column() -> None:
    manifest = build(store([1, 2], [1, 2]), folds=(1, 2))
    changed = [
        dataclasses.replace(manifest, ecg_id=manifest.ecg_id + 1),
        dataclasses.replace(manifest, strat_fold=manifest.strat_fold + 1),
        dataclasses.replace(manifest, labels=1 - manifest.labels),
        dataclasses.replace(manifest, label_names=("AFIB", "SR")),
        dataclasses.replace(manifest, rate_hz=500),
    ]
    assert len({manifest.sha256(), *(each.sha256() for each in changed)}) == 6


@pytest.mark.parametrize(
    ("ecg_id", "folds", "match"),
    [([1], [2], "no record in the folds"), ([1, 1], [1, 1], "twice"), ([-1], [1], "below 0")],
)
def test_a_store_that_cannot_name_records_is_refused(
    ecg_id: list[int], folds: list[int], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        build(store(ecg_id, folds), folds=(1,))


def test_a_label_that_no_header_can_hold_is_refused() -> None:
    like = store([1], [1])
    like.label_names = ("AFIB", "N\u00d6RM")
    with pytest.raises(UserError, match="not plain ASCII"):
        build(like, folds=(1,))


def test_a_root_claimed_twice_by_the_same_request_stays_its_own(tmp_path: Path) -> None:
    claim(tmp_path / "out", REQUEST)
    before = (tmp_path / "out" / REQUEST_FILE).read_bytes()
    claim(tmp_path / "out", REQUEST)
    assert (tmp_path / "out" / REQUEST_FILE).read_bytes() == before


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Request)])
def test_another_request_is_refused_and_the_difference_named(tmp_path: Path, field: str) -> None:
    claim(tmp_path, REQUEST)
    value = getattr(REQUEST, field)
    other = {str: "other", int: 99, float: 9.5, tuple: (1,)}[type(value)]
    with pytest.raises(
        UserError, match=rf"{field} .* [(]now .*repeat that command .* another --out"
    ):
        claim(tmp_path, dataclasses.replace(REQUEST, **{field: other}))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="did not write"):
        claim(tmp_path, REQUEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        claim(tmp_path / "out", REQUEST)


def test_a_claim_killed_while_writing_is_made_good(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{REQUEST_FILE}-1-abcd").write_text('{"format"')
    claim(tmp_path, REQUEST)
    assert [path.name for path in tmp_path.iterdir()] == [REQUEST_FILE]
    assert json.loads((tmp_path / REQUEST_FILE).read_text())["seed"] == 3


def test_a_damaged_request_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / REQUEST_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        claim(tmp_path, REQUEST)


def test_files_that_differ_from_the_list_or_are_not_in_it_are_damaged(tmp_path: Path) -> None:
    manifest = build(store([1], [1]), folds=(1,))
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


def test_header_comments_name_no_person_and_no_path() -> None:
    text = "\n".join(REQUEST.comments(("AFIB", "NORM")))
    assert "synthetic" in text
    assert "AFIB NORM" in text
    assert "seed: 3" in text
    assert "labels: none" in "\n".join(REQUEST.comments(()))
    assert "/" not in text
