from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sssd_hpc import files
from sssd_hpc.ecg import dipole, ptbxl, simulate, statements, wfdb_io
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.errors import UserError

Array = NDArray[np.float64]
RATE_HZ = 500
PER_KIND = 8
SEED = 5
WIDE = ("right bundle branch block", "left bundle branch block")


@dataclass
class Beats:
    """What a reader measures in one record: QRS times, the median beat, rate and intervals."""

    signals_mv: Array
    peaks_s: Array
    median_mv: Array
    """(12, n) from -0.45 s to 0.55 s about the middle of the QRS."""

    def lead(self, name: str, start_s: float, stop_s: float) -> Array:
        start, stop = (round((0.45 + s) * RATE_HZ) for s in (start_s, stop_s))
        return self.median_mv[LEADS.index(name), start:stop]

    @property
    def rr_s(self) -> Array:
        return np.diff(self.peaks_s)

    @property
    def rate_per_min(self) -> float:
        return 60 / float(self.rr_s.mean())

    @property
    def qrs_s(self) -> tuple[float, float]:
        """Onset and end of the QRS: where the 12 leads together move, pauses of 24 ms included."""
        smooth = np.stack([np.convolve(lead, np.ones(7) / 7, "same") for lead in self.median_mv])
        speed = np.sqrt((np.gradient(smooth, axis=1) ** 2).sum(axis=0))
        middle = round(0.45 * RATE_HZ)
        speed = speed[middle - 75 : middle + 90]
        moving = np.flatnonzero(speed > 0.15 * speed.max())
        parts = np.split(moving, np.flatnonzero(np.diff(moving) > 12) + 1)
        part = next(part for part in parts if part[0] <= speed.argmax() <= part[-1])
        return (part[0] - 75) / RATE_HZ, (part[-1] - 75) / RATE_HZ

    @property
    def qrs_width_s(self) -> float:
        return self.qrs_s[1] - self.qrs_s[0]

    @property
    def pr_s(self) -> float:
        """From the first tenth of the P wave, seen in lead II, to the QRS onset."""
        onset_s = self.qrs_s[0]
        wave = self.lead("II", onset_s - 0.34, onset_s - 0.02)
        wave = wave - np.linspace(wave[:10].mean(), wave[-5:].mean(), len(wave))
        top = int(np.argmax(wave))
        before = np.flatnonzero(wave[:top] < 0.1 * wave[top])
        return 0.34 - (before[-1] if len(before) else 0) / RATE_HZ


def measure(adc: NDArray[np.int16]) -> Beats:
    """Find QRS complexes by their steepness, strongest first; what follows one weakly is its T."""
    signals = adc / 1000.0
    steep = np.sqrt((np.diff(signals, axis=1) ** 2).sum(axis=0))
    energy = np.convolve(steep, np.ones(45) / 45, "same")
    tops = 1 + np.flatnonzero((energy[1:-1] >= energy[:-2]) & (energy[1:-1] > energy[2:]))
    tops = tops[energy[tops] > 0.30 * np.percentile(energy, 99)]
    peaks: list[int] = []
    for top in sorted(tops, key=lambda k: -energy[k]):
        distances = [(abs(top - p) / RATE_HZ, energy[top] / energy[p]) for p in peaks]
        if all(d > 0.36 or (d > 0.24 and share > 0.75) for d, share in distances):
            peaks.append(int(top))
    return measure_at(signals, *(np.array(sorted(peaks)) / RATE_HZ))


def measure_at(signals: Array, *peaks_s: float) -> Beats:
    """Average the beats at the given times by the median."""
    before, after = round(0.45 * RATE_HZ), round(0.55 * RATE_HZ)
    peaks = [round(peak_s * RATE_HZ) for peak_s in peaks_s]
    inside = [p for p in peaks if p >= before and p + after <= signals.shape[1]]
    cut = np.stack([signals[:, p - before : p + after] for p in inside])
    rest = slice(before - round(0.10 * RATE_HZ), before - round(0.07 * RATE_HZ))
    cut = cut - cut[:, :, rest].mean(axis=2, keepdims=True)
    return Beats(signals, np.array(peaks_s), np.median(cut, axis=0))


