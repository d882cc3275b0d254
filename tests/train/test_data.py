from __future__ import annotations

import numpy as np
import pytest
import torch

from sssd_hpc.train.data import batch_positions, draw, drop_labels, share


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


def test_what_is_drawn_for_a_sample_depends_on_seed_and_number_alone() -> None:
    whole = draw(0, range(8, 16), (2, 5), 50)
    parts = [draw(0, range(8, 11), (2, 5), 50), draw(0, range(11, 16), (2, 5), 50)]
    for drawn, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(drawn, torch.cat(pieces))
    for other in (draw(1, range(8, 16), (2, 5), 50), draw(0, range(9, 17), (2, 5), 50)):
        assert not torch.equal(whole[1], other[1])


def test_what_is_drawn_has_its_distribution() -> None:
    t, eps, chance = draw(3, range(2000), (2, 5), 10)
    # Four standard errors each.
    assert torch.bincount(t, minlength=10).sub(200).abs().max() < 4 * 180**0.5
    assert abs(eps.mean()) < 4 / 20_000**0.5
    assert abs(eps.var() - 1) < 4 * (2 / 20_000) ** 0.5
    assert abs(chance.mean() - 0.5) < 4 / (12 * 2000) ** 0.5
    assert t.min() == 0
    assert t.max() == 9


@pytest.mark.parametrize("count", [0, 1, 7, 12])
@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_shares_are_the_whole_and_equal_within_one(count: int, pieces: int) -> None:
    shares = [range(count)[share(count, pieces, piece)] for piece in range(pieces)]
    assert [number for part in shares for number in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_label_dropout_makes_whole_rows_unknown() -> None:
    labels = torch.randint(0, 2, (4, 3))
    dropped = drop_labels(labels, torch.tensor([0.0, 0.24, 0.25, 0.9]), 0.25)
    assert dropped[:2].tolist() == [[-1] * 3] * 2
    assert torch.equal(dropped[2:], labels[2:])


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_label_dropout_at_its_ends(rate: float) -> None:
    labels, chance = torch.ones(50, 2, dtype=torch.int64), torch.rand(50)
    dropped = drop_labels(labels, chance, rate)
    assert torch.equal(dropped, labels if rate == 0.0 else torch.full_like(labels, -1))
