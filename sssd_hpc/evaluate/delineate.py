"""What a cardiologist measures in one 12-lead record: rate, intervals, axis, amplitudes.

NeuroKit2 finds R peaks and the P and T waves; the only file that imports it. Which of its methods,
and where it is not asked, was decided against simulated records of known truth (`docs/log.md`):
prominence takes 5 ms a lead at 100 Hz and misses PR by 10 ms, dwt 60 ms and 60 ms, cwt finds no
QRS at all. In any one lead bundle branch blocks come out 60 ms too narrow, so QRS bounds come from
the steepness of all leads together. A record is refused with a reason; nothing is guessed.
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, resample_poly, sosfiltfilt

from sssd_hpc.ecg.leads import CHEST, EIGHT, LEADS, positions
from sssd_hpc.ecg.wfdb_io import GAIN_PER_MV, quality_flags

Array = NDArray[np.float64]

RATE_HZ = 500
"""Records are measured at this rate: at 100 Hz a sample is a tenth of a normal QRS."""
MIN_S = 4.0
MIN_BEATS = 3
MAX_S = 30.0
"""Seconds a record may take; it takes 0.02."""
R_SHARE = 0.25
"""An R peak is at least this share of the record's high ones."""
STEEPNESS_SHARE = 0.1
"""A QRS lasts while the leads are steeper than this share of their steepest."""
PAUSE_S = 0.024
BEFORE_S, AFTER_S = 0.15, 0.22
"""About the R peak: where the QRS may begin and end."""
P_WINDOW_S = (0.32, 0.02)
"""Before the QRS onset: where the P wave lies."""
P_BIN = 10
P_PRESENT = 0.5
"""Correlation between beats from which P waves are taken to be there."""
LOW_LIMB_MV, LOW_CHEST_MV = 0.5, 1.0

QUANTITIES = (
    "heart_rate", "rr_sd", "pr", "qrs", "qt", "qtc", "axis", "p_repeat", "p_wave",
    "r_transition", "low_limb", "low_chest", "lead_residual", *(f"r_{name}" for name in LEADS),
)  # fmt: skip
"""What `measure_record` returns, by name; `physiology.TITLES` says what each one is."""

_HIGH_PASS = butter(2, 0.5, "high", fs=RATE_HZ, output="sos")
_QRS_BAND = butter(2, (5, 25), "band", fs=RATE_HZ, output="sos")


class Unmeasurable(ValueError):  # noqa: N818 - no error: a record that cannot be measured
    """A record in which no beat can be measured; the message is the reason, for the report."""


