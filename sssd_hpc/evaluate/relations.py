"""Measures on the signals themselves: distances between sets, spectra, rhythm, shape, leads.

All look at the eight independent leads, of which the other four are sums. Records of a constant
lead are no exception: its power counts as that of the noise floor, and it correlates with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import EIGHT, LEADS, positions
from sssd_hpc.evaluate.comparison import Measure, Side, Undefined, remembered

Array = NDArray[np.floating[Any]]

INDEPENDENT = positions(LEADS, EIGHT)
PAIRS_OF_LEADS = np.triu_indices(len(EIGHT), 1)
MAX_RECORDS = 1000
"""First records of a side of which every pair is looked at; `compare` draws in random order."""
DTW_DRAWS = 60
DTW_RATE_HZ = 50
DTW_BAND_S = 1.0
"""How far a warping path may stray, as a tenth of a record is usual."""
PROJECTIONS = 200
WINDOW_S = 1.0
BAND_HZ = (0.5, 45.0)
"""Baseline wander alone lives below, at 100 Hz PTB-XL is filtered above."""
NOISE_FLOOR = 1e-9
"""mV^2/Hz; a sample in whole microvolts rounds away about 2e-9 at 100 Hz."""
LAGS_S = np.arange(1, 51) * 0.04
SAMPLES_A_RECORD = 100
FOLDS = 5
RIDGE = 1000.0


def wasserstein(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the 1-Wasserstein distance of each column of (n, d) and (m, d), (d,).

    The area between the two quantile functions, which are steps at i/n and at j/m.
    """
    ends = np.union1d(
        np.arange(1, len(first) + 1) / len(first), np.arange(1, len(second) + 1) / len(second)
    )
    widths = np.diff(ends, prepend=0.0)
    middles = ends - widths / 2
    quantiles = [
        np.sort(side, axis=0)[(middles * len(side)).astype(int)] for side in (first, second)
    ]
    return np.asarray(widths @ np.abs(quantiles[0] - quantiles[1]))


def energy_euclid(candidate: Side, reference: Side) -> float:
    """Return the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| with |.| the RMS in mV.

    Source: Szekely and Rizzo (2013), equation 2.1, expectations over all pairs of the sets.
    """
    between, ours, theirs = _three_distances(candidate, reference)
    return float(2 * between.mean() - ours.mean() - theirs.mean())


def mmd(candidate: Side, reference: Side) -> float:
    """Return the maximum mean discrepancy, Gaussian kernel as wide as the median real distance.

    Source: Gretton et al. (JMLR 2012), equation 5: the biased estimate, so never negative.

    Raises:
        Undefined: half of the real records are equal.
    """
    between, ours, theirs = _three_distances(candidate, reference)
    width = float(np.median(theirs[np.triu_indices(len(theirs), 1)]))
    if width == 0:
        raise Undefined("the real records equal one another: a kernel has no width")
    means = [
        float(np.exp(-np.square(part) / (2 * width**2)).mean()) for part in (between, ours, theirs)
    ]
    return float(np.sqrt(max(means[1] + means[2] - 2 * means[0], 0.0)))


def _three_distances(candidate: Side, reference: Side) -> tuple[Array, Array, Array]:
    return (
        _distances(candidate, reference),
        _distances(candidate, candidate),
        _distances(reference, reference),
    )


@remembered
def _distances(first: Side, second: Side) -> NDArray[np.float64]:
    """Return the RMS difference in mV of every pair of records."""
    a, b = (
        side.signals_mv[:MAX_RECORDS, INDEPENDENT].reshape(min(len(side), MAX_RECORDS), -1)
        for side in (first, second)
    )
    squares = [np.square(side, dtype=np.float64).sum(axis=1) for side in (a, b)]
    distance = squares[0][:, None] + squares[1] - 2 * (a @ b.T).astype(np.float64)
    if first is second:
        np.fill_diagonal(distance, 0.0)
    return np.asarray(np.sqrt(np.maximum(distance, 0.0) / a.shape[1]))


