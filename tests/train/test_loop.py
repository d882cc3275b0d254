from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sssd_hpc import config as configs
from sssd_hpc.errors import Interrupted, UserError
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.export import load_export
from sssd_hpc.train import checkpoint, loop
from sssd_hpc.train.build import build_model
from sssd_hpc.train.checkpoint import load_newest
from sssd_hpc.train.loop import Vote, learning_rate, train
from sssd_hpc.train.signals import StopFlag
from sssd_hpc.train.state import TrainState


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the metrics without those that are the machine's."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("samples_per_s") > 0
        assert row.pop("memory_gib") > 0
    return rows


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return everything in the newest checkpoint, by file and name."""
    found = load_newest(run)
    assert found is not None
    return {f"{stem}/{n}": t for stem, group in found.tensors.items() for n, t in group.items()}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Check that two runs ended alike bit for bit."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert lines(one) == lines(other)
    export = Path("export", "model.safetensors")
    assert (one / export).read_bytes() == (other / export).read_bytes()


def before_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Call `action(samples)` at the start of each step."""
    step = loop.Trainer._step

    def acting(trainer: loop.Trainer, state: TrainState, stop: StopFlag) -> Vote:
        action(state.samples)
        return step(trainer, state, stop)

    monkeypatch.setattr(loop.Trainer, "_step", acting)


def test_a_run_holds_what_the_contract_names(tmp_path: Path, small: SimpleNamespace) -> None:
    config, store = small.config(keep_checkpoints=2), small.store()
    train(config, store, tmp_path)
    assert configs.load(tmp_path / "config.yaml") == config
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == [
        "samples-000000024",
        "samples-000000032",
    ]
    assert (tmp_path / "latest").read_text() == "checkpoints/samples-000000032\n"
    rows = lines(tmp_path)
    assert [row["samples"] for row in rows] == [12, 24, 32]
    assert set(rows[0]) == {"samples", "loss", "grad_norm", "lr"}