def measure_record(signals_mv: NDArray[np.floating[Any]], rate_hz: int) -> dict[str, float]:
    """Return `QUANTITIES` of one record (12, L) in mV, leads in `LEADS` order.

    Intervals are in ms, the rate in 1/min, the axis in degrees, amplitudes in mV and the lead
    residual in uV; medians over the record's beats. A quantity that this record lacks (PR without
    P waves) is NaN.

    Raises:
        Unmeasurable: samples that are not finite, a flat or clipped lead, too short, too few beats,
            or NeuroKit2 gave up.
    """
    # Before the clock runs: an import that is interrupted stays broken.
    import neurokit2  # noqa: F401

    _refuse_unreadable(signals_mv, rate_hz)
    common = math.gcd(RATE_HZ, rate_hz)
    raw = np.asarray(signals_mv, dtype=np.float64)
    # An offset would ring at the ends of what the resampling takes for zero beyond.
    level = raw - np.median(raw, axis=1, keepdims=True)
    fine = resample_poly(level, RATE_HZ // common, rate_hz // common, axis=1)
    leads = sosfiltfilt(_HIGH_PASS, fine, axis=1)
    independent = leads[positions(LEADS, EIGHT)]
    with _time_limit(MAX_S):
        peaks = _r_peaks(independent)
        waves = [_waves(leads[LEADS.index(name)], peaks) for name in ("II", "V5")]
    begin, end = _qrs_bounds(independent, peaks)
    found = _rhythm(peaks) | _qrs(leads, peaks, begin, end)
    found["qrs"] = (end - begin) / RATE_HZ * 1000
    found["p_repeat"] = _p_repeat(leads[positions(LEADS, ("II", "V1"))], peaks + begin)
    found["p_wave"] = float(found["p_repeat"] > P_PRESENT)
    onsets = peaks + begin
    found["pr"] = math.nan
    if found["p_wave"]:
        before = _interval_ms(waves[0]["ECG_P_Onsets"], onsets, forward=False)
        found["pr"] = _median(before[(before > 60) & (before < 400)])
    after = np.concatenate([_interval_ms(w["ECG_T_Offsets"], onsets, forward=True) for w in waves])
    found["qt"] = _median(after[(after > 200) & (after < 700)])
    # Fridericia 1920: the cube root of RR in seconds.
    found["qtc"] = found["qt"] / (60 / found["heart_rate"]) ** (1 / 3)
    found["lead_residual"] = _lead_residual_uv(raw)
    return {name: float(found[name]) for name in QUANTITIES}


def _refuse_unreadable(signals_mv: NDArray[np.floating[Any]], rate_hz: int) -> None:
    if not np.isfinite(signals_mv).all():
        raise Unmeasurable("samples that are not finite")
    if signals_mv.shape[1] < MIN_S * rate_hz:
        raise Unmeasurable(f"shorter than {MIN_S:g} s")
    adc = np.clip(np.rint(np.asarray(signals_mv) * GAIN_PER_MV), -32768, 32767).astype(np.int16)
    flags = quality_flags(adc, rate_hz)
    if flags:
        raise Unmeasurable(f"a {flags[0].split(':')[0]} lead")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Give up on a record that takes too long; only a main thread can be interrupted."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Unmeasurable(f"took longer than {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)


@contextmanager
def _asking_neurokit() -> Iterator[None]:
    """Turn what NeuroKit2 raises on records it cannot read into a reason; hush its warnings."""
    import neurokit2

    try:
        with warnings.catch_warnings():
            for category in (neurokit2.misc.NeuroKitWarning, RuntimeWarning):
                warnings.simplefilter("ignore", category)
            yield
    except Unmeasurable:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise Unmeasurable("NeuroKit2 gave up") from error


def _r_peaks(independent: Array) -> NDArray[np.int64]:
    """Return the samples of the R peaks, found in what all leads have between 5 and 25 Hz.

    There every QRS points up and T waves, which slow hearts have high ones of, are low.
    """
    import neurokit2

    with _asking_neurokit():
        lead = np.sqrt((sosfiltfilt(_QRS_BAND, independent, axis=1) ** 2).mean(axis=0))
        _, info = neurokit2.ecg_peaks(lead, sampling_rate=RATE_HZ)
    peaks = np.asarray(info["ECG_R_Peaks"], dtype=np.int64)
    # In a long pause NeuroKit2's local threshold sinks to the T wave.
    if len(peaks):
        peaks = peaks[lead[peaks] > R_SHARE * np.percentile(lead[peaks], 90)]
    if len(peaks) < MIN_BEATS:
        raise Unmeasurable(f"fewer than {MIN_BEATS} beats")
    return peaks


def _waves(lead: Array, peaks: NDArray[np.int64]) -> Mapping[str, Any]:
    """Return the onsets and ends of a lead's waves, in samples."""
    import neurokit2

    with _asking_neurokit():
        _, waves = neurokit2.ecg_delineate(lead, peaks, sampling_rate=RATE_HZ, method="prominence")
    return {str(name): np.asarray(where, dtype=np.float64) for name, where in waves.items()}


def _interval_ms(points: Array, onsets: NDArray[np.int64], *, forward: bool) -> Array:
    """Return how far each point is from the QRS onset before it (forward) or after it."""
    points = points[np.isfinite(points)]
    place = np.searchsorted(onsets, points, side="right") - (1 if forward else 0)
    inside = (place >= 0) & (place < len(onsets))
    return np.asarray(
        np.abs(points[inside] - onsets[place[inside]]) / RATE_HZ * 1000, dtype=np.float64
    )


def _median(values: Array) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _cut(leads: Array, at: NDArray[np.int64], before: int, after: int) -> Array:
    """Return (beats, leads, before + after) about the samples `at`, whole beats only."""
    inside = at[(at >= before) & (at + after <= leads.shape[1])]
    if len(inside) < MIN_BEATS:
        raise Unmeasurable(f"fewer than {MIN_BEATS} beats")
    return np.stack([leads[:, k - before : k + after] for k in inside])


def _qrs_bounds(independent: Array, peaks: NDArray[np.int64]) -> tuple[int, int]:
    """Return where the QRS begins and ends, in samples from the R peak.

    The median beat's steepness in all leads together, less its resting level, about its greatest
    value; pauses of `PAUSE_S` belong to it.
    """
    before, after = round(BEFORE_S * RATE_HZ), round(AFTER_S * RATE_HZ)
    width = 7
    kernel = np.ones(width) / width
    smooth = np.stack([np.convolve(lead, kernel, "same") for lead in independent])
    steep = np.sqrt((np.gradient(smooth, axis=1) ** 2).sum(axis=0))
    beat = np.median(_cut(steep[None], peaks, before, after)[:, 0], axis=0)
    beat = beat - np.percentile(beat, 10)
    top = int(beat.argmax())
    moving = np.flatnonzero(beat > STEEPNESS_SHARE * beat[top])
    parts = np.split(moving, np.flatnonzero(np.diff(moving) > PAUSE_S * RATE_HZ) + 1)
    part = next(part for part in parts if part[0] <= top <= part[-1])
    return int(part[0]) - before, int(part[-1]) - before


def _rhythm(peaks: NDArray[np.int64]) -> dict[str, float]:
    rr_s = np.diff(peaks) / RATE_HZ
    return {"heart_rate": 60 / float(rr_s.mean()), "rr_sd": float(rr_s.std()) * 1000}


def _qrs(leads: Array, peaks: NDArray[np.int64], begin: int, end: int) -> dict[str, float]:
    """Return what the median beat's QRS shows, against its own level just before it."""
    rest = round(0.02 * RATE_HZ)
    cut = _cut(leads, peaks, rest - begin, max(end, 0) + 1)
    qrs = np.median(cut - cut[:, :, :rest].mean(axis=2, keepdims=True), axis=0)[:, rest:]
    r_mv, s_mv = np.maximum(qrs.max(axis=1), 0), np.maximum(-qrs.min(axis=1), 0)
    height = r_mv + s_mv
    chest = positions(LEADS, CHEST)
    limb = [k for k in range(len(LEADS)) if k not in chest]
    area_one, area_foot = qrs[positions(LEADS, ("I", "AVF"))].sum(axis=1)
    return {
        # AVF, augmented from two electrodes, sees sqrt(3)/2 of what a bipolar lead does.
        "axis": math.degrees(math.atan2(2 * area_foot, math.sqrt(3) * area_one)),
        "r_transition": _transition((r_mv - s_mv)[chest] / np.maximum(height[chest], 1e-9)),
        "low_limb": float((height[limb] < LOW_LIMB_MV).all()),
        "low_chest": float((height[chest] < LOW_CHEST_MV).all()),
        **{f"r_{name}": float(r_mv[k]) for k, name in enumerate(LEADS)},
    }


def _transition(balance: Array) -> float:
    """Return where from V1 (1) to V6 (6) R first outgrows S, between leads; 7 if nowhere."""
    above = np.flatnonzero(balance >= 0)
    if not len(above):
        return float(len(balance) + 1)
    k = int(above[0])
    return 1.0 if k == 0 else k + float(balance[k - 1] / (balance[k - 1] - balance[k]))


def _p_repeat(leads: Array, onsets: NDArray[np.int64]) -> float:
    """Return the correlation, from beat to beat, of what precedes the QRS: median over pairs.

    A P wave stands at the same distance before every QRS; fibrillatory waves do not. The median
    keeps some ectopic beats from hiding the P waves of the others.
    """
    first, last = (round(s * RATE_HZ) for s in P_WINDOW_S)
    windows = _cut(leads, onsets - last, first - last, 0)
    # Means of 20 ms: noise that is faster than any P wave would make beats differ.
    bins = windows.shape[2] // P_BIN
    windows = windows[:, :, -bins * P_BIN :].reshape(*windows.shape[:2], bins, P_BIN).mean(axis=3)
    steps = np.linspace(-1, 1, windows.shape[2])
    windows = windows - windows.mean(axis=2, keepdims=True)
    windows = windows - (windows @ steps / (steps @ steps))[:, :, None] * steps
    pairs = np.corrcoef(windows.reshape(len(windows), -1))[np.triu_indices(len(windows), 1)]
    return float(np.median(pairs))


def _lead_residual_uv(leads: Array) -> float:
    """Return by how much the limb leads break Einthoven's and Goldberger's laws, rms of the worst.

    III = II - I, AVR = -(I + II)/2, AVL = I - II/2, AVF = II - I/2. What rounding to whole
    microvolts explains, below 1 uV, breaks no law and is 0.
    """
    one, two, three, avr, avl, avf = leads[:6]
    residuals = [two - one - three, avr + (one + two) / 2, avl - one + two / 2, avf - two + one / 2]
    worst = max(float(np.sqrt((residual**2).mean())) for residual in residuals) * 1000
    return worst if worst >= 1.0 else 0.0
