from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from sssd_hpc.config import Config
from sssd_hpc.diffusion import NoiseSchedule
from sssd_hpc.errors import UserError
from sssd_hpc.ops import counts
from sssd_hpc.train import describe as describing
from sssd_hpc.train.build import build_model
from sssd_hpc.train.describe import describe


def test_the_description_says_what_a_run_would_be(small: SimpleNamespace) -> None:
    config, store = small.config(samples=30, folds="1-4"), small.store()
    text = describe(config, store)
    parameters = sum(p.numel() for p in build_model(config, store).parameters())
    assert "num_blocks: 2" in text
    assert f"{parameters:,} trainable parameters" in text
    assert "6 records in folds 1-4" in text
    assert "30 samples = 8 steps of 4 = 5.0 epochs" in text
    snr = NoiseSchedule.linear(num_steps=10, beta_end=0.3).terminal_snr
    assert f"terminal signal-to-noise ratio {snr:.3g}" in text
    assert "labels NORM, AFIB" in text


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_extrapolated_activations_equal_the_counted_ones(
    small: SimpleNamespace, batch: int, blocks: int, again: bool
) -> None:
    store = small.store()
    train = small.config(batch_size=batch, activation_checkpointing=again)
    config = small.with_model(train, num_blocks=blocks)
    model = build_model(config, store)
    counted = describing._saved_bytes(model, batch, store.length)
    assert describing._activations(config, store)(batch) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, [4.0, 2.0, 1.0]),
        ({"accumulation_steps": 2}, [2.0, 1.0, 1.0]),
        # The bucket is 64 MiB.
        ({"zero_stage": 3}, [4.06, 2.06, 1.06]),
        ({"batch_size": 1}, [1.0]),
    ],
)
def test_memory_is_told_by_number_of_processes_stage_and_pieces(
    small: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    train: dict[str, int],
    expected: list[float],
) -> None:
    gib_a_record = lambda config, store: lambda records: float(records << 30)  # noqa: E731
    monkeypatch.setattr(describing, "_activations", gib_a_record)
    text = describe(small.config(**{"batch_size": 4, **train}), small.store())
    told = re.findall(r"([\d.]+) (?:GiB|on \d)", text.rpartition("memory: ")[2])
    assert [float(number) for number in told] == expected


def test_long_lists_of_labels_are_shortened(small: SimpleNamespace) -> None:
    store = small.store()
    store.manifest["label_names"] = [f"L{i}" for i in range(20)]
    assert "L7 and 12 more" in describe(small.config(), store)


def test_a_run_that_cannot_be_is_refused(small: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="lmax"):
        describe(small.config(), small.store(length=50))


def test_the_flops_of_a_step_are_those_counted_for_the_papers_model() -> None:
    config = Config()
    flops = describing.step_flops(config, 1000, 8)
    assert flops == counts.training_step(36, 8, 256, 32, 1000).flops
    # Kernels are made once a step, the rest grows with the batch.
    assert 1.8 * flops < describing.step_flops(config, 1000, 16) < 2 * flops


@pytest.mark.parametrize(
    ("gpu", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "tf32", 378e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA H100 NVL", "bf16", None),
        ("Quadro P400", "fp32", None),
        ("", "fp32", None),
    ],
)
def test_a_gpus_peak_is_told_only_where_it_is_known(
    gpu: str, precision: str, peak: float | None
) -> None:
    assert describing.peak_flops(gpu, precision) == peak
