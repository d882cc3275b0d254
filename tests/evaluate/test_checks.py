from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import checks

StoreMaker = Callable[..., Store]


@pytest.fixture
def sides(make_store: StoreMaker) -> tuple[Store, Store]:
    return make_store("real", num_records=40), make_store("synthetic", num_records=40, seed=1)


def test_honest_stores_pass_every_check(sides: tuple[Store, Store]) -> None:
    findings = checks.check(*sides)
    assert len(findings) == 6
    assert all(finding.ok for finding in findings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate_hz": 500}, "sampling rates"),
        ({"label_names": ["NORM", "MI"]}, "label names"),
    ],
)
def test_stores_that_do_not_fit_are_refused_even_if_leakage_is_allowed(
    sides: tuple[Store, Store], change: dict[str, object], message: str
) -> None:
    real, synthetic = sides
    other = dataclasses.replace(synthetic, manifest={**synthetic.manifest, **change})
    with pytest.raises(UserError, match=f"the {message}.* differ.*run `prepare`"):
        checks.check(real, other, allow_leakage=True)


def test_records_of_another_length_are_refused_at_once(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    short = dataclasses.replace(synthetic, signals=synthetic.signals[..., :300])
    with pytest.raises(UserError, match=r"samples a record differ: \d+ in real, 300 in"):
        checks.check(real, short)


def _copied(into: Store, row: int, signals: np.ndarray) -> Store:
    changed = np.array(into.signals)
    changed[row] = signals
    return dataclasses.replace(into, signals=changed)


def test_a_planted_copy_of_a_real_record_is_named(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    planted = _copied(synthetic, 7, real.signals[30])
    with pytest.raises(UserError, match=r"1 synthetic record.*ecg_id 8 copies real ecg_id 31"):
        checks.check(real, planted)


def test_a_copy_made_through_eight_leads_is_found(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    copy = np.array(real.signals[30])
    derived = [LEADS.index(lead) for lead in LEADS if lead not in EIGHT]
    copy[derived] += 1
    with pytest.raises(UserError, match="copies real ecg_id 31"):
        checks.check(real, _copied(synthetic, 7, copy))


def test_allowed_leakage_is_reported(
    sides: tuple[Store, Store], caplog: pytest.LogCaptureFixture
) -> None:
    real, synthetic = sides
    planted = _copied(synthetic, 7, real.signals[30])
    findings = checks.check(real, planted, allow_leakage=True)
    assert [finding.ok for finding in findings].count(False) == 1
    assert "leakage allowed: 1 synthetic record" in caplog.text


@pytest.mark.parametrize("side", [0, 1])
def test_a_patient_in_two_folds_is_refused(sides: tuple[Store, Store], side: int) -> None:
    changed = list(sides)
    patients = np.array(sides[side].patient_id)
    # Rows 0 and 9 stand in folds 1 and 10.
    patients[9] = patients[0]
    changed[side] = dataclasses.replace(sides[side], patient_id=patients)
    with pytest.raises(UserError, match=r"1 (real|synthetic) patient.*ecg_id 1, 10"):
        checks.check(changed[0], changed[1])


def test_a_patient_with_two_records_in_one_fold_is_welcome(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    patients = np.array(real.patient_id)
    patients[10] = patients[0]
    assert checks.check(dataclasses.replace(real, patient_id=patients), synthetic)


def test_a_test_record_repeated_in_training_is_refused(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    with pytest.raises(UserError, match=r"1 real waveform.*ecg_id 1 and 10"):
        checks.check(_copied(real, 0, real.signals[9]), synthetic)


def test_a_waveform_repeated_among_training_folds_is_counted_only(
    sides: tuple[Store, Store],
) -> None:
    real, synthetic = sides
    findings = checks.check(_copied(real, 0, real.signals[1]), synthetic)
    assert "1 repeated inside one of them" in [finding.detail for finding in findings]


def test_flat_records_are_no_copies_of_each_other(sides: tuple[Store, Store]) -> None:
    real, synthetic = sides
    flat = np.zeros_like(real.signals[0])
    twice = _copied(_copied(real, 0, flat), 9, flat)
    assert all(finding.ok for finding in checks.check(twice, _copied(synthetic, 3, flat)))
