"""Validation while a run trains: it finds the best checkpoint and disturbs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import Interrupted, UserError
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.generate import sampling
from sssd_hpc.model.checkpoint import read
from sssd_hpc.train import loop, metrics, validation
from sssd_hpc.train.loop import train
from sssd_hpc.train.ranks import Group
from sssd_hpc.train.validation import Validator, Watch, due

from .conftest import make_config, make_store

Row = dict[str, Any]
CONFIG = make_config(samples=24, validate_every=8, checkpoint_every=24)
STORE = make_store(50, folds=10)


@pytest.fixture(autouse=True, scope="module")
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        recipe = Recipe(epochs=1, batch_size=16, num_blocks=(1,), width=4)
        patch.setattr(validation, "RECIPE", recipe)
        yield


@pytest.fixture(scope="module")
def unbroken(_tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validations that nothing disturbs."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    train(CONFIG, STORE, run)
    return run


def rows(run: Path) -> list[Row]:
    """Return the metrics without those that are the machine's."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        for name in ("samples_per_s", "memory_gib"):
            row.pop(name, None)
        row.get("validation", {}).pop("seconds", None)
    return found


def kept(run: Path) -> list[int]:
    return sorted(int(entry.name[8:]) for entry in (run / "checkpoints").iterdir())


def pointed(run: Path) -> int:
    return int((run / "best").read_text().removeprefix("checkpoints/samples-"))


def assert_equal_runs(one: Path, other: Path) -> None:
    """Check that two runs ended alike bit for bit, validations included."""
    assert rows(one) == rows(other)
    assert kept(one) == kept(other)
    assert pointed(one) == pointed(other)
    files = [Path("export", "model.safetensors"), Path("validation", "classifier.safetensors")]
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def let_distances_be(patch: pytest.MonkeyPatch, distances: dict[int, float]) -> None:
    def score(validator: Validator, samples: int, *given: Any) -> Row:
        return {"frechet": distances[samples], "roc_auc": 0.5, "seconds": 0.0}

    patch.setattr(Validator, "score", score)


def at_validation(patch: pytest.MonkeyPatch, samples: int, action: Callable[[], None]) -> None:
    """Act when the records of the validation at this count begin to be drawn."""
    draw = Validator._draw

    def acting(validator: Validator, at: int, *given: Any) -> Any:
        if at == samples:
            action()
        return draw(validator, at, *given)

    patch.setattr(Validator, "_draw", acting)


def test_a_validated_run_trains_what_another_does_bit_for_bit(
    unbroken: Path, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    train(
        dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, validate_every=0)),
        STORE,
        tmp_path,
    )
    export = Path("export", "model.safetensors")
    assert (tmp_path / export).read_bytes() == (unbroken / export).read_bytes()
    assert rows(tmp_path) == [row for row in rows(unbroken) if "loss" in row]
    assert not (tmp_path / "best").exists()
    train(CONFIG, STORE, tmp_path / "validated")
    assert torch.equal(torch.get_rng_state(), state)


def test_each_validation_is_a_line_and_the_last_weights_have_one(unbroken: Path) -> None:
    found = metrics.validations(unbroken / "metrics.jsonl")
    assert list(found) == [8, 16, 24]
    for row in found.values():
        assert set(row) == {"frechet", "roc_auc", "records", "seconds"}
        assert row["records"] == 5
        assert row["frechet"] > 0
        assert 0 <= row["roc_auc"] <= 1
    assert pointed(unbroken) == metrics.best(found)


