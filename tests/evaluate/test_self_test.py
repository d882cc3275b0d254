"""The measures see what they declare on simulated records, and the self-test would tell if not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import figures, physiology, privacy
from sssd_hpc.evaluate.comparison import Measure, Side
from sssd_hpc.evaluate.damage import FIDELITY
from sssd_hpc.evaluate.features import FEATURES
from sssd_hpc.evaluate.relations import RELATIONS
from sssd_hpc.evaluate.self_test import judge, self_test, simulated_sides

DOSES = (0.25, 0.5, 1.0)
DECLARED = tuple(name for name in FIDELITY if name not in ("foreign_lead", "flat_lead"))
"""Damages that measures of features and signals declare; the other two are physiology's."""


def measure(name: str = "level", sees: tuple[str, ...] = ("noise",), better="lower", compute=None):
    return Measure(name, "a number", "", better, sees, compute or spread_gap)


def spread_gap(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    return abs(float(candidate.signals_mv.std() - reference.signals_mv.std()))


def copies_in(training: Side):
    known = {record.tobytes() for record in training.signals_mv}

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        return float(np.mean([record.tobytes() in known for record in candidate.signals_mv]))

    return compute


def features(signals: np.ndarray) -> np.ndarray:
    return signals.std(axis=2).astype(np.float64)


def side(count: int = 40, seed: int = 0) -> Side:
    generator = np.random.default_rng(seed)
    signals = generator.normal(0, 0.3, (count, 12, 100)).astype(np.float32)
    labels = np.eye(2, dtype=int)[generator.integers(0, 2, count)]
    return Side(signals, labels, features(signals), 100)


@pytest.fixture(scope="module")
def simulated():
    """Held-out and training records, and features, as the self-test makes them."""
    return simulated_sides()


@pytest.fixture(scope="module")
def whole(simulated):
    """The self-test as users get it, of features, signals and a finder of planted copies."""
    heldout, training, extract = simulated
    finder = measure("copies", ("exact_copies",), compute=copies_in(training))
    measures = (*FEATURES, *RELATIONS, finder)
    return self_test(measures, heldout, training, extract, damages=DECLARED)


def test_every_measure_sees_what_it_declares_and_none_sees_faithful_copies(whole):
    assert whole.failures == []


def test_every_damage_is_seen_by_a_measure_that_declares_it(whole):
    for damage in DECLARED:
        seen = [name for name in whole.measures if whole.cell(name, damage).status == "seen"]
        assert seen, damage
    assert whole.cell("copies", "exact_copies").least_dose == 0.25
    assert whole.cell("frechet_by_label", "label_shuffle").status == "seen"


def test_what_compares_whole_sets_does_not_move_when_labels_do(whole):
    for name in whole.measures:
        if name != "frechet_by_label":
            assert whole.cell(name, "label_shuffle").shifts == (0, 0, 0, 0), name


def test_a_picture_and_json_hold_the_whole_matrix(whole, tmp_path):
    figures.self_test_matrix(whole).savefig(tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 10_000
    again = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert len(again["cells"]) == len(whole.measures) * len(DECLARED)
    assert again["failures"] == []
    assert again["cells"][0]["measure"] == "frechet"


def test_every_measure_declares_a_damage():
    for one in (*FEATURES, *RELATIONS, *physiology.MEASURES, *privacy.MEASURES):
        assert one.sees, one.name


def test_physiology_sees_what_it_declares(simulated):
    heldout, training, extract = simulated
    measures = physiology.MEASURES
    tested = self_test(
        measures, heldout, training, extract, damages=FIDELITY, doses=(1.0,), repeats=3
    )
    assert tested.failures == []


def test_a_measure_that_misses_a_declared_damage_fails():
    blind = measure("blind", ("noise", "lead_swap"), compute=lambda *_: 1.0)
    result = self_test([blind], side(), side(seed=1), features)
    assert [cell.status for cell in result.cells].count("missed") == 2
    assert result.failures[0].startswith("blind must see noise: at dose 1 it is worse by 0.0")


def test_a_measure_of_the_wrong_direction_fails():
    result = self_test([measure(better="higher")], side(), side(seed=1), features)
    assert "level must see noise" in result.failures[0]
    sees_nothing = [measure(better="higher", sees=())]
    result = self_test(sees_nothing, side(), side(seed=1), features)
    assert result.cell("level", "noise").status == "called better"
    assert result.failures == []


def test_a_measure_that_sees_copies_without_declaring_them_fails():
    training = side(seed=1)
    finder = measure("finder", (), compute=copies_in(training))
    result = self_test([finder], side(), training, features)
    assert result.cell("finder", "exact_copies").status == "forbidden"
    assert "finder sees exact_copies, which are faithful" in result.failures[0]


def test_a_measure_that_is_undefined_where_it_must_see_fails():
    def undefined(candidate, reference, generator):
        return math.nan

    result = self_test([measure(compute=undefined)], side(), side(seed=1), features)
    assert result.failures == ["level is undefined for noise, which it must see"]
    assert result.to_json()["cells"][0]["shifts"] == [None] * 4
    figures.self_test_matrix(result)


@pytest.mark.parametrize(
    ("damaged", "status", "least_dose"),
    [
        ([[2, 5, 9], [3, 6, 8], [2, 6, 9]], "seen", 0.5),
        ([[8, 8, 9], [9, 8, 8], [8, 9, 9]], "seen", 0.25),
        # Worse at first, then better again by more than the repeats scatter.
        ([[9, 9, 5], [9, 8, 5], [8, 9, 5]], "missed", 0.25),
        # One repeat lies within what undamaged sets give.
        ([[2, 5, 9], [3, 6, 2], [2, 6, 9]], "missed", None),
        ([[1, 2, 3], [2, 1, 2], [3, 2, 1]], "missed", None),
        # A better dose between two worse ones: not seen from the first on.
        ([[9, 2, 9], [9, 2, 9], [9, 2, 9]], "missed", 1.0),
    ],
)
def test_seen_is_worse_beyond_every_undamaged_repeat_and_rising(damaged, status, least_dose):
    undamaged = np.array([[1.0], [2.0], [3.0]])
    cell = judge(measure(), "noise", undamaged, np.array(damaged, float), DOSES)
    assert (cell.status, cell.least_dose) == (status, least_dose)
    assert bool(cell.detail) == (status == "missed")
    higher = judge(measure(better="higher"), "noise", -undamaged, -np.array(damaged, float), DOSES)
    assert (higher.status, higher.least_dose, higher.shifts) == (status, least_dose, cell.shifts)


def test_bad_questions_are_refused_in_one_line():
    for doses in ((), (0.0, 1.0), (1.0, 0.5), (0.5, 1.5), (0.5, 0.5)):
        with pytest.raises(UserError, match="they must rise within 0 to 1"):
            self_test([measure()], side(), side(), features, doses=doses)
    with pytest.raises(UserError, match="at least 3 are needed"):
        self_test([measure()], side(), side(), features, repeats=2)
    with pytest.raises(UserError, match="declares 'rust'; use noise"):
        self_test([replace(measure(), sees=("rust",))], side(), side(), features)
