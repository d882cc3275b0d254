"""TensorBoard's curves are the lines of metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sssd_hpc.errors import UserError
from sssd_hpc.train.loop import train
from sssd_hpc.train.validation import Validator


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_the_curves_are_the_metrics_also_of_a_run_that_went_on(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    store = small.store()
    train(small.config(samples=16, log_every=4), store, tmp_path)
    train(small.config(samples=24, log_every=4, tensorboard=True), store, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["samples"], pytest.approx(row["loss"], rel=1e-6)) for row in rows[4:]]
    assert curve(tmp_path, "train/loss") == expected
    assert len(curve(tmp_path, "train/samples_per_s")) == 2


def test_without_the_package_the_run_is_refused_before_anything_is_written(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sssd_hpc\[tensorboard\]'"):
        train(small.config(tensorboard=True), small.store(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validations_are_curves_where_there_is_a_number(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(validator: Validator, samples: int, *given: object) -> dict[str, float | None]:
        return {"frechet": samples / 4, "roc_auc": None if samples == 8 else 0.5}

    monkeypatch.setattr(Validator, "score", score)
    config = small.config(samples=16, validate_every=8, tensorboard=True)
    train(config, small.store(20, folds=10), tmp_path)
    assert curve(tmp_path, "train/validation_frechet") == [(8, 2.0), (16, 4.0)]
    assert curve(tmp_path, "train/validation_roc_auc") == [(16, 0.5)]