def test_what_is_validated_is_what_sample_draws(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = validation.draw_signals

    def seen(*given: Any, **options: Any) -> Any:
        drawn.append(draw(*given, **options))
        return drawn[-1]

    monkeypatch.setattr(validation, "draw_signals", seen)
    shutil.copytree(unbroken, tmp_path / "run")
    metrics.truncate(tmp_path / "run" / "metrics.jsonl", 16)
    train(CONFIG, STORE, tmp_path / "run")
    plan = sampling.plan(unbroken, STORE, folds=[9], sampler="dpmpp", eta=1.0)
    ids, labels = plan.manifest.ecg_id, plan.manifest.labels
    expected = sampling.draw_signals(plan.sampler(), ids, labels, seed=0, batch_size=16)
    assert np.array_equal(drawn[0], expected)

    # The numbers by scikit-learn and by the definition, from the classifier that lies in the run.
    validator = Validator(CONFIG, STORE, unbroken, Group())
    device = torch.device("cpu")
    watch = Watch(Group(), device, lambda: False, RuntimeError, lambda doing: None)
    classifier = validator._learned(watch, device)
    scores = classifier.predict(expected)
    truth = STORE.labels_of(STORE.indices([9]))
    both = [k for k in range(2) if 0 < truth[:, k].sum() < 5]
    area = np.mean([roc_auc_score(truth[:, k], scores[:, k]) for k in both])
    row = metrics.validations(unbroken / "metrics.jsonl")[24]
    assert row["roc_auc"] == pytest.approx(area)
    ours = classifier.features(expected)
    theirs = classifier.features(STORE.signals_mv(STORE.indices([9]), list(STORE.lead_names)))
    gap = ours.mean(0) - theirs.mean(0)
    first, second = np.cov(ours.T), np.cov(theirs.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    expected_distance = gap @ gap + np.trace(first) + np.trace(second) - 2 * root
    assert row["frechet"] == pytest.approx(expected_distance, rel=1e-5)


def test_the_best_checkpoint_outlives_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_distances_be(monkeypatch, {8: 3.0, 16: 1.0, 24: 2.0, 32: 1.0, 40: 0.5})
    config = make_config(samples=32, validate_every=8, checkpoint_every=40, keep_checkpoints=1)
    train(config, STORE, tmp_path)
    assert pointed(tmp_path) == 16
    assert kept(tmp_path) == [16, 32]
    assert (tmp_path / "latest").read_text() == "checkpoints/samples-000000032\n"
    assert read(tmp_path / (tmp_path / "best").read_text().strip()).samples == 16
    # A kill between the line and the name: the line decides, and what it beats goes.
    (tmp_path / "best").unlink()
    longer = dataclasses.replace(config.train, samples=40)
    train(dataclasses.replace(config, train=longer), STORE, tmp_path)
    assert pointed(tmp_path) == 40
    assert kept(tmp_path) == [40]


def test_of_checkpoints_that_are_gone_none_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_distances_be(monkeypatch, {8: 1.0, 16: 2.0, 24: 3.0})
    train(CONFIG, STORE, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "samples-000000008")
    shutil.rmtree(tmp_path / "checkpoints" / "samples-000000024")
    train(CONFIG, STORE, tmp_path)
    assert pointed(tmp_path) == 16
    assert [row["samples"] for row in rows(tmp_path) if "validation" in row] == [8, 16, 24]


def test_all_checkpoints_are_kept_if_asked_for(tmp_path: Path) -> None:
    train(make_config(samples=40, keep_checkpoints=0), STORE, tmp_path)
    assert kept(tmp_path) == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("samples", [8, 16, 24])
def test_a_signal_while_drawing_ends_the_run_and_it_goes_on_bit_for_bit(
    unbroken: Path, tmp_path: Path, samples: int
) -> None:
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "EVERY_S", 0.0)
        at_validation(patch, samples, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tick = Watch.tick
        patch.setattr(Watch, "tick", lambda watch, doing: (calls.append(doing), tick(watch, doing)))
        with pytest.raises(Interrupted, match=f"SIGTERM came after {samples} samples, saved"):
            train(CONFIG, STORE, tmp_path)
    # The first meeting after the signal is the last.
    assert calls[-1].startswith("real" if samples == 8 else "0/5 records")
    assert kept(tmp_path)[-1] == samples
    train(CONFIG, STORE, tmp_path)
    assert_equal_runs(unbroken, tmp_path)


def test_a_signal_while_the_classifier_learns_ends_the_run(unbroken: Path, tmp_path: Path) -> None:
    fit = validation.fit

    def signalled(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return fit(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "EVERY_S", 0.0)
        patch.setattr(validation, "fit", signalled)
        with pytest.raises(Interrupted, match="SIGUSR1 came after 8 samples"):
            train(CONFIG, STORE, tmp_path)
    assert not (tmp_path / "validation").exists()
    train(CONFIG, STORE, tmp_path)
    assert_equal_runs(unbroken, tmp_path)


@pytest.mark.parametrize("samples", [16, 24])
def test_a_kill_before_a_validation_has_ended_has_it_done_again(
    unbroken: Path, tmp_path: Path, samples: int
) -> None:
    def die() -> None:
        raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        at_validation(patch, samples, die)
        with pytest.raises(RuntimeError, match="killed"):
            train(CONFIG, STORE, tmp_path)
    assert samples not in metrics.validations(tmp_path / "metrics.jsonl")
    # The classifier is that of the run, and not trained again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "fit", None)
        train(CONFIG, STORE, tmp_path)
    assert_equal_runs(unbroken, tmp_path)


def test_a_damaged_classifier_is_made_again(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    path = run / "validation" / "classifier.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    metrics.truncate(run / "metrics.jsonl", 16)
    train(CONFIG, STORE, run)
    assert path.read_bytes() == whole
    assert rows(run)[-1] == rows(unbroken)[-1]


def test_a_finished_run_is_not_validated_again(
    unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = (unbroken / "best").read_text()
    (unbroken / "best").unlink()
    monkeypatch.setattr(loop, "Trainer", None)
    train(CONFIG, STORE, unbroken)
    assert (unbroken / "best").read_text() == best


def test_records_that_are_not_finite_are_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = validation.draw_signals

    def diverged(*given: Any, **options: Any) -> Any:
        signals = draw(*given, **options)
        signals[1, 0, 0] = np.inf
        return signals

    monkeypatch.setattr(validation, "draw_signals", diverged)
    train(CONFIG, STORE, tmp_path)
    for row in metrics.validations(tmp_path / "metrics.jsonl").values():
        assert (row["frechet"], row["roc_auc"]) == (None, None)
        assert row["reason"] == "1 of 5 drawn records are not finite"
    assert not (tmp_path / "best").exists()


def test_a_fold_9_of_one_kind_has_no_area(tmp_path: Path) -> None:
    labels = STORE.labels.copy()
    labels[STORE.indices([9])] = 1
    train(CONFIG, dataclasses.replace(STORE, labels=labels), tmp_path)
    row = metrics.validations(tmp_path / "metrics.jsonl")[24]
    assert row["roc_auc"] is None
    assert row["reason"] == "no label is both present and absent in fold 9"
    assert row["frechet"] > 0


@pytest.mark.parametrize(
    ("folds", "store", "words"),
    [
        ("1-9", STORE, "fold 9 cannot validate what it trains"),
        ("1-8", make_store(20), r"has 0 record\(s\) in the validation folds, 2 are needed"),
        ("1", make_store(9, folds=9), r"has 1 record\(s\) in the validation folds"),
        ("10", dataclasses.replace(STORE, strat_fold=np.arange(50) % 2 + 9), "training folds"),
    ],
)
def test_what_cannot_be_validated_is_refused_at_once(
    folds: str, store: Store, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(make_config(folds=folds, allow_leakage=True, validate_every=8), store, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_a_validation_is_due_where_a_multiple_was_reached_and_at_the_end() -> None:
    settings = make_config(samples=30, batch_size=4, validate_every=10).train
    assert [n for n in range(0, 31, 2) if due(settings, n)] == [10, 12, 20, 22, 30]
    assert [n for n in (0, 4, 8, 12, 16, 20, 24, 28, 30) if due(settings, n)] == [12, 20, 30]
    assert not due(make_config().train, 32)


def test_the_least_distance_is_best_and_the_earlier_of_equals() -> None:
    found: dict[int, Row] = {8: {"frechet": 2.0}, 16: {"frechet": 1.0}, 24: {"frechet": 1.0}}
    assert metrics.best(found) == 16
    assert metrics.best({8: {"frechet": None}, 16: {"frechet": 9.0}}) == 16
    assert metrics.best({8: {"frechet": None}, 16: {}}) is None


class Hall:
    """Two ranks in two threads that add up numbers, and how often they met."""

    def __init__(self) -> None:
        self.meetings = 0
        self._said: list[list[float]] = []
        self._barrier = threading.Barrier(2, timeout=30)

    def total(self, values: Any, device: object) -> list[float]:
        self._said.append(list(values))
        self._barrier.wait()
        sums = [sum(column) for column in zip(*self._said[-2:], strict=True)]
        if not self._barrier.wait():
            self.meetings += 1
        self._barrier.wait()
        return sums

    def everywhere(self, work: Callable[[], Any]) -> list[Any]:
        return [work()]


def together(hall: Hall, ticks: tuple[int, int], stop_at: int = -1) -> list[Any]:
    """Let two ranks work for so many ticks; return what each ended with."""
    ended: list[Any] = [None, None]
    signalled = threading.Event()

    def rank(number: int) -> None:
        group: Any = hall
        watch = Watch(
            group, torch.device("cpu"), signalled.is_set, lambda: Interrupted("x"), lambda _: None
        )

        def work() -> int:
            for tick in range(ticks[number]):
                if tick == stop_at:
                    signalled.set()
                watch.tick("working")
            if ticks[number] == 3:
                raise UserError("no")
            return number

        try:
            ended[number] = watch.everywhere(work)
        except (Interrupted, UserError) as error:
            ended[number] = type(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def test_a_rank_that_waits_meets_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "EVERY_S", 0.0)
    hall = Hall()
    assert together(hall, (0, 20)) == [[0], [1]]
    assert hall.meetings == 21
    assert together(Hall(), (7, 2)) == [[0], [1]]
    assert together(Hall(), (9, 9)) == [[0], [1]]


def test_a_signal_or_an_error_on_one_rank_leaves_none_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "EVERY_S", 0.0)
    hall = Hall()
    assert together(hall, (0, 50), stop_at=5) == [Interrupted, Interrupted]
    assert hall.meetings == 6
    assert together(Hall(), (3, 8)) == [UserError, [1]]