@pytest.fixture(scope="module")
def records() -> dict[str, list[Beats]]:
    """Eight measured records of each kind."""
    found: dict[str, list[Beats]] = {kind: [] for kind in simulate.KINDS}
    index = 0
    while any(len(beats) < PER_KIND for beats in found.values()):
        where = simulate.place(SEED, index)
        index += 1
        if len(found[where.kind]) < PER_KIND:
            high, _ = simulate.simulate_record(SEED, where)
            found[where.kind].append(measure(high))
    return found


def median(values: list[float]) -> float:
    return float(np.median(values))


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("normal", 60, 100),
        ("first degree block", 60, 100),
        ("bradycardia", 38, 60),
        ("tachycardia", 100, 140),
        *[(kind, 58, 100) for kind in WIDE],
    ],
)
def test_every_record_has_the_rate_of_its_kind(
    records: dict[str, list[Beats]], kind: str, low: float, high: float
) -> None:
    assert all(low < beats.rate_per_min < high for beats in records[kind])


@pytest.mark.parametrize("kind", ["normal", "bradycardia", "tachycardia", "first degree block"])
def test_narrow_beats_last_less_than_120_ms(records: dict[str, list[Beats]], kind: str) -> None:
    widths = [beats.qrs_width_s for beats in records[kind]]
    assert min(widths) > 0.060
    assert max(widths) < 0.115


@pytest.mark.parametrize("kind", WIDE)
def test_bundle_branch_blocks_last_120_ms_or_more(
    records: dict[str, list[Beats]], kind: str
) -> None:
    widths = [beats.qrs_width_s for beats in records[kind]]
    assert min(widths) >= 0.120
    assert max(widths) < 0.190


def test_pr_is_long_in_first_degree_block_and_normal_elsewhere(
    records: dict[str, list[Beats]],
) -> None:
    assert all(0.200 < beats.pr_s < 0.340 for beats in records["first degree block"])
    assert all(0.110 < beats.pr_s < 0.205 for beats in records["normal"])


def test_rr_is_irregular_in_fibrillation_alone(records: dict[str, list[Beats]]) -> None:
    def variation(beats: Beats) -> float:
        return float(beats.rr_s.std() / beats.rr_s.mean())

    assert min(variation(beats) for beats in records["fibrillation"]) > 0.09
    assert max(variation(beats) for beats in records["normal"]) < 0.08
    # Irregularly irregular: an interval says nothing of the next one.
    pairs = [
        (beats.rr_s[:-1] - beats.rr_s.mean(), beats.rr_s[1:] - beats.rr_s.mean())
        for beats in records["fibrillation"]
    ]
    first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_fibrillation_has_no_p_wave(records: dict[str, list[Beats]]) -> None:
    def p_height(beats: Beats) -> float:
        wave = beats.lead("II", -0.26, -0.07)
        return float(wave.max() - np.median(wave))

    with_p = [p_height(beats) for beats in records["normal"]]
    without = [p_height(beats) for beats in records["fibrillation"]]
    assert min(with_p) > 0.05
    assert median(without) < 0.35 * median(with_p)


def test_f_waves_have_4_to_9_hz_and_are_highest_in_v1() -> None:
    times_s = np.arange(0, 10, 1 / RATE_HZ)
    for seed in range(5):
        waves = dipole.fibrillation(times_s, 6.0, np.random.default_rng(seed))
        leads = dipole.ATRIAL_GAIN[:, None] * (dipole.DOWER @ waves)
        power = (np.abs(np.fft.rfft(leads, axis=1)) ** 2).sum(axis=0)
        frequency = np.fft.rfftfreq(len(times_s), 1 / RATE_HZ)
        assert 4 < frequency[np.argmax(power)] < 9
        assert power[(frequency > 3.5) & (frequency < 30)].sum() > 0.97 * power.sum()
        names = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
        height = dict(zip(names, leads.std(axis=1), strict=True))
        assert max(height, key=height.__getitem__) == "V1"
        assert height["II"] > height["I"]
        assert height["II"] > height["V5"]


