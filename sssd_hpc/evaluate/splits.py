"""Records that play one part in an evaluation: training, validation or test, of one side or more.

Folds 1-8 train, 9 sets thresholds, 10 is scored: the split of PTB-XL.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store

FOLDS: dict[str, tuple[int, ...]] = {
    "training": (1, 2, 3, 4, 5, 6, 7, 8),
    "validation": (9,),
    "test": (10,),
}
CHUNK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Rows of one store or more, with their labels in the same order."""

    parts: tuple[tuple[Store, NDArray[np.int64]], ...]
    labels: NDArray[np.int64]
    """(n, num_labels), 1 where the label is present."""

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Split) -> Split:
        return Split(self.parts + other.parts, np.concatenate([self.labels, other.labels]))

    def positives(self, column: int = 0) -> Split:
        """Return the records that carry a label."""
        carriers = self.labels[:, column] == 1
        parts, begin = [], 0
        for store, rows in self.parts:
            parts.append((store, rows[carriers[begin : begin + len(rows)]]))
            begin += len(rows)
        return Split(tuple(parts), self.labels[carriers])

    @property
    def rate_hz(self) -> int:
        """Sampling rate, the same in every part."""
        return self.parts[0][0].rate_hz

    @property
    def rows(self) -> NDArray[np.int64]:
        """(n,) where the records stand in their stores."""
        return np.concatenate([rows for _, rows in self.parts])

    @property
    def ecg_id(self) -> NDArray[np.int64]:
        """(n,) the records' ids in their stores."""
        return np.concatenate([store.ecg_id[rows] for store, rows in self.parts])

    def signals_mv(self) -> NDArray[np.float32]:
        """Return (n, 12, L) in mV."""
        return np.concatenate([store.signals_mv(rows, LEADS) for store, rows in self.parts])

    def chunks_mv(self) -> Iterator[NDArray[np.float32]]:
        """Yield the signals by the chunk, for whom all at once are too many."""
        for store, rows in self.parts:
            for begin in range(0, len(rows), CHUNK):
                yield store.signals_mv(rows[begin : begin + CHUNK], LEADS)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over what a classifier sees: rate, leads, signals and labels."""
        total = hashlib.sha256()
        for store, rows in self.parts:
            total.update(repr((store.rate_hz, store.lead_names, store.length, len(rows))).encode())
            for begin in range(0, len(rows), CHUNK):
                total.update(store.signals[rows[begin : begin + CHUNK]].tobytes())
        total.update(self.labels.astype(np.uint8).tobytes())
        return total.hexdigest()


def split(store: Store, labels: Sequence[str], part: str) -> Split:
    """Return the records of a part, "training", "validation" or "test", with these labels."""
    rows = store.indices(FOLDS[part])
    columns = [store.label_names.index(label) for label in labels]
    return Split(((store, rows),), store.labels_of(rows)[:, columns])
