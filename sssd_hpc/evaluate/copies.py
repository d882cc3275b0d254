"""Find the record most like another, whatever its shift in time and its gain; and plant such ones.

A generator that repeats training records need not begin them at the same sample. Two records are
compared by their normalised cross-correlation, the eight independent leads together, at every
shift that leaves half of them over each other: 1 for a shifted and scaled copy. That takes 0.1 ms a
pair, so candidates come first, by what a shift leaves as it is: the magnitudes of the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import EIGHT, LEADS, positions, take, to_twelve

RATE_HZ = 50
"""Records are compared at this rate: nothing above 25 Hz is looked at."""
BAND_HZ = (0.5, 25.0)
"""Without baseline wander, which has most energy and says nothing of a patient."""
CANDIDATES = 8
"""Records checked exactly for each query."""
FINER = 4
"""Shifts are tried every 5 ms: at 20 ms a steep QRS would be missed."""
FLAT_MV = 1e-4
"""A tenth of the unit of a record's file: below it there is no signal."""
CHUNK = 256
QUERIES = 16

Floats = NDArray[np.floating[Any]]
Signals = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Records made ready for `search`."""

    signals: NDArray[np.float16]
    """(n, 8, length) in the band, each record of mean square 1, at `RATE_HZ`; flat ones 0."""
    signatures: NDArray[np.float32]
    """(n, d) magnitudes of the spectrum, each row of length 1."""
    level_mv: NDArray[np.float32]
    """(n,) root mean square that was divided out."""

    def __len__(self) -> int:
        return len(self.signals)

    def take(self, rows: NDArray[np.integer[Any]]) -> Prepared:
        """Return the records at `rows`."""
        return Prepared(self.signals[rows], self.signatures[rows], self.level_mv[rows])


@dataclass(frozen=True, eq=False)
class Matches:
    """For each of n queries, the most similar record of the base."""

    similarity: NDArray[np.float64]
    """(n,) normalised cross-correlation, -1 to 1."""
    second: NDArray[np.float64]
    """(n,) that of the second most similar; NaN where the base has one record."""
    row: NDArray[np.int64]
    """(n,) where in the base it stands."""
    shift_s: NDArray[np.float64]
    """(n,) by how much the query lies later."""
    gain: NDArray[np.float64]
    """(n,) what the record of the base is to be multiplied by."""

    @property
    def distance(self) -> NDArray[np.float64]:
        """Return the Euclidean distance of the aligned records, each of length 1."""
        return to_distance(self.similarity)


def to_distance(similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance of two vectors of length 1 from their inner product."""
    return np.sqrt(np.maximum(2 - 2 * similarity, 0))


