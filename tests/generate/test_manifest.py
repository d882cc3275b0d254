"""The table of records to make and the request for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.generate.manifest import build, parse

from .conftest import ANY_REQUEST


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


def test_its_lines_are_read_back_and_say_what_each_record_is() -> None:
    manifest = build(store([30, 10, 20, 40], [1, 2, 2, 3]), folds=(1, 2))
    text = manifest.lines(seed=2**64 - 1, batch_size=2)
    back = parse(text)
    assert back.sha256() == manifest.sha256()
    assert back.lines(2**64 - 1, 2) == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {"format": 1, "records": 3, "rate_hz": 100, "labels": ["AFIB", "NORM"]}
    assert rows[3] == {
        "record": "records100/00000/00030_lr",
        "source_ecg_id": 30,
        "strat_fold": 1,
        "labels": ["NORM"],
        "seed": 2**64 - 1,
        "batch": 1,
    }


def test_a_record_is_found_by_its_number() -> None:
    manifest = build(store([30, 10, 20], [1, 1, 1]), folds=(1,))
    assert [manifest.row_of(ecg_id) for ecg_id in (10, 20, 30)] == [0, 1, 2]
    for absent in (0, 11, 31):
        with pytest.raises(UserError, match=f"no record has the number {absent}; .* 10 to 30"):
            manifest.row_of(absent)


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


def test_header_comments_name_no_person_and_no_path() -> None:
    text = "\n".join(ANY_REQUEST.comments(("AFIB", "NORM")))
    assert "synthetic" in text
    assert "AFIB NORM" in text
    assert "seed: 3" in text
    assert "labels: none" in "\n".join(ANY_REQUEST.comments(()))
    assert "/" not in text
