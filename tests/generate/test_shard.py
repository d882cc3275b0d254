"""Per-record noise, fixed batches and the refusal of signals that a record cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sssd_hpc.diffusion import NoiseSchedule, ancestral_sample, dpmpp_sample
from sssd_hpc.diffusion.method import Method
from sssd_hpc.ecg.leads import EIGHT, LEADS, SSSD_ECG_EIGHT, take, to_twelve
from sssd_hpc.errors import UserError
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.root import has_record
from sssd_hpc.generate.shard import run_shard
from sssd_hpc.model.draw import Sampler, draw_signals, record_noise

LENGTH, STEPS = 64, 5
ECG_IDS = np.arange(1, 9)
LABELS = (np.arange(24).reshape(8, 3) % 5 == 0).astype(np.int64)


def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Estimate noise from a row's own signal, step and labels, as any model does."""
    shift = labels.sum(1)[:, None, None] * 0.1 + t[:, None, None] * 0.01
    return torch.tanh(x_t) + shift


def sampler(**changes: object) -> Sampler:
    values: dict[str, object] = {
        "denoiser": denoiser,
        "schedule": NoiseSchedule.linear(num_steps=STEPS),
        "leads": EIGHT,
        "length": LENGTH,
        "scale_mv": 1.0,
        "device": torch.device("cpu"),
    }
    return Sampler(**(values | changes))  # type: ignore[arg-type]


def draw(rows: list[int], batch_size: int, seed: int = 0) -> NDArray[np.float64]:
    return draw_signals(sampler(), ECG_IDS[rows], LABELS[rows], seed=seed, batch_size=batch_size)


def test_noise_is_a_function_of_seed_record_and_step() -> None:
    base = record_noise(1, 2, 3, (8, LENGTH))
    assert np.array_equal(base, record_noise(1, 2, 3, (8, LENGTH)))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 2 + 2**40, 3)):
        assert abs(np.corrcoef(base.ravel(), record_noise(*other, (8, LENGTH)).ravel())[0, 1]) < 0.2
    assert not np.array_equal(record_noise(2**64 - 1, 2, 3, (8, LENGTH)), base)


def test_noise_stays_what_it_was_when_first_released() -> None:
    expected = np.random.Generator(
        np.random.Philox(key=7 + (11 << 64), counter=13 << 64)
    ).standard_normal(4, dtype=np.float32)
    assert np.array_equal(record_noise(7, 11, 13, (1, 4))[0], expected)
    first = [0.2933446, -1.6629591, -1.0417057, -0.8228605]
    assert expected.tolist() == pytest.approx(first, abs=1e-6)


def test_noise_is_standard_normal_and_steps_do_not_overlap() -> None:
    steps = np.stack([record_noise(0, 1, step, (12, 5000)) for step in range(4)])
    assert steps.mean() == pytest.approx(0.0, abs=4 / np.sqrt(steps.size))
    assert steps.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * steps.size))
    assert np.unique(steps).size > 0.95 * steps.size


@pytest.mark.parametrize("batch_size", [8, 6])
def test_a_record_does_not_depend_on_its_batch_or_place(batch_size: int) -> None:
    alone = np.concatenate([draw([row], batch_size) for row in range(6)])
    together = draw([0, 1, 2, 3, 4, 5], batch_size)
    backwards = draw([5, 4, 3, 2, 1, 0], batch_size)[::-1]
    assert together.shape == (6, 12, LENGTH)
    assert np.array_equal(alone, together)
    assert np.array_equal(backwards, together)


def test_signals_are_the_samplers_with_each_records_noise_in_mv() -> None:
    noise = torch.from_numpy(
        np.stack(
            [
                np.stack([record_noise(5, int(i), step, (8, LENGTH)) for i in ECG_IDS])
                for step in range(STEPS)
            ]
        )
    )
    schedule = NoiseSchedule.linear(num_steps=STEPS)
    x_0 = ancestral_sample(denoiser, noise[0], torch.from_numpy(LABELS), schedule, noise=noise)
    got = draw_signals(
        sampler(leads=SSSD_ECG_EIGHT, scale_mv=0.25), ECG_IDS, LABELS, seed=5, batch_size=8
    )
    expected = to_twelve(0.25 * x_0.double().numpy(), SSSD_ECG_EIGHT)
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, draw(list(range(8)), 8, seed=6))