def dtw(first: Array, second: Array, band: int) -> NDArray[np.float64]:
    """Return the dynamic time warping distance of pairs of records, (n, leads, L) each, (n,).

    The root of the least sum of squared differences over all leads along a monotone path from
    beginning to end whose two times differ by at most `band` samples. All leads warp together.

    Source: Sakoe and Chiba (1978), with steps of equal weight.
    """
    length = first.shape[2]
    # Column band + 1 + (i - j) holds the newest cost on that diagonal; the outermost stay infinite.
    # Times with equal i + j depend on older sums alone, so one step computes them all in place.
    cost = np.full((len(first), 2 * band + 3), np.inf)
    cost[:, band + 1] = 0.0
    backwards = second[:, :, ::-1]
    for total in range(2 * length - 1):
        low = max(0, total - length + 1, -((band - total) // 2))
        high = min(total, length - 1, (total + band) // 2)
        one = first[:, :, low : high + 1]
        # Time j = total - i stands at length - 1 - j of the reversed record.
        two = backwards[:, :, length - 1 - total + low : length - total + high]
        begin, end = 2 * low - total + band + 1, 2 * high - total + band + 2
        reached = np.minimum(cost[:, begin - 1 : end - 1 : 2], cost[:, begin + 1 : end + 1 : 2])
        here = cost[:, begin:end:2]
        gap = one - two
        here[...] = np.minimum(here, reached) + np.einsum("nlt,nlt->nt", gap, gap)
    return np.asarray(np.sqrt(cost[:, band + 1]))


def energy_dtw(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    """Return the energy distance with DTW, in RMS mV along the path.

    The mean of |x - y| + |x' - y'| - |x - x'| - |y - y'| over `DTW_DRAWS` draws of two candidates
    and two real records. DTW is no metric, so it may be negative; beside its floor it still ranks.
    """
    step = max(candidate.rate_hz // DTW_RATE_HZ, 1)
    band = max(round(DTW_BAND_S * candidate.rate_hz / step), 1)

    def drawn(side: Side) -> tuple[Array, Array]:
        one = generator.integers(0, len(side), DTW_DRAWS)
        other = (one + generator.integers(1, len(side), DTW_DRAWS)) % len(side)
        return slower(side, one), slower(side, other)

    def slower(side: Side, rows: NDArray[np.integer[Any]]) -> Array:
        x = side.signals_mv[rows][:, INDEPENDENT]
        whole = x.shape[2] // step * step
        return np.asarray(x[..., :whole].reshape(*x.shape[:2], -1, step).mean(axis=3))

    (x, x_too), (y, y_too) = drawn(candidate), drawn(reference)
    sums = dtw(x, y, band) + dtw(x_too, y_too, band) - dtw(x, x_too, band) - dtw(y, y_too, band)
    return float(sums.mean() / np.sqrt(x[0].size))


def sliced_wasserstein(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    """Return the mean 1-Wasserstein distance over random projections of one-second windows, mV.

    Source: Bonneel et al. (2015); directions uniform on the sphere of all leads and samples.
    """
    length = candidate.signals_mv.shape[2]
    window = min(round(WINDOW_S * candidate.rate_hz), length)
    directions = generator.normal(size=(len(EIGHT) * window, PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)

    def projected(side: Side) -> Array:
        starts = generator.integers(0, length - window + 1, len(side))
        times = starts[:, None, None] + np.arange(window)
        rows = np.arange(len(side))[:, None, None]
        windows = side.signals_mv[rows, np.array(INDEPENDENT)[:, None], times]
        return np.asarray(windows.reshape(len(side), -1) @ directions)

    return float(wasserstein(projected(candidate), projected(reference)).mean())


def power_db(signals_mv: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Return the power of each lead at each half hertz of `BAND_HZ` in dB (mV^2/Hz), (n, d)."""
    from scipy.signal import welch

    nperseg = min(2 * rate_hz, signals_mv.shape[2])
    hertz, power = welch(signals_mv[:, INDEPENDENT], rate_hz, nperseg=nperseg)
    kept = power[..., (hertz >= BAND_HZ[0]) & (hertz <= BAND_HZ[1])]
    return np.asarray(10 * np.log10(kept + NOISE_FLOOR), np.float32).reshape(len(kept), -1)


def autocorrelation(signals_mv: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Return each lead's autocorrelation at `LAGS_S`, (n, d); 0 for a constant lead."""
    x = signals_mv[:, INDEPENDENT]
    length = x.shape[2]
    x = x - x.mean(axis=2, keepdims=True)
    spectrum = np.fft.rfft(x, 2 * length)
    products = np.fft.irfft(np.abs(spectrum) ** 2, 2 * length)
    lags = np.unique(np.rint(LAGS_S * rate_hz).astype(int))
    lags = lags[(lags > 0) & (lags < length)]
    scaled = _quotient(products[..., lags], products[..., :1])
    return scaled.reshape(len(x), -1)


def lead_correlation(signals_mv: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Return the correlation of each of the 28 pairs of leads, (n, 28); 0 with a constant one."""
    x = signals_mv[:, INDEPENDENT].astype(np.float64)
    x -= x.mean(axis=2, keepdims=True)
    covariance = x @ x.transpose(0, 2, 1)
    deviation = np.sqrt(np.einsum("nii->ni", covariance))
    first, second = PAIRS_OF_LEADS
    return _quotient(covariance[:, first, second], deviation[:, first] * deviation[:, second])


def _quotient(numerator: Array, denominator: Array) -> NDArray[np.float32]:
    """Divide; 0 where the denominator is what rounding leaves of a constant lead."""
    defined = denominator > NOISE_FLOOR
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), 0.0).astype(
        np.float32
    )


def mean_wasserstein(
    name: str, of_record: Callable[[NDArray[np.float32], int], NDArray[np.float32]]
) -> Callable[[Side, Side, np.random.Generator], float]:
    """Return a measure: mean 1-Wasserstein distance of numbers that each record has, (n, d)."""

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        ours, theirs = (side.per_record(name, of_record) for side in (candidate, reference))
        return float(wasserstein(ours, theirs).mean())

    return compute


def pooled_wasserstein(
    of_signals: Callable[[NDArray[np.float32], int], NDArray[np.float32]],
) -> Callable[[Side, Side, np.random.Generator], float]:
    """Return a measure: mean over leads of the 1-Wasserstein distance of single samples.

    `of_signals` makes (n, leads, samples) of signals; of each record some samples are drawn.
    """

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        def drawn(side: Side) -> Array:
            values = of_signals(side.signals_mv, side.rate_hz)[:, INDEPENDENT]
            at = generator.integers(0, values.shape[2], (len(side), 1, SAMPLES_A_RECORD))
            return np.moveaxis(np.take_along_axis(values, at, axis=2), 1, 2).reshape(-1, len(EIGHT))

        return float(wasserstein(drawn(candidate), drawn(reference)).mean())

    return compute


def discriminative_score(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
    """Return |accuracy - 1/2| of a linear classifier that tells candidates from real records.

    Cross-validated ridge regression on features, spectra, autocorrelation and lead correlation; as
    many records of both sides. 0: not to be told apart; 1/2: always.

    Source: Yoon et al., TimeGAN (NeurIPS 2019), section 5, with a linear classifier for their LSTM.

    Raises:
        Undefined: fewer than `FOLDS` records on a side.
    """
    count = min(len(candidate), len(reference))
    if count < FOLDS:
        raise Undefined(f"at least {FOLDS} records are needed on each side, {count} given")
    sides = [side.take(np.arange(count)) for side in (candidate, reference)]
    x = np.concatenate([np.hstack([side.features, *_numbers(side)]) for side in sides])
    y = np.repeat([1.0, -1.0], count)
    # The same fold for both sides: each fold has as many of each.
    fold = np.tile(generator.permutation(count) % FOLDS, 2)
    right = 0
    for number in range(FOLDS):
        train, test = fold != number, fold == number
        mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
        scaled = (x - mean) / np.where(deviation > 0, deviation, 1.0)
        weights = _ridge(scaled[train], y[train])
        right += int(((scaled[test] @ weights > 0) == (y[test] > 0)).sum())
    return abs(right / len(y) - 0.5)


def _ridge(x: Array, y: Array) -> Array:
    """Return (X^T X + R)^-1 X^T y, which is X^T (X X^T + R)^-1 y: the smaller system is solved."""
    if len(x) > x.shape[1]:
        return np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    return np.asarray(x.T @ np.linalg.solve(x @ x.T + RIDGE * np.eye(len(x)), y))


def _numbers(side: Side) -> list[NDArray[np.float32]]:
    return [side.per_record(name, of_record) for name, of_record in OF_RECORD.items()]


OF_RECORD: dict[str, Callable[[NDArray[np.float32], int], NDArray[np.float32]]] = {
    "spectrum": power_db,
    "autocorrelation": autocorrelation,
    "lead_correlation": lead_correlation,
}

RELATIONS = (
    Measure(
        "energy_euclid",
        "energy distance of records",
        "mV",
        "lower",
        ("mode_drop", "lead_swap", "mean_collapse"),
        lambda candidate, reference, _: energy_euclid(candidate, reference),
    ),
    Measure(
        "energy_dtw",
        "energy distance after time warping",
        "mV",
        "lower",
        ("lead_swap", "mean_collapse", "time_reversal", "double_speed"),
        energy_dtw,
    ),
    Measure(
        "mmd",
        "maximum mean discrepancy of records",
        "",
        "lower",
        ("mode_drop", "lead_swap", "mean_collapse"),
        lambda candidate, reference, _: mmd(candidate, reference),
    ),
    Measure(
        "sliced_wasserstein",
        "sliced Wasserstein distance of one-second windows",
        "mV",
        "lower",
        ("lead_swap", "mean_collapse"),
        sliced_wasserstein,
    ),
    Measure(
        "spectrum",
        "power spectrum",
        "dB",
        "lower",
        ("noise", "lead_swap", "mean_collapse", "double_speed"),
        mean_wasserstein("spectrum", power_db),
    ),
    Measure(
        "autocorrelation",
        "autocorrelation up to 2 s",
        "",
        "lower",
        ("mode_drop", "lead_swap", "double_speed"),
        mean_wasserstein("autocorrelation", autocorrelation),
    ),
    Measure(
        "amplitude",
        "distribution of amplitudes",
        "mV",
        "lower",
        ("noise", "lead_swap", "mean_collapse"),
        pooled_wasserstein(lambda signals, _: signals),
    ),
    Measure(
        "slope",
        "distribution of slopes",
        "mV/s",
        "lower",
        ("noise", "lead_swap", "mean_collapse", "time_reversal", "double_speed"),
        pooled_wasserstein(lambda signals, rate_hz: np.diff(signals, axis=2) * rate_hz),
    ),
    Measure(
        "lead_correlation",
        "correlation between leads",
        "",
        "lower",
        ("noise", "lead_swap"),
        mean_wasserstein("lead_correlation", lead_correlation),
    ),
    Measure(
        "discriminative",
        "discriminative score",
        "",
        "lower",
        ("noise", "mode_drop", "lead_swap", "mean_collapse", "time_reversal", "double_speed"),
        discriminative_score,
    ),
)