def test_right_bundle_branch_block_has_rsr_in_v1_and_wide_s_in_i_and_v6(
    records: dict[str, list[Beats]],
) -> None:
    for beats in records["right bundle branch block"]:
        start_s, stop_s = beats.qrs_s
        v1 = beats.lead("V1", start_s, stop_s)
        trough = int(np.argmin(v1))
        assert v1[:trough].max() > 0.05
        assert v1[trough] < -0.10
        assert v1[trough:].max() > max(0.3, v1[:trough].max())
        late = [beats.lead(name, stop_s - 0.075, stop_s - 0.025).mean() for name in ("I", "V6")]
        assert max(late) < -0.08
        t_wave = beats.lead("V1", stop_s + 0.08, stop_s + 0.25)
        assert t_wave.min() < -0.04
        assert abs(t_wave.min()) > t_wave.max()


def test_left_bundle_branch_block_is_negative_in_v1_and_positive_in_v6(
    records: dict[str, list[Beats]],
) -> None:
    for beats in records["left bundle branch block"]:
        start_s, stop_s = beats.qrs_s
        v1, v6, one = (beats.lead(name, start_s, stop_s) for name in ("V1", "V6", "I"))
        assert v1.min() < -0.6
        assert v1.max() < 0.35 * -v1.min()
        assert v6.max() > 0.4
        # No septal q: nothing negative before the R.
        assert v6[: int(np.argmax(v6))].min() > -0.05
        assert one[: int(np.argmax(one))].min() > -0.05
        # ST and T point away from the QRS.
        assert beats.lead("V1", stop_s + 0.05, stop_s + 0.20).mean() > 0.1
        assert beats.lead("V6", stop_s + 0.05, stop_s + 0.20).mean() < -0.05


def test_left_bundle_branch_block_notches_r_in_lateral_leads(
    records: dict[str, list[Beats]],
) -> None:
    notched = 0
    for beats in records["left bundle branch block"]:
        slopes = [np.diff(np.convolve(beats.lead(n, *beats.qrs_s), np.ones(5) / 5, "valid"))
                  for n in ("I", "AVL", "V5", "V6")]  # fmt: skip
        turns = [int(((slope[:-1] > 0) & (slope[1:] <= 0)).sum()) for slope in slopes]
        notched += max(turns) >= 2
    assert notched >= PER_KIND - 1


def test_premature_beats_are_early_and_fully_compensated(records: dict[str, list[Beats]]) -> None:
    for beats in records["premature beats"]:
        pairs = list(zip(beats.rr_s[:-1], beats.rr_s[1:], strict=True))
        early = [k for k, (short, long) in enumerate(pairs) if short < 0.75 * long]
        assert early
        kept = [rr for k, rr in enumerate(beats.rr_s) if k not in early and k - 1 not in early]
        if kept:
            around_s = np.mean([sum(pairs[k]) for k in early])
            assert around_s == pytest.approx(2 * np.mean(kept), rel=0.05)


def test_premature_beats_are_wide(records: dict[str, list[Beats]]) -> None:
    for beats in records["premature beats"]:
        early = int(np.argmin(beats.rr_s)) + 1
        usual, ectopic = (
            measure_at(beats.signals_mv, peak) for peak in beats.peaks_s[early - 1 : early + 1]
        )
        assert usual.qrs_width_s < 0.115
        assert ectopic.qrs_width_s >= 0.120


def test_p_waves_march_through_premature_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(k for k in range(40) if simulate.place(SEED, k).kind == "premature beats")
    onsets: list[Array] = []
    draw = dipole.vectorcardiogram

    def spy(beats: list[tuple[float, dipole.Waves]], times_s: Array) -> Array:
        onsets.append(np.array([onset_s for onset_s, _ in beats]))
        return draw(beats, times_s)

    monkeypatch.setattr(dipole, "vectorcardiogram", spy)
    simulate.eight_leads(SEED, simulate.place(SEED, index))
    ventricles, atria = onsets
    assert np.diff(atria).std() < 0.06 * np.diff(atria).mean()
    ectopic = np.setdiff1d(ventricles, atria)
    blocked = np.setdiff1d(atria, ventricles)
    assert len(ectopic) == len(blocked) >= 1
    # Each ectopic beat comes before the P wave of the sinus beat that it blocks.
    assert ((blocked - ectopic > 0.12) & (blocked - ectopic < 0.5)).all()


