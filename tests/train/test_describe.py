from __future__ import annotations

from types import SimpleNamespace

import pytest

from sssd_hpc.diffusion import NoiseSchedule
from sssd_hpc.errors import UserError
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


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("blocks", [1, 4])
def test_the_extrapolated_activations_equal_the_counted_ones(
    small: SimpleNamespace, batch: int, blocks: int
) -> None:
    store = small.store()
    config = small.with_model(small.config(batch_size=batch), num_blocks=blocks)
    model = build_model(config, store)
    counted = describing._saved_bytes(model, batch, store.length)
    assert describing._activations(config, store) == pytest.approx(counted, rel=0.02)


def test_long_lists_of_labels_are_shortened(small: SimpleNamespace) -> None:
    store = small.store()
    store.manifest["label_names"] = [f"L{i}" for i in range(20)]
    assert "L7 and 12 more" in describe(small.config(), store)


def test_a_run_that_cannot_be_is_refused(small: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="lmax"):
        describe(small.config(), small.store(length=50))
