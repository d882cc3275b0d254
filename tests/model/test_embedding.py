"""Label and step embeddings: rows, folds, the unknown label, what learns."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.model.embedding import RowLabels, SumLabels, embed_labels, sinusoids

LABELS = torch.tensor([[1, 0, -1], [0, 0, 1]])


def test_nle_picks_one_learned_row_a_label_and_folds_them():
    embedding = RowLabels(3, 5, "nle")
    table, fold = embedding.table, embedding.fold
    rows = torch.stack([table[0, 1], table[1, 0], table[2, 2]])
    truth = fold.weight[0, :, 0] @ rows + fold.bias
    torch.testing.assert_close(embedding(LABELS)[0], truth)


def test_every_row_of_nle_learns():
    embedding = RowLabels(1, 5, "nle")
    embedding(torch.tensor([[0], [1], [-1]])).sum().backward()
    assert embedding.fold is None
    assert (embedding.table.grad == 1).all()


def test_absent_present_and_unknown_embed_differently():
    out = RowLabels(1, 5, "nle")(torch.tensor([[0], [1], [-1]]))
    assert all(not torch.equal(out[i], out[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_sum_adds_the_rows_of_present_labels_and_nothing_for_unknown():
    embedding = SumLabels(3, 5)
    out = embedding(LABELS)
    torch.testing.assert_close(out, embedding.table[[0, 2]])
    assert not embedding(torch.tensor([[-1, -1, 0]])).any()


def test_frozen_never_learns_the_present_row():
    embedding = RowLabels(2, 5, "frozen")
    assert not embedding.table[:, 1].any()
    with torch.no_grad():
        embedding.table[:, 1] = 7.0
    out = embedding(torch.tensor([[1, 0]]))
    out.sum().backward()
    truth = embedding.fold.weight[0, :, 0] @ torch.stack(
        [embedding.table[0, 1], embedding.table[1, 0]]
    )
    torch.testing.assert_close(out[0], truth + embedding.fold.bias)
    assert not embedding.table.grad[:, 1].any()
    assert embedding.table.grad[1, 0].any()


def test_frozen_refuses_unknown():
    with pytest.raises(UserError, match="no unknown row"):
        RowLabels(3, 5, "frozen")(LABELS)


@pytest.mark.parametrize("kind", ["nle", "sum", "frozen"])
@pytest.mark.parametrize("num_labels", [1, 2, 71])
def test_any_number_of_labels_embeds(kind, num_labels):
    embedding = embed_labels(kind, num_labels, 4)
    out = embedding(torch.ones(3, num_labels, dtype=torch.int64))
    assert out.shape == (3, 4)
    assert embedding.has_unknown == (kind == "nle")


def test_sinusoids_begin_at_frequency_one_and_end_at_a_ten_thousandth():
    out = sinusoids(torch.tensor([0, 3]), 8)
    angle = 3 * 1e4 ** (-torch.arange(4) / 3)
    torch.testing.assert_close(out[1], torch.cat([angle.sin(), angle.cos()]))
    torch.testing.assert_close(out[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert sinusoids(torch.tensor([5]), 2).isfinite().all()