def test_ectopic_t_wave_opposes_its_qrs() -> None:
    times_s = np.arange(-0.1, 0.7, 1 / RATE_HZ)
    for origin in dipole.ECTOPIC:
        loop = dipole.vectorcardiogram([(0.0, dipole.ectopic_beat(origin, 0.42))], times_s)
        leads = dipole.DOWER @ loop
        qrs, t_wave = leads[:, times_s < 0.17].sum(axis=1), leads[:, times_s > 0.22].sum(axis=1)
        large = np.abs(qrs) > 0.3 * np.abs(qrs).max()
        assert (qrs[large] * t_wave[large] < 0).all()
        size = np.sqrt((np.diff(loop, axis=1) ** 2).sum(axis=0))
        active = times_s[1:][size > 0.05 * size.max()]
        assert active[active < 0.2].max() - active.min() > 0.12


def test_normal_records_have_r_progression_and_normal_t(records: dict[str, list[Beats]]) -> None:
    peaks = [
        [float(beats.lead(f"V{k}", -0.07, 0.07).max()) for k in range(1, 7)]
        for beats in records["normal"]
    ]
    troughs = [
        [float(beats.lead(f"V{k}", -0.07, 0.07).min()) for k in range(1, 7)]
        for beats in records["normal"]
    ]
    r_mv, s_mv = np.median(peaks, axis=0), np.median(troughs, axis=0)
    assert (np.diff(r_mv[:4]) > 0).all()
    assert -s_mv[0] > r_mv[0]
    assert -s_mv[1] > r_mv[1]
    assert r_mv[4] > -s_mv[4]
    assert r_mv[5] > -s_mv[5]
    t_wave = [median([float(b.lead(n, 0.15, 0.4).max()) for b in records["normal"]])
              for n in ("II", "V3", "V5")]  # fmt: skip
    assert min(t_wave) > 0.1
    assert median([float(b.lead("AVR", -0.07, 0.07).min()) for b in records["normal"]]) < -0.4


def test_qt_shortens_with_the_rate(records: dict[str, list[Beats]]) -> None:
    def t_peak_s(beats: Beats) -> float:
        wave = beats.lead("V3", 0.12, min(0.5, float(beats.rr_s.mean()) - 0.18))
        return 0.12 + int(np.argmax(wave)) / RATE_HZ

    slow, fast = (median([t_peak_s(b) for b in records[k]]) for k in ("bradycardia", "tachycardia"))
    assert slow > fast + 0.06


def test_amplitudes_and_noise_lie_where_real_records_have_them(
    records: dict[str, list[Beats]],
) -> None:
    every = [beats for kind in records.values() for beats in kind]
    assert all(0.2 < np.ptp(beats.signals_mv) < 12 for beats in every)
    normal = records["normal"]
    # Medians in PTB-XL: R in II 0.9 mV, S in V2 -1.3 mV, R in V5 1.3 mV.
    assert 0.6 < median([float(b.lead("II", -0.06, 0.06).max()) for b in normal]) < 1.4
    assert -2.0 < median([float(b.lead("V2", -0.06, 0.06).min()) for b in normal]) < -0.8
    assert 0.9 < median([float(b.lead("V5", -0.06, 0.06).max()) for b in normal]) < 1.9
    wander, muscle, mains = [], [], []
    for beats in normal:
        power = np.abs(np.fft.rfft(beats.signals_mv * np.hanning(5000), axis=1) / 5000) ** 2
        frequency = np.fft.rfftfreq(5000, 1 / RATE_HZ)
        wander.append(float(np.sqrt(power[:, (frequency > 0) & (frequency < 0.6)].sum(1)).mean()))
        muscle.append(float(np.sqrt(power[:, (frequency > 70)].sum(1)).mean()))
        mains.append(float(np.sqrt(power[:, np.abs(frequency - 50) < 0.3].sum(1)).mean()))
    assert 0.004 < median(wander) < 0.1
    assert 0.0004 < median(muscle) < 0.010
    assert 0.0001 < median(mains) < 0.005


@pytest.mark.parametrize("rate", [500, 100])
def test_limb_leads_obey_einthoven_and_goldberger_to_rounding(rate: int) -> None:
    for index in range(8):
        pair = simulate.simulate_record(SEED, simulate.place(SEED, index))
        adc = pair[0 if rate == 500 else 1].astype(int)
        one, two, three, right, left, foot = adc[:6]
        assert (three == two - one).all()
        assert np.abs(2 * right + one + two).max() <= 1
        assert np.abs(2 * left - 2 * one + two).max() <= 1
        assert np.abs(2 * foot - 2 * two + one).max() <= 1


