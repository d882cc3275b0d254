"""What each step trains on, as pure functions of the seed and the count of samples seen.

Nothing here keeps a position: a resumed run asks for the same batch and the same noise. Nothing
here knows how many processes there are either: the draws of sample number i are those of (seed, i),
whoever takes it.
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


def share(count: int, pieces: int, piece: int) -> slice:
    """Return which of `count` samples piece number `piece` of `pieces` takes, equal within one."""
    return slice(count * piece // pieces, count * (piece + 1) // pieces)


def draw(
    seed: int, samples: range, shape: tuple[int, int], num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t (n,) int64, eps (n, *shape) and a uniform number (n,) of samples by their number."""
    t = torch.empty(len(samples), dtype=torch.int64)
    eps, chance = torch.empty(len(samples), *shape), torch.empty(len(samples))
    for i, number in enumerate(samples):
        generator = sample_generator(seed, number)
        t[i] = torch.randint(num_steps, (), generator=generator)
        chance[i] = torch.rand((), generator=generator)
        torch.randn(shape, generator=generator, out=eps[i])
    return t, eps, chance


def sample_generator(seed: int, number: int) -> torch.Generator:
    """Return the CPU generator of sample number `number`."""
    state = np.random.SeedSequence([seed, _NOISE, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def drop_labels(labels: Tensor, chance: Tensor, share: float) -> Tensor:
    """Make all labels (B, K) int64 of those unknown (-1) whose chance (B,) is below `share`."""
    return labels.masked_fill((chance < share)[:, None], -1)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_records: int) -> npt.NDArray[np.int64]:
    order = np.random.default_rng(np.random.SeedSequence([seed, _ORDER, epoch]))
    return order.permutation(num_records)