def test_the_export_holds_averaged_and_raw_weights_with_their_meaning(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    store = small.store()
    train(small.config(), store, tmp_path)
    saved = tensors(tmp_path)
    for weights, group in (("raw", "model"), ("ema", "ema")):
        model, metadata = load_export(tmp_path / "export" / "model.safetensors", weights)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, saved[f"{group}/{name}"])
    assert not torch.equal(saved["model/head.weight"], saved["ema/head.weight"])
    assert metadata["leads"] == ["I", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    assert metadata["labels"] == ["NORM", "AFIB"]
    assert metadata["samples_seen"] == 32
    expected = {"num_steps": 10, "beta_start": 1e-4, "beta_end": 0.3, "zero_terminal_snr": False}
    assert metadata["diffusion"] == expected
    facts = (metadata["rate_hz"], metadata["length"], metadata["scale_mv"])
    assert facts == (100, 40, 0.5)


def test_velocity_is_trained_by_its_own_loss_and_named_in_the_export(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    store, config = small.store(), small.config()
    velocity = replace(config, diffusion=replace(config.diffusion, prediction="velocity"))
    zero = replace(velocity, diffusion=replace(velocity.diffusion, zero_terminal_snr=True))
    losses = set()
    for number, settings in enumerate((config, velocity, zero)):
        run = tmp_path / str(number)
        train(settings, store, run)
        _, metadata = load_export(run / "export" / "model.safetensors")
        assert metadata["prediction"] == settings.diffusion.prediction
        assert metadata["diffusion"]["zero_terminal_snr"] == (settings is zero)
        losses.add((run / "metrics.jsonl").read_text())
    assert len(losses) == 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr_schedule": "cosine", "warmup_samples": 12, "grad_clip": 0.05, "weight_decay": 0.1}],
    ids=["plain", "scheduled"],
)
def test_an_interrupted_and_resumed_run_equals_an_unbroken_one_bit_for_bit(
    tmp_path: Path,
    small: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    config, store = small.config(**settings), small.store()
    train(config, store, tmp_path / "unbroken")

    def stop_at_16(samples: int) -> None:
        if samples == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    before_step(monkeypatch, stop_at_16)
    with pytest.raises(Interrupted, match="SIGTERM came after 20 samples"):
        train(config, store, tmp_path / "resumed")
    train(config, store, tmp_path / "resumed")
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "resumed")


def test_a_run_made_longer_equals_one_that_was_long_from_the_start(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    store = small.store()
    train(small.config(samples=48), store, tmp_path / "long")
    train(small.config(samples=24), store, tmp_path / "longer")
    train(small.config(samples=48), store, tmp_path / "longer")
    assert_equal_runs(tmp_path / "long", tmp_path / "longer")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_the_step_it_came_in(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before_step(monkeypatch, lambda samples: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command goes on"):
        train(small.config(), small.store(), tmp_path)
    assert signal.getsignal(number) is handler
    found = load_newest(tmp_path)
    assert found is not None
    assert found.samples == 4


def test_a_finished_run_called_again_changes_nothing(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    train(small.config(), small.store(), tmp_path)
    before = snapshot()
    monkeypatch.setattr(loop, "Trainer", None)
    train(small.config(), small.store(), tmp_path)
    before.pop(tmp_path / ".lock")
    assert {path: time for path, time in snapshot().items() if path.name != ".lock"} == before


def test_a_lost_export_is_written_again(tmp_path: Path, small: SimpleNamespace) -> None:
    train(small.config(), small.store(), tmp_path)
    export = tmp_path / "export" / "model.safetensors"
    whole = export.read_bytes()
    export.unlink()
    train(small.config(), small.store(), tmp_path)
    assert export.read_bytes() == whole


@pytest.mark.parametrize(("num_records", "samples"), [(10, 14), (3, 8), (1, 6)])
def test_odd_last_batches_and_data_sets_smaller_than_a_batch_train(
    tmp_path: Path, small: SimpleNamespace, num_records: int, samples: int
) -> None:
    train(small.config(samples=samples, batch_size=5), small.store(num_records), tmp_path)
    assert lines(tmp_path)[-1]["samples"] == samples


def test_other_settings_are_refused_by_name(tmp_path: Path, small: SimpleNamespace) -> None:
    train(small.config(samples=8), small.store(), tmp_path)
    with pytest.raises(UserError, match=r"train\.seed was 0 and is 1; give the old"):
        train(small.config(samples=8, seed=1), small.store(), tmp_path)
    with pytest.raises(UserError, match=r"model\.channels was 4 and is 6"):
        train(small.with_model(small.config(samples=8), channels=6), small.store(), tmp_path)


def test_how_long_and_how_often_may_change(tmp_path: Path, small: SimpleNamespace) -> None:
    train(small.config(samples=8), small.store(), tmp_path)
    other = small.config(samples=12, checkpoint_every=4, keep_checkpoints=1, log_every=4)
    train(other, small.store(), tmp_path)
    assert configs.load(tmp_path / "config.yaml") == other


def test_a_missing_configuration_is_refused(tmp_path: Path, small: SimpleNamespace) -> None:
    train(small.config(samples=8), small.store(), tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        train(small.config(samples=16), small.store(), tmp_path)


def other_hash(store: Any, small: SimpleNamespace) -> Any:
    return small.store(name="b")


def other_labels(store: Any, small: SimpleNamespace) -> Any:
    store.manifest["label_names"] = ["AFIB", "NORM"]
    return store


def other_rate(store: Any, small: SimpleNamespace) -> Any:
    store.manifest["rate_hz"] = 500
    return store


@pytest.mark.parametrize(
    ("change", "named"),
    [(other_hash, "files"), (other_labels, "label_names"), (other_rate, "rate_hz")],
    ids=["hash", "labels", "rate"],
)
def test_other_data_is_refused_by_name(
    tmp_path: Path, small: SimpleNamespace, change: Callable[[Any, Any], Any], named: str
) -> None:
    train(small.config(samples=8), small.store(), tmp_path)
    with pytest.raises(UserError, match=f"trained on other data than .*: {named} differ"):
        train(small.config(samples=16), change(small.store(), small), tmp_path)


def test_two_trainings_of_one_run_are_refused(tmp_path: Path, small: SimpleNamespace) -> None:
    from sssd_hpc.train import resume

    with (
        resume.sole_owner(tmp_path),
        pytest.raises(UserError, match="another process is training"),
    ):
        train(small.config(), small.store(), tmp_path)


def test_damaged_checkpoints_never_start_a_run_over(tmp_path: Path, small: SimpleNamespace) -> None:
    train(small.config(keep_checkpoints=1), small.store(), tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "checkpoints" / "samples-000000032" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(small.config(keep_checkpoints=1), small.store(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_going_on_from_an_older_checkpoint_ends_at_the_same_weights(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    train(small.config(), small.store(), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / "samples-000000032"
    (newest / "optimizer.safetensors").unlink()
    train(small.config(), small.store(), tmp_path / "damaged")
    assert_equal_runs(tmp_path / "run", tmp_path / "damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    honest = loop.LOSSES["epsilon"]

    steps = itertools.count()

    def spoiled(*given: Any, **drawn: Any) -> torch.Tensor:
        return honest(*given, **drawn) * (value if next(steps) >= 2 else 1.0)

    monkeypatch.setitem(loop.LOSSES, "epsilon", spoiled)
    with pytest.raises(UserError, match=r"loss is (nan|inf) after 8 samples: training diverged"):
        train(small.config(), small.store(), tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(tmp_path).values())
    monkeypatch.setitem(loop.LOSSES, "epsilon", honest)
    train(small.config(), small.store(), tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = threading.Event()
    write = checkpoint._write

    def slow(path: Path, *rest: Any) -> dict[str, str]:
        if path.name == "samples-000000008":
            assert later.wait(60), "training waits for the checkpoint"
        return write(path, *rest)

    monkeypatch.setattr(checkpoint, "_write", slow)
    before_step(monkeypatch, lambda samples: later.set() if samples == 12 else None)
    train(small.config(samples=16), small.store(), tmp_path / "run")
    monkeypatch.undo()
    train(small.config(samples=16), small.store(), tmp_path / "unbroken")
    assert_equal_runs(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_full_disk_stops_with_one_clear_error_and_can_be_resumed(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    train(small.config(), small.store(), tmp_path / "unbroken")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_at_12(samples: int) -> None:
        if samples == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, fill_at_12)
        try:
            with pytest.raises(UserError, match=r"cannot be written: .*same command again"):
                train(small.config(), small.store(), run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["samples-000000008"]
    train(small.config(), small.store(), run)
    assert_equal_runs(tmp_path / "unbroken", run)


def test_records_longer_than_the_kernels_are_refused(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    with pytest.raises(UserError, match=r"model\.lmax is 40 but .* 50 samples; set --model\.lmax"):
        train(small.config(), small.store(length=50), tmp_path)


def test_folds_without_records_are_refused(tmp_path: Path, small: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"train\.folds is '9', but"):
        train(small.config(folds="9", allow_leakage=True), small.store(), tmp_path)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path, small: SimpleNamespace) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        train(small.config(), small.store(), tmp_path / "run")


def test_exported_weights_without_checkpoints_are_not_overwritten(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_text("precious")
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        train(small.config(), small.store(), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("config.yaml", "config.yaml"), ("manifest.json", "holds a store")]
)
def test_a_folder_of_something_else_is_not_trained_in(
    tmp_path: Path, small: SimpleNamespace, name: str, message: str
) -> None:
    (tmp_path / name).write_text("mine: 1\n")
    with pytest.raises(UserError, match=message):
        train(small.config(), small.store(), tmp_path)
    assert (tmp_path / name).read_text() == "mine: 1\n"


def test_every_row_of_the_label_embedding_learns(tmp_path: Path, small: SimpleNamespace) -> None:
    config, store = small.config(label_dropout=0.4), small.store()
    train(config, store, tmp_path)
    change = (
        tensors(tmp_path)["model/label_embedding.table"]
        - dict(build_model(config, store).named_parameters())["label_embedding.table"].detach()
    )
    # Labels x rows (absent, present, unknown).
    assert change.shape[:2] == (2, 3)
    assert bool((change.abs().amax(2) > 1e-6).all())


@pytest.mark.parametrize("kind", ["sum", "frozen"])
def test_models_without_an_unknown_row_train_without_label_dropout(
    tmp_path: Path, small: SimpleNamespace, kind: str
) -> None:
    config = small.with_model(small.config(samples=8, label_dropout=0.9), label_embedding=kind)
    train(config, small.store(), tmp_path)
    assert lines(tmp_path)[-1]["samples"] == 8


def test_bf16_stays_close_to_float32_and_keeps_float32_weights(
    tmp_path: Path, small: SimpleNamespace
) -> None:
    for precision in ("fp32", "bf16"):
        train(small.config(precision=precision), small.store(), tmp_path / precision)
    assert {t.dtype for t in tensors(tmp_path / "bf16").values()} == {torch.float32}
    pairs = zip(lines(tmp_path / "fp32"), lines(tmp_path / "bf16"), strict=True)
    for exact, rounded in pairs:
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert rounded["grad_norm"] != exact["grad_norm"]


def test_a_small_model_overfits_one_batch(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.draw
    monkeypatch.setattr(loop, "draw", lambda seed, numbers, *rest: honest(seed, range(4), *rest))
    config = small.config(
        samples=800, learning_rate=0.02, log_every=40, checkpoint_every=800, label_dropout=0.0
    )
    train(small.with_model(config, channels=16), small.store(num_records=4), tmp_path)
    losses = [row["loss"] for row in lines(tmp_path)]
    assert losses[0] > 0.5
    assert losses[-1] < 0.1 * losses[0]


def test_signals_reach_the_model_in_its_units(
    tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    honest = loop.LOSSES["epsilon"]

    def seen(denoiser: Any, x0: torch.Tensor, *rest: Any, **drawn: Any) -> torch.Tensor:
        given.append(x0)
        return honest(denoiser, x0, *rest, **drawn)

    monkeypatch.setitem(loop.LOSSES, "epsilon", seen)
    store = small.store()
    train(small.config(samples=8), store, tmp_path)
    largest = store.signals[:, [0, 5, 6, 7, 8, 9, 10, 11]].max() / 1000 / 0.5
    assert torch.cat(given).abs().max().item() == pytest.approx(largest, rel=0.05)
    assert given[0].shape == (4, 8, 40)


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(
    small: SimpleNamespace,
) -> None:
    def weights(seed: int) -> torch.Tensor:
        model: SSSDECG = build_model(small.config(seed=seed), small.store())
        return torch.nn.utils.parameters_to_vector(model.parameters())

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = configs.TrainConfig(
        samples=100, batch_size=10, learning_rate=1.0, warmup_samples=20, lr_schedule="cosine"
    )
    rates = [learning_rate(settings, samples) for samples in (0, 10, 20, 60, 100)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    constant = configs.TrainConfig(learning_rate=1.0)
    assert [learning_rate(constant, samples) for samples in (0, 999_999)] == [1.0, 1.0]
