from __future__ import annotations

import numpy as np
import pytest
import torch

from sssd_hpc.train.data import batch_positions, drop_labels, step_generator


def stream(seed: int, count: int, num_records: int, batch: int) -> list[int]:
    """Return the first `count` positions, asked for batch by batch."""
    parts = [
        batch_positions(seed, start, min(batch, count - start), num_records)
        for start in range(0, count, batch)
    ]
    return np.concatenate(parts).tolist()


@pytest.mark.parametrize("num_records", [1, 3, 10, 17])
def test_every_epoch_holds_every_record_once(num_records: int) -> None:
    order = stream(0, 4 * num_records, num_records, batch=8)
    for epoch in range(4):
        assert sorted(order[epoch * num_records : (epoch + 1) * num_records]) == list(
            range(num_records)
        )


def test_epochs_and_seeds_differ_in_their_order() -> None:
    order = stream(0, 100, 50, batch=8)
    assert order[:50] != order[50:]
    assert order != stream(1, 100, 50, batch=8)


@pytest.mark.parametrize("batch", [1, 5, 8, 60])
def test_the_order_does_not_depend_on_the_batch_size(batch: int) -> None:
    assert stream(3, 60, 7, batch=batch) == stream(3, 60, 7, batch=6)


def test_a_steps_noise_depends_on_seed_and_count_alone() -> None:
    def draw(seed: int, samples: int) -> list[float]:
        return torch.rand(4, generator=step_generator(seed, samples)).tolist()

    assert draw(0, 8) == draw(0, 8)
    assert draw(0, 8) != draw(0, 16)
    assert draw(0, 8) != draw(8, 0)


def test_label_dropout_makes_whole_rows_unknown_at_its_rate() -> None:
    labels = torch.randint(0, 2, (4000, 3))
    dropped = drop_labels(labels, 0.25, torch.Generator().manual_seed(0))
    unknown = (dropped == -1).all(1)
    assert torch.equal(dropped[~unknown], labels[~unknown])
    # Four standard errors of a binomial share.
    assert unknown.float().mean().item() == pytest.approx(0.25, abs=4 * (0.1875 / 4000) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 0.999999])
def test_label_dropout_at_its_ends(share: float) -> None:
    labels = torch.ones(50, 2, dtype=torch.int64)
    dropped = drop_labels(labels, share, torch.Generator().manual_seed(0))
    assert torch.equal(dropped, labels if share == 0.0 else torch.full_like(labels, -1))
