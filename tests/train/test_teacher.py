"""Students: fewer steps learned from a trained run, by the same loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sssd_hpc.config import Config
from sssd_hpc.errors import UserError
from sssd_hpc.model.export import load_export
from sssd_hpc.train import loop
from sssd_hpc.train.checkpoint import load_newest
from sssd_hpc.train.loop import train

EXPORT = Path("export", "model.safetensors")


def settings(small: SimpleNamespace, steps: int = 0, **more: Any) -> Config:
    config: Config = small.config(**more)
    diffusion = replace(config.diffusion, num_steps=8, beta_end=0.5, distilled_steps=steps)
    return replace(config, diffusion=diffusion)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SimpleNamespace], Path]:
    """A trained run, made once."""
    run = tmp_path_factory.mktemp("teacher")

    def made(small: SimpleNamespace) -> Path:
        if not (run / EXPORT).exists():
            train(settings(small, samples=16, learning_rate=0.02), small.store(), run)
        return run

    return made


def test_a_student_starts_from_its_teachers_averaged_weights_and_has_students(
    tmp_path: Path, small: SimpleNamespace, teacher: Any
) -> None:
    base = teacher(small)
    still = {"learning_rate": 1e-12, "samples": 4}
    train(settings(small, 4, **still), small.store(), tmp_path / "4", base)
    ours, _ = load_export(tmp_path / "4" / EXPORT, "raw")
    theirs, _ = load_export(base / EXPORT)
    for name, tensor in ours.state_dict().items():
        assert torch.allclose(tensor, theirs.state_dict()[name], atol=1e-9), name
    train(settings(small, 2, **still), small.store(), tmp_path / "2", tmp_path / "4")
    for steps in (4, 2):
        _, metadata = load_export(tmp_path / str(steps) / EXPORT)
        assert metadata["distilled_steps"] == steps


def test_a_resumed_student_equals_an_unbroken_one_and_keeps_its_teacher(
    tmp_path: Path, small: SimpleNamespace, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, store = teacher(small), small.store()
    train(settings(small, 4), store, tmp_path / "whole", base)
    train(settings(small, 4, samples=16), store, tmp_path / "cut", base)
    train(settings(small, 4), store, tmp_path / "cut", base)
    one, other = (load_newest(tmp_path / name) for name in ("whole", "cut"))
    assert one
    assert other
    for stem, named in one.tensors.items():
        assert all(torch.equal(tensor, other.tensors[stem][n]) for n, tensor in named.items())
    other_teacher = tmp_path / "other"
    train(settings(small, samples=8), store, other_teacher)
    with pytest.raises(UserError, match="teacher differ"):
        train(settings(small, 4, samples=40), store, tmp_path / "cut", other_teacher)
    with pytest.raises(UserError, match="distilled_steps is 4 and --distill-from is missing"):
        train(settings(small, 4, samples=40), store, tmp_path / "cut")


def test_what_cannot_be_taught_is_refused_before_anything_is_written(
    tmp_path: Path, small: SimpleNamespace, teacher: Any
) -> None:
    base, run, store = teacher(small), tmp_path / "run", small.store()
    two = settings(small, 2)
    wider = small.with_model(two, channels=6)
    far = replace(two, diffusion=replace(two.diffusion, beta_end=0.4))
    velocity = replace(two, diffusion=replace(two.diffusion, prediction="velocity"))
    labels = small.store()
    labels.manifest["label_names"] = ["NORM", "PVC"]
    cases: list[tuple[Config, Any, Path, str]] = [
        (settings(small, 5), store, base, "has 8 steps, so its student takes at most 4"),
        (wider, store, base, "model is .*'channels': 6"),
        (far, store, base, "diffusion is .*0.4.* leave out what changes it"),
        (velocity, store, base, "prediction is velocity but that of its teacher"),
        (two, labels, base, "was trained with labels NORM,AFIB, the store"),
        (two, store, tmp_path, "has no export/model.safetensors"),
        (settings(small), store, base, "distilled_steps is 0 and --distill-from is"),
    ]
    for config, data, source, words in cases:
        with pytest.raises(UserError, match=words):
            train(config, data, run, source)
        assert not run.exists()
    train(settings(small, 2, samples=4), store, tmp_path / "two", base)
    with pytest.raises(UserError, match="takes 2 steps, so its student takes 1: half as many"):
        train(two, store, run, tmp_path / "two")


def test_the_command_line_takes_the_teachers_settings(
    tmp_path: Path, small: SimpleNamespace, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sssd_hpc import cli
    from sssd_hpc.ecg.store import Store

    base, seen = teacher(small), []
    monkeypatch.setattr(Store, "open", lambda *a, **k: small.store())
    monkeypatch.setattr(loop, "train", lambda *given: seen.append(given))
    common = ["train", "--data", "store", "--run", str(tmp_path / "run")]
    student = [*common, "--distill-from", str(base), "--steps", "4", "--train.samples", "8"]
    assert cli.main(student) == 0
    (config, _, _, source) = seen[0]
    assert source == base
    assert config == settings(small, 4, samples=8, learning_rate=0.02 / 10)
    # A student's own student keeps the rate, and flags win.
    text = (base / "config.yaml").read_text()
    (base / "config.yaml").write_text(text.replace("distilled_steps: 0", "distilled_steps: 8"))
    assert cli.main(student) == 0
    assert seen.pop()[0].train.learning_rate == 0.02
    assert cli.main([*student, "--train.learning-rate", "0.5"]) == 0
    assert seen.pop()[0].train.learning_rate == 0.5
    for flags in (["--distill-from", str(base)], ["--steps", "4"]):
        assert cli.main([*common, *flags]) == 2
    assert cli.main([*student, "--preset", "tiny"]) == 2
    assert len(seen) == 1