def prepare(signals_mv: Floats, rate_hz: int) -> Prepared:
    """Filter and decimate records (n, 12, L) in mV and describe them by their spectra."""
    duration_s = signals_mv.shape[2] / rate_hz
    first, stop = math.ceil(BAND_HZ[0] * duration_s), math.floor(BAND_HZ[1] * duration_s)
    length = round(duration_s * RATE_HZ)
    parts = []
    for begin in range(0, len(signals_mv), CHUNK):
        leads = signals_mv[begin : begin + CHUNK, positions(LEADS, EIGHT)].astype(np.float32)
        spectra = scipy.fft.rfft(leads, axis=2)[:, :, :stop] * (length / signals_mv.shape[2])
        spectra[:, :, :first] = 0
        signals = scipy.fft.irfft(spectra, length, axis=2)
        level = np.sqrt((signals**2).mean(axis=(1, 2)))
        scale = np.where(level > FLAT_MV, 1 / np.maximum(level, FLAT_MV), 0)
        signals *= scale[:, None, None]
        signatures = np.abs(spectra[:, :, first:]).reshape(len(leads), -1)
        signatures /= np.maximum(np.linalg.norm(signatures, axis=1, keepdims=True), FLAT_MV)
        parts.append((signals.astype(np.float16), signatures, level))
    if not parts:
        empty = np.zeros((0, len(EIGHT), length), np.float16)
        width = len(EIGHT) * max(stop - first, 0)
        return Prepared(empty, np.zeros((0, width), np.float32), np.zeros(0, np.float32))
    return Prepared(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def search(queries: Prepared, base: Prepared, candidates: int = CANDIDATES) -> Matches:
    """Return the record of `base` most like each query, among the `candidates` likeliest.

    Raises:
        ValueError: the base is empty.
    """
    if not len(base):
        raise ValueError("there is no record to compare with")
    count = min(candidates, len(base))
    num = len(queries)
    similarity, second, shift_s, gain = (np.full(num, math.nan) for _ in range(4))
    row = np.zeros(num, dtype=np.int64)
    for begin in range(0, num, CHUNK):
        alike = queries.signatures[begin : begin + CHUNK] @ base.signatures.T
        likely = np.argpartition(-alike, count - 1, axis=1)[:, :count]
        for at in range(begin, min(begin + CHUNK, num), QUERIES):
            rows = likely[at - begin : at - begin + QUERIES]
            here = slice(at, at + len(rows))
            found, lag, ratio = aligned(queries.signals[here], base.signals[rows])
            order = np.argsort(-found, axis=1)
            best = (np.arange(len(rows)), order[:, 0])
            similarity[here], shift_s[here], row[here] = found[best], lag[best], rows[best]
            gain[here] = (
                ratio[best] * queries.level_mv[here] / np.maximum(base.level_mv[row[here]], 1e-6)
            )
            if count > 1:
                second[here] = found[best[0], order[:, 1]]
    return Matches(similarity, second, row, shift_s, gain)


def aligned(
    queries: Floats, others: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the greatest normalised cross-correlation, its shift in seconds and its gain.

    Of queries (q, leads, n) and others (q, k, leads, n), each (q, k). Over the samples that a shift
    d leaves over each other: sum x(t + d) y(t) / sqrt(sum x(t + d)^2 sum y(t)^2), leads summed.
    """
    length = queries.shape[2]
    half = length // 2
    # Room for shifts by half a record, so that the ends do not meet.
    size = scipy.fft.next_fast_len(length + half, real=True)
    ours = scipy.fft.rfft(queries.astype(np.float32), size, axis=2)[:, None]
    theirs = scipy.fft.rfft(others.astype(np.float32), size, axis=3)
    products = np.einsum("qklf,qklf->qkf", np.broadcast_to(ours, theirs.shape), theirs.conj())
    # More samples than the spectrum has: the correlation between the samples.
    correlation = scipy.fft.irfft(products, FINER * size, axis=2) * FINER
    lags = np.arange(-half * FINER, half * FINER + 1)
    shifts = np.rint(lags / FINER).astype(np.int64)
    later, earlier = np.maximum(shifts, 0), np.maximum(-shifts, 0)
    energy = _cumulated(queries)[:, None]
    over = energy[..., length - earlier] - energy[..., later]
    energy = _cumulated(others)
    under = energy[..., length - later] - energy[..., earlier]
    scale = np.sqrt(over * under)
    normalised = np.where(scale > 1e-6, correlation[..., lags] / np.maximum(scale, 1e-6), 0.0)
    best = normalised.argmax(axis=2)[..., None]
    found = np.take_along_axis(normalised, best, axis=2)[..., 0]
    over = np.take_along_axis(np.broadcast_to(over, under.shape), best, axis=2)[..., 0]
    under = np.take_along_axis(under, best, axis=2)[..., 0]
    ratio = found * np.sqrt(over / np.maximum(under, 1e-6))
    return np.clip(found, -1, 1), lags[best[..., 0]] / (FINER * RATE_HZ), ratio


def _cumulated(signals: Floats) -> NDArray[np.float64]:
    """Return the energy of all leads before each sample, (..., n + 1)."""
    energy = (signals.astype(np.float64) ** 2).sum(axis=-2).cumsum(axis=-1)
    return np.concatenate([np.zeros_like(energy[..., :1]), energy], axis=-1)


def _exact(records: Signals, rate_hz: int, generator: np.random.Generator) -> Signals:
    return records


def _noisy(records: Signals, rate_hz: int, generator: np.random.Generator) -> Signals:
    """Add white noise of a tenth of each record's amplitude (20 dB) to the eight leads."""
    eight = take(records, LEADS, EIGHT)
    level = eight.std(axis=(1, 2), keepdims=True)
    noise = generator.standard_normal(eight.shape, dtype=np.float32)
    return to_twelve(eight + 0.1 * level * noise, EIGHT)


def _scaled(records: Signals, rate_hz: int, generator: np.random.Generator) -> Signals:
    """Multiply each record by 0.5 to 2."""
    gains = 2 ** generator.uniform(-1, 1, (len(records), 1, 1))
    return (records * gains).astype(np.float32)


def _shifted(records: Signals, rate_hz: int, generator: np.random.Generator) -> Signals:
    """Shift each record by 0.2 to 2 s either way; another record's samples fill the gap."""
    result = records.copy()
    for row, record in enumerate(records):
        shift = round(generator.uniform(0.2, 2.0) * rate_hz)
        other = records[row - 1]
        if generator.random() < 0.5:
            result[row] = np.concatenate([record[:, shift:], other[:, :shift]], axis=1)
        else:
            result[row] = np.concatenate([other[:, -shift:], record[:, :-shift]], axis=1)
    return result


def _disguised(records: Signals, rate_hz: int, generator: np.random.Generator) -> Signals:
    for change in (_shifted, _scaled, _noisy):
        records = change(records, rate_hz, generator)
    return records


PLANTS: dict[str, Callable[[Signals, int, np.random.Generator], Signals]] = {
    "exact": _exact,
    "noisy": _noisy,
    "scaled": _scaled,
    "shifted": _shifted,
    "disguised": _disguised,
}
"""How a copy may differ from its original; the last is shifted, scaled and noisy."""