def test_the_method_of_a_sampler_decides_how_it_draws() -> None:
    noise = torch.from_numpy(
        np.stack([record_noise(0, int(ecg_id), 0, (8, LENGTH)) for ecg_id in ECG_IDS])
    )
    schedule = NoiseSchedule.linear(num_steps=STEPS)
    x_0 = dpmpp_sample(denoiser, noise, torch.from_numpy(LABELS), schedule, steps=3)
    method = Method(sampler="dpmpp", steps=3)
    calls: list[int] = []
    got = draw_signals(
        sampler(method=method), ECG_IDS, LABELS, seed=0, batch_size=8, on_step=calls.append
    )
    assert np.array_equal(got, to_twelve(x_0.double().numpy(), EIGHT))
    assert calls == [0, 1, 2]


MANIFEST = Manifest(
    ecg_id=ECG_IDS,
    strat_fold=np.ones(8, dtype=np.int64),
    labels=LABELS,
    label_names=("AFIB", "NORM", "SR"),
    rate_hz=100,
)
REQUEST = Request(
    model_sha256="a" * 64,
    weights="ema",
    sampler="ddpm",
    steps=STEPS,
    guidance=0.0,
    seed=0,
    batch_size=4,
    folds=(1,),
    manifest_sha256=MANIFEST.sha256(),
    device="cpu",
)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in (root / "records100").rglob("*")
        if path.is_file()
    }


def test_only_missing_records_are_made_and_the_same(tmp_path: Path) -> None:
    batches = MANIFEST.batches(4)
    assert run_shard(sampler(), MANIFEST, REQUEST, batches, tmp_path) == 8
    whole = contents(tmp_path)
    assert len(whole) == 16
    (tmp_path / "records100/00000/00002_lr.hea").unlink()
    (tmp_path / "records100/00000/00003_lr.dat").write_bytes(b"half")
    (tmp_path / "records100/00000/00007_lr.dat").unlink()
    assert run_shard(sampler(), MANIFEST, REQUEST, batches, tmp_path) == 3
    assert contents(tmp_path) == whole
    assert run_shard(sampler(), MANIFEST, REQUEST, batches, tmp_path) == 0


def test_shards_in_any_order_make_the_same_files(tmp_path: Path) -> None:
    run_shard(sampler(), MANIFEST, REQUEST, MANIFEST.batches(4), tmp_path / "one")
    for batch in reversed(MANIFEST.batches(4)):
        run_shard(sampler(), MANIFEST, REQUEST, [batch], tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_record_of_another_seed_or_model_is_not_taken_for_ours(tmp_path: Path) -> None:
    run_shard(sampler(), MANIFEST, REQUEST, MANIFEST.batches(4), tmp_path)
    header = tmp_path / "records100/00000/00001_lr.hea"
    assert has_record(tmp_path, MANIFEST, REQUEST, 0)
    header.write_text(header.read_text().replace("seed: 0", "seed: 1"))
    assert not has_record(tmp_path, MANIFEST, REQUEST, 0)
    header.write_text(header.read_text().replace("seed: 1", "seed: 0"))
    assert has_record(tmp_path, MANIFEST, REQUEST, 0)


@pytest.mark.parametrize(
    ("bad", "match"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (40.0, "exceeds .* mV")],
)
def test_a_signal_that_cannot_be_written_names_its_record(
    tmp_path: Path, bad: float, match: str
) -> None:
    def broken(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        eps_hat = denoiser(x_t, t, labels)
        if int(t[0]) == 0:
            eps_hat[2] = -bad * 100
        return eps_hat

    with pytest.raises(UserError, match=rf"record 3: .*{match}"):
        run_shard(sampler(denoiser=broken), MANIFEST, REQUEST, MANIFEST.batches(4), tmp_path)
    assert not list(tmp_path.rglob("00003*"))
    assert has_record(tmp_path, MANIFEST, REQUEST, 1)


def test_limb_lead_identities_hold_within_rounding(tmp_path: Path) -> None:
    signals = np.rint(1000 * draw(list(range(8)), 8))
    names = ("I", "II", "III", "AVR", "AVL", "AVF")
    one, two, three, right, left, foot = np.moveaxis(take(signals, LEADS, names), -2, 0)
    # Each lead is rounded by at most half a unit, so a sum of n leads is off by at most n halves.
    assert np.abs(one + three - two).max() <= 1.5
    assert np.abs(right + left + foot).max() <= 1.5
    assert np.abs(right + (one + two) / 2).max() <= 1.0
