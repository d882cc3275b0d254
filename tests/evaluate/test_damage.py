"""Damages do what they say, at the dose they are given, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.comparison import Side
from sssd_hpc.evaluate.damage import DAMAGES, NOISE_MV

DESIGNED = (
    "noise", "mode_drop", "label_shuffle", "lead_swap", "mean_collapse", "time_reversal",
    "double_speed", "foreign_lead", "flat_lead", "exact_copies", "noisy_copies", "scaled_copies",
    "shifted_copies", "disguised_copies",
)  # fmt: skip


def side(count: int = 40, seed: int = 0) -> Side:
    """Records that keep Einthoven's and Goldberger's laws, and sines of 5 Hz in V1."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0, 0.3, (count, 12, 200)).astype(np.float32)
    one, two = x[:, 0], x[:, 1]
    x[:, 2], x[:, 3], x[:, 4], x[:, 5] = two - one, -(one + two) / 2, one - two / 2, two - one / 2
    x[:, 6] = np.sin(2 * np.pi * 5 * np.arange(200) / 100)
    labels = np.zeros((count, 2), int)
    labels[: count // 4, 0] = 1
    labels[:, 1] = 1 - labels[:, 0]
    return Side(x, labels, np.zeros((count, 1)), 100)


def damaged(name: str, dose: float, seed: int = 0):
    candidate, training = side(), side(50, seed=1)
    generator = np.random.default_rng(seed)
    return (*DAMAGES[name].apply(candidate, training, dose, generator), candidate, training)


def test_every_damage_of_the_design_is_there():
    assert tuple(DAMAGES) == DESIGNED


@pytest.mark.parametrize("name", DAMAGES)
def test_a_dose_of_zero_changes_nothing_and_a_dose_never_changes_its_input(name):
    signals, labels, candidate, _ = damaged(name, 0.0)
    np.testing.assert_allclose(signals, candidate.signals_mv, atol=1e-6)
    np.testing.assert_array_equal(labels, candidate.labels)
    signals, labels, candidate, training = damaged(name, 1.0)
    np.testing.assert_array_equal(candidate.signals_mv, side().signals_mv)
    np.testing.assert_array_equal(candidate.labels, side().labels)
    np.testing.assert_array_equal(training.signals_mv, side(50, seed=1).signals_mv)
    assert signals.dtype == np.float32
    assert signals.shape == candidate.signals_mv.shape
    assert labels.shape == candidate.labels.shape
    changed = (signals != candidate.signals_mv).any() or (labels != candidate.labels).any()
    assert changed
    again, _, _, _ = damaged(name, 1.0)
    np.testing.assert_array_equal(signals, again)


@pytest.mark.parametrize(
    "name",
    [
        "lead_swap",
        "time_reversal",
        "double_speed",
        "foreign_lead",
        "flat_lead",
        "exact_copies",
        "disguised_copies",
    ],
)
def test_a_higher_dose_spoils_the_same_records_and_more(name):
    def spoiled(dose):
        signals, _, candidate, _ = damaged(name, dose)
        return set(np.flatnonzero((signals != candidate.signals_mv).any(axis=(1, 2))))

    quarter, half = spoiled(0.25), spoiled(0.5)
    assert (len(quarter), len(half), len(spoiled(1.0))) == (10, 20, 40)
    assert quarter < half


@pytest.mark.parametrize("name", ["noise", "lead_swap", "mean_collapse", "time_reversal"])
def test_the_limb_leads_still_depend_on_one_another(name):
    x, _, _, _ = damaged(name, 1.0)
    lead = dict(zip(LEADS, x.swapaxes(0, 1), strict=True))
    np.testing.assert_allclose(lead["III"], lead["II"] - lead["I"], atol=1e-5)
    np.testing.assert_allclose(lead["AVR"], -(lead["I"] + lead["II"]) / 2, atol=1e-5)
    np.testing.assert_allclose(lead["AVL"], lead["I"] - lead["II"] / 2, atol=1e-5)
    np.testing.assert_allclose(lead["AVF"], lead["II"] - lead["I"] / 2, atol=1e-5)


def test_noise_has_the_power_of_its_dose():
    signals, _, candidate, _ = damaged("noise", 0.5)
    added = (signals - candidate.signals_mv)[:, 6:]
    # 48,000 samples: three standard errors are 1 %.
    assert added.std() == pytest.approx(0.5 * NOISE_MV, rel=0.01)


def test_mode_drop_leaves_the_commonest_kind_and_the_labels_that_were_asked_for():
    signals, labels, candidate, _ = damaged("mode_drop", 1.0)
    common = {record.tobytes() for record in candidate.signals_mv[10:]}
    assert all(record.tobytes() in common for record in signals)
    np.testing.assert_array_equal(labels, candidate.labels)
    half, _, _, _ = damaged("mode_drop", 0.5)
    assert sum(record.tobytes() not in common for record in half) == 5
    alike = Side(candidate.signals_mv, np.ones((40, 2), int), candidate.features, 100)
    with pytest.raises(UserError, match="no kind of record can be dropped"):
        DAMAGES["mode_drop"].apply(alike, alike, 1.0, np.random.default_rng(0))


def test_shuffled_labels_are_the_same_labels():
    signals, labels, candidate, _ = damaged("label_shuffle", 1.0)
    np.testing.assert_array_equal(labels.sum(axis=0), candidate.labels.sum(axis=0))
    np.testing.assert_array_equal(signals, candidate.signals_mv)


def test_reversed_electrodes_move_leads_as_on_a_patient():
    x, _, candidate, _ = damaged("lead_swap", 1.0)
    was = dict(zip(LEADS, candidate.signals_mv.swapaxes(0, 1), strict=True))
    now = dict(zip(LEADS, x.swapaxes(0, 1), strict=True))
    np.testing.assert_array_equal(now["I"], -was["I"])
    for one, other in (("II", "III"), ("AVR", "AVL"), ("V1", "V6"), ("V3", "V4")):
        np.testing.assert_array_equal(now[one], was[other])
        np.testing.assert_array_equal(now[other], was[one])
    np.testing.assert_array_equal(now["AVF"], was["AVF"])


def test_collapse_ends_in_one_record():
    signals, _, candidate, _ = damaged("mean_collapse", 1.0)
    mean = candidate.signals_mv.mean(axis=0)
    np.testing.assert_allclose(signals, np.broadcast_to(mean, signals.shape), atol=1e-6)


def test_backwards_twice_is_forwards_and_double_speed_doubles_frequency():
    signals, _, candidate, _ = damaged("time_reversal", 1.0)
    np.testing.assert_array_equal(signals[:, :, ::-1], candidate.signals_mv)
    signals, _, _, _ = damaged("double_speed", 1.0)
    spectrum = np.abs(np.fft.rfft(signals[0, 6]))
    assert spectrum.argmax() * 100 / 200 == 10


def test_a_foreign_lead_breaks_the_laws_and_a_lost_one_is_flat():
    signals, _, candidate, _ = damaged("foreign_lead", 1.0)
    one, two, three = (signals[:, k] for k in range(3))
    assert np.abs(three - (two - one)).max(axis=1).min() > 0.1
    assert sorted(x.tobytes() for x in one) == sorted(
        x.tobytes() for x in candidate.signals_mv[:, 0]
    )
    np.testing.assert_array_equal(signals[:, 1:], candidate.signals_mv[:, 1:])
    signals, _, candidate, _ = damaged("flat_lead", 0.5)
    assert (np.ptp(signals[:, 1], axis=1) == 0).sum() == 20


def test_planted_copies_are_training_records_with_their_labels():
    signals, labels, _, training = damaged("exact_copies", 0.5)
    known = {
        record.tobytes(): row
        for record, row in zip(training.signals_mv, training.labels, strict=True)
    }
    copies = [at for at, record in enumerate(signals) if record.tobytes() in known]
    assert len(copies) == len({signals[at].tobytes() for at in copies}) == 20
    for at in copies:
        np.testing.assert_array_equal(labels[at], known[signals[at].tobytes()])
