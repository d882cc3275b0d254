"""Electrical signals of a simulated heart: a moving dipole seen by the electrodes of 12 leads.

Every wave of a beat is one or more Gaussian kernels times a 3-D vector, so a beat is a loop of the
vectorcardiogram and the eight independent leads are one matrix product away. ECGSYN integrates
differential equations whose limit cycle carries such kernels; here their sum is written down beat
by beat: closed form, no solver. This file knows no labels, patients or files.

Axes are Frank's: x to the patient's left, y to the feet, z to the back. Seconds and millivolts.

Sources:
    McSharry et al. 2003, "A dynamical model for generating synthetic electrocardiogram signals",
    IEEE Trans. Biomed. Eng. 50(3) (kernels, spectrum of RR).
    Sameni et al. 2007, "Multichannel ECG and Noise Modeling: Application to Maternal and Fetal ECG
    Signals" (kernels as a 3-D dipole, rotation by breathing).
    Clifford et al. 2010, "An artificial vector model for generating abnormal electrocardiographic
    rhythms" (T wave of two kernels, abnormal beats).
    Dower et al. 1980, "On deriving the electrocardiogram from vectorcardiographic leads", Clinical
    Cardiology 3, 87-95 (lead vectors).
    Stridh and Sornmo 2001, "Spatiotemporal QRST cancellation techniques for analysis of atrial
    fibrillation" (fibrillatory waves).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Conduction = Literal["normal", "crbbb", "clbbb"]

# Dower's lead vectors: rows I, II, V1..V6, columns x, y, z.
DOWER: Array = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# What the chest leads see of the atria, against a dipole at the heart's centre: V1 lies over the
# right atrium, V4..V6 far from both.
ATRIAL_GAIN: Array = np.array([1.0, 1.0, 1.3, 0.8, 0.6, 0.5, 0.5, 0.5])
# Electrodes LA, RA, LL, V1..V6 -> leads I, II, V1..V6 (V against Wilson's terminal).
ELECTRODES: Array = np.vstack(
    [
        [1, -1, 0, 0, 0, 0, 0, 0, 0],
        [0, -1, 1, 0, 0, 0, 0, 0, 0],
        np.hstack([np.full((6, 3), -1 / 3), np.eye(6)]),
    ]
)
# Kernels reach this many widths before they are cut.
REACH = 4.5


@dataclass(frozen=True)
class Waves:
    """Gaussian kernels: centres (n,) from the QRS onset, widths (n,), vectors (n, 3)."""

    centre_s: Array
    width_s: Array
    vector_mv: Array

    @classmethod
    def table(cls, rows: Sequence[Sequence[float]]) -> Waves:
        """Build from rows of centre (ms), width (ms), x, y, z (mV)."""
        values = np.array(rows, dtype=np.float64)
        return cls(values[:, 0] / 1000, values[:, 1] / 1000, values[:, 2:])

    def moved(self, shift_s: float = 0.0, stretch: float = 1.0) -> Waves:
        """Stretch in time about the origin, then shift."""
        return Waves(self.centre_s * stretch + shift_s, self.width_s * stretch, self.vector_mv)

    def turned(self, matrix: Array) -> Waves:
        """Apply a (3, 3) matrix to every vector."""
        return Waves(self.centre_s, self.width_s, self.vector_mv @ matrix.T)


def joined(parts: Sequence[Waves]) -> Waves:
    """Put the kernels of several waves into one beat."""
    return Waves(
        np.concatenate([part.centre_s for part in parts]),
        np.concatenate([part.width_s for part in parts]),
        np.concatenate([part.vector_mv for part in parts]),
    )


# P begins at 0 and lasts 100 ms: right atrium forward and down, then left atrium back and left.
P_WAVE = Waves.table([[36, 15, 0.045, 0.070, -0.045], [64, 16, 0.120, 0.055, 0.020]])

# Ventricular activation from the QRS onset. Normal: septum, apex and free wall, base.
QRS: dict[Conduction, Waves] = {
    "normal": Waves.table(
        [
            [15, 6.0, -0.12, -0.06, -0.24],
            [34, 8.0, 1.26, 0.80, 0.05],
            [50, 8.5, 0.24, 0.10, 0.95],
            [67, 8.5, -0.18, -0.16, 0.20],
        ]
    ),
    # The left ventricle as ever, then the right one late and slowly: right and forward.
    "crbbb": Waves.table(
        [
            [15, 6.0, -0.12, -0.05, -0.30],
            [35, 8.5, 1.05, 0.70, 0.05],
            [54, 10, 0.30, 0.15, 0.42],
            [98, 16, -0.50, -0.02, -0.72],
            [122, 12, -0.20, -0.02, -0.22],
        ]
    ),
    # Septum from right to left, then round the block: a notched plateau left and back.
    "clbbb": Waves.table(
        [
            [20, 8.0, 0.20, 0.05, -0.08],
            [46, 15, 0.78, 0.28, 0.75],
            [74, 19, 0.30, -0.26, 1.50],
            [104, 16, 0.86, -0.16, 0.90],
            [128, 10, 0.16, -0.05, 0.15],
        ]
    ),
}
QRS_END_S: dict[Conduction, float] = {"normal": 0.087, "crbbb": 0.146, "clbbb": 0.150}

# Repolarisation about the T peak; secondary to the blocks it opposes the late QRS.
T_WAVE: dict[Conduction, Waves] = {
    "normal": Waves.table(
        [
            [-120, 60, 0.040, 0.018, -0.035],
            [-42, 42, 0.175, 0.095, -0.135],
            [0, 30, 0.245, 0.130, -0.180],
        ]
    ),
    "crbbb": Waves.table(
        [
            [-110, 55, 0.030, 0.020, 0.030],
            [-42, 42, 0.150, 0.110, 0.060],
            [0, 30, 0.240, 0.120, 0.110],
        ]
    ),
    "clbbb": Waves.table(
        [
            [-150, 50, -0.070, -0.010, -0.230],
            [-90, 45, -0.080, 0.000, -0.250],
            [-35, 45, -0.150, 0.030, -0.370],
            [0, 30, -0.110, 0.030, -0.280],
        ]
    ),
}

# Ectopic beats by origin, slow from cell to cell; unit of the QRS vector, T opposes it.
ECTOPIC: dict[str, Waves] = {
    "right outflow": Waves.table(
        [
            [38, 16, 0.05, 0.35, 0.20],
            [72, 21, 0.42, 1.15, 1.15],
            [112, 20, 0.35, 0.75, 0.70],
        ]
    ),
    "right apex": Waves.table(
        [
            [38, 16, 0.35, -0.10, 0.25],
            [76, 22, 0.90, -0.75, 1.15],
            [116, 20, 0.65, -0.60, 0.60],
        ]
    ),
    "left ventricle": Waves.table(
        [
            [38, 16, -0.10, -0.25, -0.35],
            [74, 22, -0.60, -0.85, -0.95],
            [114, 20, -0.65, -0.55, -0.55],
        ]
    ),
}


def ectopic_beat(origin: str, qt_s: float) -> Waves:
    """Return a premature ventricular beat: wide QRS, no P, ST and T against the QRS."""
    qrs = ECTOPIC[origin]
    main = qrs.vector_mv.sum(axis=0)
    t_wave = Waves(
        np.array([-0.135, -0.045, 0.0]) + t_peak_s(qt_s),
        np.array([0.055, 0.048, 0.036]),
        np.outer([-0.07, -0.16, -0.13], main),
    )
    return joined([qrs, t_wave])


def t_peak_s(qt_s: float) -> float:
    """Place the T peak so that the T wave ends, within 2.4 of its last width, at `qt_s`."""
    return qt_s - 0.072


def rotation(degrees: Array) -> Array:
    """Return the (3, 3) rotation by `degrees` about x, then y, then z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)


