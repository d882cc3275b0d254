"""What each step trains on, as pure functions of the seed and the count of samples seen.

Nothing here keeps a position: a resumed run asks for the same batch and the same noise.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Streams of random numbers drawn from one seed.
_ORDER, _NOISE = 0, 1


def batch_positions(seed: int, samples: int, count: int, num_records: int) -> npt.NDArray[np.int64]:
    """Return which of `num_records` records are number `samples` .. `samples + count - 1`.

    Each epoch is a permutation of all records; a batch may reach from one epoch into the next, so
    that no record is dropped and a data set may be smaller than a batch.
    """
    epochs, places = np.divmod(np.arange(samples, samples + count), num_records)
    chosen = [
        _permutation(seed, int(epoch), num_records)[places[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(chosen)


def step_generator(seed: int, samples: int) -> torch.Generator:
    """Return the CPU generator of the step that begins after `samples` samples."""
    state = np.random.SeedSequence([seed, _NOISE, samples]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drop_labels(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make all labels of a random `share` of the records unknown (-1); labels (B, K) int64."""
    dropped = torch.rand(labels.shape[0], generator=generator) < share
    return labels.masked_fill(dropped[:, None], -1)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_records: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng(np.random.SeedSequence([seed, _ORDER, epoch]))
    return order.permutation(num_records)