def test_rr_spectrum_has_a_slow_peak_and_one_at_the_breathing_rate() -> None:
    times_s = np.arange(0, 128, 0.25)
    series, breath = dipole.rr_modulation(times_s, 0.25, 1.0, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(series)) ** 2
    frequency = np.fft.rfftfreq(len(times_s), 0.25)
    slow = power[(frequency > 0.06) & (frequency < 0.14)].sum()
    fast = power[(frequency > 0.21) & (frequency < 0.29)].sum()
    assert slow + fast > 0.95 * power.sum()
    assert slow / fast == pytest.approx(1.0, rel=0.15)
    assert series.std() == pytest.approx(1.0, abs=0.1)
    peak = frequency[np.argmax(np.abs(np.fft.rfft(breath)))]
    assert peak == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("tone_hz", "low", "high"), [(5, 0.99, 1.01), (35, 0.97, 1.03),
                                                      (52, 0, 0.02), (80, 0, 0.002)])  # fmt: skip
def test_decimation_keeps_the_band_and_stops_aliases(
    tone_hz: float, low: float, high: float
) -> None:
    times_s = (np.arange(5200) - 100) / RATE_HZ
    slow = dipole.decimated(np.sin(2 * np.pi * tone_hz * times_s)[None], 5, 100)
    assert slow.shape == (1, 1000)
    assert low <= float(slow.std() * np.sqrt(2)) <= high


def test_both_rates_show_the_same_signal_at_the_same_time() -> None:
    high, low = simulate.simulate_record(SEED, simulate.place(SEED, 3))
    assert high.shape == (12, 5000)
    assert low.shape == (12, 1000)
    assert np.corrcoef(high[1, ::5], low[1])[0, 1] > 0.995


def test_records_depend_on_seed_and_index_alone() -> None:
    first = simulate.simulate_record(1, simulate.place(1, 17))
    again = simulate.simulate_record(1, simulate.place(1, 17))
    other = simulate.simulate_record(2, simulate.place(2, 17))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).mean() > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_kind_reaches_training_validation_and_test_folds(seed: int) -> None:
    places = [simulate.place(seed, index) for index in range(60)]
    groups = {(p.kind, min(p.strat_fold, 9) if p.strat_fold < 9 else p.strat_fold) for p in places}
    for kind in simulate.KINDS:
        folds = {fold for name, fold in groups if name == kind}
        assert {9, 10} < folds
    assert {p.kind for p in places[:8]} == set(simulate.KINDS)


def test_folds_are_balanced_and_patients_disjoint_and_sometimes_back() -> None:
    places = [simulate.place(0, index) for index in range(2000)]
    counts = np.bincount([p.strat_fold for p in places], minlength=11)[1:]
    assert counts.min() > 0.95 * 200
    assert counts.max() < 1.05 * 200
    folds: dict[int, set[int]] = {}
    visits: dict[int, int] = {}
    for p in places:
        folds.setdefault(p.patient, set()).add(p.strat_fold)
        visits[p.patient] = visits.get(p.patient, 0) + 1
    assert all(len(found) == 1 for found in folds.values())
    assert set(visits.values()) == {1, 2}
    assert 0.05 < sum(count == 2 for count in visits.values()) / len(visits) < 0.3