def vectorcardiogram(beats: Sequence[tuple[float, Waves]], times_s: Array) -> Array:
    """Sum the kernels of `beats` (QRS onset, waves) over evenly spaced times (n,): (3, n) mV."""
    dipole = np.zeros((3, len(times_s)))
    rate_hz = 1 / (times_s[1] - times_s[0])
    for onset_s, waves in beats:
        centre = onset_s + waves.centre_s
        first = float((centre - REACH * waves.width_s).min())
        last = float((centre + REACH * waves.width_s).max())
        start = max(int((first - times_s[0]) * rate_hz), 0)
        stop = min(int((last - times_s[0]) * rate_hz) + 1, len(times_s))
        if start >= stop:
            continue
        phase = (times_s[start:stop] - centre[:, None]) / waves.width_s[:, None]
        dipole[:, start:stop] += waves.vector_mv.T @ np.exp(-0.5 * phase * phase)
    return dipole


def band_noise(
    shape: tuple[int, int], rate_hz: float, low_hz: float, high_hz: float, slope: float,
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """Draw rows of Gaussian noise of unit variance whose power falls as f^-slope inside a band.

    The rows are cut from longer periodic ones, so their ends do not join.
    """
    rows, length = shape
    size = 1 << int(np.ceil(np.log2(1.2 * length)))
    frequency = np.fft.rfftfreq(size, 1 / rate_hz)
    inside = np.flatnonzero((frequency >= low_hz) & (frequency <= high_hz))
    amplitude = frequency[inside] ** (-slope / 2)
    spectrum = np.zeros((rows, len(frequency)), dtype=np.complex128)
    draws = rng.standard_normal((2, rows, len(inside)))
    spectrum[:, inside] = (draws[0] + 1j * draws[1]) * amplitude * size
    noise = np.fft.irfft(spectrum, size, axis=1)[:, :length]
    return np.asarray(noise / (2 * np.sqrt(np.sum(amplitude**2))), dtype=np.float64)


def fibrillation(times_s: Array, rate_hz: float, rng: np.random.Generator) -> Array:
    """Return the atrial dipole (3, n) of fibrillation at about `rate_hz`, unit height.

    Three harmonics of a sawtooth whose frequency and height change slowly; each axis has its own
    phases, so that the dipole turns.

    Source: Stridh and Sornmo 2001, the simulated f waves.
    """
    step_s = times_s[1] - times_s[0]
    drift = band_noise((2, len(times_s)), 1 / step_s, 0.1, 1.2, 0.0, rng)
    angle = 2 * np.pi * np.cumsum(rate_hz * (1 + 0.10 * drift[0])) * step_s
    height = np.clip(1 + 0.35 * drift[1], 0.25, 2.0)
    axis = np.array([-0.20, 0.45, -0.60])
    waves = np.zeros((3, len(times_s)))
    for harmonic, share in ((1, 0.62), (2, 0.28), (3, 0.14)):
        phase = rng.uniform(-0.6, 0.6, size=(3, 1)) + rng.uniform(0, 2 * np.pi)
        waves += share * axis[:, None] * np.sin(harmonic * angle + phase)
    return np.asarray(height * waves, dtype=np.float64)


def rr_modulation(
    times_s: Array, breath_hz: float, low_to_high: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return (modulation of RR, breathing), each (n,) of about unit variance.

    The power spectrum of RR has a Gaussian peak at 0.1 Hz (Mayer waves) and one at the breathing
    frequency, their powers in the ratio `low_to_high`; phases are random.

    Source: McSharry et al. 2003, the bimodal spectrum of the RR tachogram.
    """
    size, step_hz = 1024, 1 / 128
    frequency = np.arange(1, 65) * step_hz
    parts = []
    for centre_hz, width_hz in ((0.1, 0.012), (breath_hz, 0.015)):
        amplitude = np.exp(-0.25 * ((frequency - centre_hz) / width_hz) ** 2)
        amplitude *= np.sqrt(2 / np.sum(amplitude**2))
        spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
        phase = rng.uniform(0, 2 * np.pi, size=len(frequency))
        spectrum[1:65] = 0.5 * size * amplitude * np.exp(1j * phase)
        parts.append(np.fft.irfft(spectrum, size))
    grid_s = np.arange(size) / (size * step_hz) + times_s[0]
    low, breath = (np.interp(times_s, grid_s, part) for part in parts)
    share = low_to_high / (1 + low_to_high)
    return np.sqrt(share) * low + np.sqrt(1 - share) * breath, breath


def electrode_noise(length: int, rate_hz: float, rng: np.random.Generator) -> Array:
    """Return noise in the eight leads (8, length), made at the nine electrodes, at PTB-XL's levels.

    Baseline wander below 0.7 Hz, muscle noise from 15 to 150 Hz that is stronger at the limbs,
    50 Hz hum in phase everywhere but of different height, and the amplifier's white noise.
    """
    times_s = np.arange(length) / rate_hz

    def height(typical_mv: float, records: float, electrodes: float) -> Array:
        spread = rng.normal(0.0, records) + rng.normal(0.0, electrodes, size=(9, 1))
        return np.asarray(typical_mv * np.exp(spread), dtype=np.float64)

    wander = height(0.030, 0.6, 0.3) * band_noise((9, length), rate_hz, 0.05, 0.7, 1.6, rng)
    muscle = height(0.003, 0.6, 0.3) * band_noise((9, length), rate_hz, 15.0, 150.0, 0.5, rng)
    muscle[3:] *= 0.6
    mains_hz = 50 + rng.normal(0.0, 0.02)
    hum = np.sin(2 * np.pi * mains_hz * times_s + rng.uniform(0, 2 * np.pi))
    amplifier = 0.0012 * rng.standard_normal((9, length))
    return ELECTRODES @ (wander + muscle + height(0.0015, 0.0, 0.5) * hum + amplifier)


@functools.cache
def _low_pass(factor: int, reach: int) -> Array:
    """Return a windowed sinc (2 reach + 1,), sum one, that cuts at 0.86 of the new Nyquist rate."""
    taps = np.arange(-reach, reach + 1)
    kernel = np.sinc(0.86 * taps / factor) * np.kaiser(len(taps), 6.0)
    return np.asarray(kernel / kernel.sum(), dtype=np.float64)


def decimated(leads: Array, factor: int, reach: int) -> Array:
    """Filter against aliases without phase shift, keep every `factor`-th sample, drop the margins.

    (8, n + 2 reach) -> (8, n / factor); the margins of `reach` samples feed the filter.
    """
    windows = np.lib.stride_tricks.sliding_window_view(leads, 2 * reach + 1, axis=1)
    return np.asarray(windows[:, ::factor] @ _low_pass(factor, reach), dtype=np.float64)
