"""Leads: names, orders, and the arithmetic between 8 and 12."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sssd_hpc.ecg.leads import (
    EIGHT,
    LEADS,
    SSSD_ECG_EIGHT,
    SSSD_ECG_TWELVE,
    canonical,
    positions,
    take,
    to_twelve,
)

PARITY = Path(__file__).parents[1] / "data" / "parity" / "misc.npz"


def consistent_twelve(length: int = 50) -> np.ndarray:
    """Twelve leads (12, L) that obey Einthoven and Goldberger, made from electrode potentials."""
    right, left, foot = np.random.default_rng(3).normal(size=(3, length))
    chest = np.random.default_rng(4).normal(size=(6, length))
    centre = (right + left + foot) / 3
    limbs = [left - right, foot - right, foot - left]
    limbs += [1.5 * (electrode - centre) for electrode in (right, left, foot)]
    return np.stack([*limbs, *chest])


@pytest.mark.parametrize("eight", [EIGHT, SSSD_ECG_EIGHT], ids=["nle", "sssd_ecg"])
def test_twelve_to_eight_to_twelve_is_the_identity(eight):
    twelve = consistent_twelve()
    assert np.allclose(to_twelve(take(twelve, LEADS, eight), eight), twelve, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("eight", "given", "twelve", "expected"),
    [
        (
            SSSD_ECG_EIGHT,
            "in8_ecg_I_V1to6_aVF",
            SSSD_ECG_TWELVE,
            "out12_ecg_I_II_V1to6_III_aVR_aVL_aVF",
        ),
        (EIGHT, "in8_nle_I_aVF_V1to6", LEADS, "out12_nle_standard_order"),
    ],
    ids=["sssd_ecg", "nle"],
)
def test_twelve_leads_equal_the_public_codes(eight, given, twelve, expected):
    with np.load(PARITY) as arrays:
        x, public = arrays[f"leads/{given}"], arrays[f"leads/{expected}"]
    assert np.abs(take(to_twelve(x, eight), LEADS, twelve) - public).max() < 1e-6


def test_einthoven_and_goldberger_hold():
    twelve = to_twelve(np.random.default_rng(0).normal(size=(3, 8, 20)), EIGHT)
    one, two, three, right, left, foot = np.moveaxis(twelve[:, :6], 1, 0)
    assert np.abs(one + three - two).max() < 1e-14
    assert np.abs(right + left + foot).max() < 1e-14
    assert np.abs(left - (one - three) / 2).max() < 1e-14


def test_twelve_leads_are_only_reordered():
    twelve = np.random.default_rng(0).normal(size=(12, 5))
    found = to_twelve(take(twelve, LEADS, SSSD_ECG_TWELVE), SSSD_ECG_TWELVE)
    assert np.array_equal(found, twelve)


def test_the_precision_of_the_signal_is_kept():
    assert to_twelve(np.zeros((2, 8, 4), np.float32), EIGHT).dtype == np.float32


def test_leads_are_found_whatever_their_case_and_order():
    have = ["v6", "aVF", "aVR", "i"]
    x = np.arange(4)[:, None] * np.ones((1, 3))
    assert take(x, have, ["I", "AVR", "avf", "V6"])[:, 0].tolist() == [3, 2, 1, 0]
    assert canonical(" aVL ") == "AVL"


def test_a_missing_lead_is_named():
    with pytest.raises(ValueError, match=r"missing lead\(s\) AVL, V4"):
        positions([name for name in LEADS if name not in ("AVL", "V4")], LEADS)


def test_a_lead_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"lead\(s\) II named twice"):
        positions([*LEADS, "ii"], LEADS)


def test_an_unwanted_lead_may_come_twice():
    assert positions(["X", "X", "I"], ["I"]) == [2]


@pytest.mark.parametrize("leads", [EIGHT[:7], (*EIGHT, "II"), (*EIGHT[:7], "II")], ids=len)
def test_leads_that_do_not_determine_twelve_are_refused(leads):
    with pytest.raises(ValueError, match="lead"):
        to_twelve(np.zeros((len(leads), 4)), leads)


def test_an_array_with_another_number_of_leads_is_refused():
    with pytest.raises(ValueError, match="does not hold the 8 leads"):
        take(np.zeros((7, 4)), EIGHT, ["I"])