def test_a_returning_patient_keeps_the_shape_of_the_heart() -> None:
    places = [simulate.place(0, index) for index in range(400)]
    by_patient: dict[int, list[simulate.Place]] = {}
    for p in places:
        if p.kind == "normal":
            by_patient.setdefault(p.patient, []).append(p)
    pairs = [found for found in by_patient.values() if len(found) == 2][:6]
    singles = [found[0] for found in by_patient.values()][:12]

    def shape(p: simulate.Place) -> Array:
        beats = measure(simulate.simulate_record(0, p)[0])
        return beats.median_mv[:, 200:250].ravel()

    same = [np.corrcoef(shape(a), shape(b))[0, 1] for a, b in pairs]
    other = [
        np.corrcoef(shape(a), shape(b))[0, 1]
        for a, b in zip(singles[::2], singles[1::2], strict=True)
    ]
    assert median(same) > 0.98
    assert median(same) > median(other)


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    simulate.simulate(tmp_path / "small", num_records=6, seed=3)
    simulate.simulate(tmp_path / "large", num_records=11, seed=3)
    small, large = tree(tmp_path / "small"), tree(tmp_path / "large")
    records = [name for name in small if name.startswith("records")]
    assert len(records) == 6 * 4
    assert all(small[name] == large[name] for name in records)
    simulate.simulate(tmp_path / "small", num_records=11, seed=3)
    assert tree(tmp_path / "small") == large


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    simulate.simulate(tmp_path / "whole", num_records=5, seed=3)
    left = [writes]
    write: Callable[..., None] = wfdb_io.write_record

    def stopping(*args: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(simulate, "write_record", stopping)
        with pytest.raises(KeyboardInterrupt):
            simulate.simulate(tmp_path / "part", num_records=5, seed=3)
    # A power failure may also cut a file short and leave a temporary one.
    folder = tmp_path / "part" / "records100" / "00000"
    if writes == 5:
        data = folder / "00001_lr.dat"
        data.write_bytes(data.read_bytes()[:-7])
    (folder / ".tmp-00009_lr.dat-1-abc").write_bytes(b"half")
    (tmp_path / "part" / ".tmp-RECORDS-1-abc").write_bytes(b"half")
    simulate.simulate(tmp_path / "part", num_records=5, seed=3)
    assert tree(tmp_path / "part") == tree(tmp_path / "whole")


def test_a_run_killed_at_its_first_write_continues(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{simulate.NOTE}-1-abc").write_text('{"seed"')
    simulate.simulate(tmp_path, num_records=2, seed=0)
    assert not list(tmp_path.glob(".tmp-*"))


def test_two_processes_do_not_simulate_into_one_root(tmp_path: Path) -> None:
    simulate.simulate(tmp_path, num_records=2, seed=0)
    with (
        files.locked(tmp_path / simulate.NOTE, "held"),
        pytest.raises(UserError, match="another process is simulating"),
    ):
        simulate.simulate(tmp_path, num_records=2, seed=0)


def test_whole_records_are_kept_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate.simulate(tmp_path, num_records=3, seed=0)

    def never(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(simulate, "write_record", never)
    simulate.simulate(tmp_path, num_records=3, seed=0)


def test_the_root_prepares_and_its_labels_encode(tmp_path: Path) -> None:
    root = tmp_path / "root"
    simulate.simulate(root, num_records=24, seed=0)
    table = ptbxl.read_table(root)
    assert len(table.rows) == 24
    known = statements.load_statements(root)
    names = statements.label_names("all", known)
    for row in table.rows:
        assert set(row.scp_codes) <= set(names)
    store = prepare(root, tmp_path / "store")
    assert store.num_records == 24
    assert store.length == 1000
    used = {name for name, any_one in zip(names, store.labels.any(axis=0), strict=True) if any_one}
    assert used == {"NORM", "SR", "AFIB", "1AVB", "CRBBB", "CLBBB", "PVC", "SBRAD", "STACH"}
    assert prepare(root, tmp_path / "fast", rate=500).length == 5000


@pytest.mark.parametrize(
    ("num_records", "seed"), [(0, 0), (-1, 0), (100_000, 0), (5, -1), (5, 2**63)]
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, num_records: int, seed: int) -> None:
    with pytest.raises(UserError, match="simulate --"):
        simulate.simulate(tmp_path / "root", num_records=num_records, seed=seed)
    assert not (tmp_path / "root").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        simulate.simulate(tmp_path, num_records=2, seed=0)
    with pytest.raises(UserError, match="is a file"):
        simulate.simulate(tmp_path / "notes.txt", num_records=2, seed=0)
    root = tmp_path / "root"
    simulate.simulate(root, num_records=2, seed=0)
    before = tree(root)
    with pytest.raises(UserError, match="another seed"):
        simulate.simulate(root, num_records=2, seed=1)
    with pytest.raises(UserError, match="holds 2 records"):
        simulate.simulate(root, num_records=1, seed=0)
    assert tree(root) == before
