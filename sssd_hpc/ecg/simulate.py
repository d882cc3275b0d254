"""The embedded data set: simulated, labelled 12-lead ECGs in PTB-XL's layout, fixed by a seed.

Eight kinds of record with the statements that a cardiologist would give them, patients who differ
and sometimes come twice, patient-disjoint folds. Record k depends on the seed and k alone, so a
smaller set is the beginning of a larger one. Signals come from `dipole`. They teach and test the
pipeline and refuse to stand for patients: no ischaemia, hypertrophy, drugs or electrode faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg import dipole
from sssd_hpc.ecg.dipole import Array, Conduction, Waves
from sssd_hpc.ecg.ptbxl import PtbxlRow, finish_root
from sssd_hpc.ecg.wfdb_io import GAIN_PER_MV, is_whole, write_record
from sssd_hpc.errors import UserError
from sssd_hpc.files import is_temporary, locked, read_json, remove_temporaries, write_json
from sssd_hpc.progress import Progress

RATE_HZ = 500
DURATION_S = 10
DECIMATION = 5
# Samples kept beside the record at 500 Hz: what the anti-alias filter reaches.
MARGIN = 100
MAX_RECORDS = 99_999
NOTE = "simulate.json"
"""What a root holds or will hold: seed, version and number of records."""
VERSION = 1
"""Raised when the same seed would give other signals."""

CARD = """# Simulated 12-lead ECGs

{num_records} simulated records of ten seconds, 500 Hz and 100 Hz, in PTB-XL's layout: made by
`sssd-hpc simulate --records {num_records} --seed {seed}`, signal version {version}.

No patient stands behind any of them. Beats are Gaussian kernels of a moving dipole (after McSharry
et al. 2003, Sameni et al. 2007, Clifford et al. 2010) seen through Dower's lead vectors; noise has
the levels measured in PTB-XL. Eight kinds of record: normal sinus rhythm, atrial fibrillation,
first degree AV block, complete right and left bundle branch block, premature ventricular beats,
sinus bradycardia and tachycardia. `scp_codes`, `patient_id` and `strat_fold` mean what they mean in
PTB-XL; columns about real patients are empty.

For teaching, tests and demonstrations, not for clinical conclusions. Free for any use (CC0 1.0).
"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of record: its statements (as in `scp_codes`) and what makes it."""

    scp_codes: Mapping[str, float]
    rate_per_min: tuple[float, float, float]
    """Mean, standard deviation, then the distance from the mean that is never passed."""
    conduction: Conduction = "normal"
    pr_s: tuple[float, float] = (0.125, 0.185)
    fibrillating: bool = False
    ectopic: bool = False


KINDS: dict[str, Kind] = {
    "normal": Kind(scp_codes={"NORM": 100.0, "SR": 0.0}, rate_per_min=(75, 9, 13)),
    "fibrillation": Kind(scp_codes={"AFIB": 0.0}, rate_per_min=(94, 22, 38), fibrillating=True),
    "first degree block": Kind(
        scp_codes={"1AVB": 100.0, "SR": 0.0}, rate_per_min=(72, 7, 9), pr_s=(0.225, 0.310)
    ),
    "right bundle branch block": Kind(
        scp_codes={"CRBBB": 100.0, "SR": 0.0}, rate_per_min=(74, 9, 12), conduction="crbbb"
    ),
    "left bundle branch block": Kind(
        scp_codes={"CLBBB": 100.0, "SR": 0.0}, rate_per_min=(76, 9, 12), conduction="clbbb"
    ),
    "premature beats": Kind(
        scp_codes={"PVC": 100.0, "SR": 0.0}, rate_per_min=(74, 8, 11), ectopic=True
    ),
    "bradycardia": Kind(scp_codes={"NORM": 80.0, "SBRAD": 0.0}, rate_per_min=(50, 4, 7)),
    "tachycardia": Kind(
        scp_codes={"NORM": 80.0, "STACH": 0.0}, rate_per_min=(117, 9, 13), pr_s=(0.115, 0.150)
    ),
}
# Of every 20 records: PTB-XL's order of frequency, the rare kinds made less rare. The first eight
# of a block hold every kind once, so that small sets do too.
BLOCK: tuple[str, ...] = (
    *KINDS,
    *["normal"] * 8, "fibrillation", "premature beats", "first degree block", "tachycardia",
)  # fmt: skip
KIND_NAMES = tuple(KINDS)


@dataclass(frozen=True)
class Place:
    """Where record `index` stands: its kind, patient and fold."""

    index: int
    kind: str
    patient: int
    strat_fold: int


def _generator(seed: int, *stream: int) -> np.random.Generator:
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.random.Generator(np.random.Philox(sequence))


def place(seed: int, index: int) -> Place:
    """Say which kind, patient and fold record `index` (from 0) has.

    The occurrences of a kind go round the ten folds, beginning with one training fold, 9 and 10,
    so that three records of a kind reach all three groups. A patient's second record comes ten
    occurrences after the first, hence lies in the same fold.
    """
    block, position = divmod(index, len(BLOCK))
    rng = _generator(seed, 0, block)
    first, rest = len(KINDS), len(BLOCK) - len(KINDS)
    order = [*rng.permutation(first), *(first + rng.permutation(rest))]
    kind = BLOCK[order[position]]
    earlier = sum(BLOCK[slot] == kind for slot in order[:position])
    occurrence = block * BLOCK.count(kind) + earlier
    number = KIND_NAMES.index(kind)
    training = [1 + (number + step) % 8 for step in range(8)]
    folds = [training[0], 9, 10, *training[1:]]
    again = (occurrence // 10) % 2 == 1 and _generator(seed, 1, index).random() < 0.3
    person = occurrence - 10 if again else occurrence
    return Place(index, kind, 1 + number + len(KINDS) * person, folds[occurrence % 10])


@dataclass(frozen=True)
class Patient:
    """What stays with a patient from record to record."""

    qrs: Array
    """(3, 3): turn of the heart in the chest times its height."""
    t_wave: Array
    p_wave: Array
    qrs_stretch: float
    pr_share: float
    """Where in the kind's range of PR intervals, 0 to 1."""
    qtc_s: float
    leads: Array
    """(8, 3) lead vectors of this chest."""
    ectopic_origin: str

    @classmethod
    def draw(cls, rng: np.random.Generator, conduction: Conduction) -> Patient:
        """Draw one patient; the spread follows the limb and chest amplitudes of PTB-XL."""
        # About z turns the frontal axis: from 50 degrees to anything normal.
        turn = np.clip(rng.normal(0.0, [7.0, 8.0, 17.0]), [-20, -20, -27], [20, 20, 34])
        heart = dipole.rotation(turn)
        height = np.exp(rng.normal(-0.08, 0.20))
        t_height = np.exp(rng.normal(-0.02, 0.28))
        p_height = np.exp(rng.normal(0.0, 0.22))
        t_turn = dipole.rotation(rng.normal(0.0, [8.0, 9.0, 8.0]))
        p_turn = dipole.rotation(rng.normal(0.0, [8.0, 8.0, 10.0]))
        leads = dipole.DOWER.copy()
        # Chest electrodes are placed by hand and the chest is no sphere.
        leads[2:] *= np.exp(rng.normal(0.0, 0.10, size=(6, 1)))
        leads[2:] += rng.normal(0.0, 0.07, size=(6, 3))
        return cls(
            qrs=heart * height,
            t_wave=t_turn @ heart * t_height,
            p_wave=p_turn * p_height,
            qrs_stretch=float(
                rng.uniform(0.92, 1.10) if conduction == "normal" else rng.uniform(0.94, 1.1)
            ),
            pr_share=float(rng.uniform()),
            qtc_s=float(np.clip(rng.normal(0.405, 0.016), 0.370, 0.440)),
            leads=leads,
            ectopic_origin=str(rng.choice(list(dipole.ECTOPIC))),
        )


@dataclass(frozen=True)
class Beat:
    """A beat whose QRS begins, or would begin were it conducted, at `onset_s`."""

    onset_s: float
    rr_s: float
    """The interval that sets its QT."""
    atrial: bool = True
    ventricular: bool = True
    ectopic: bool = False


def _sinus(
    rate_hz: float, breath_hz: float, rng: np.random.Generator
) -> tuple[list[Beat], Array, Array]:
    """Return sinus beats and the breathing (times, values) that modulates them."""
    times_s = np.linspace(-2.5, DURATION_S + 2.5, 601)
    modulation, breath = dipole.rr_modulation(times_s, breath_hz, rng.uniform(0.3, 1.5), rng)
    # Fast hearts vary less; more than 5 % would be labelled sinus arrhythmia.
    spread = min(rng.lognormal(np.log(0.028), 0.5) * min(1.0, (1.25 / rate_hz) ** 2), 0.05)
    mean_s = 1 / rate_hz
    beats, onset_s = [], -1.5 + rng.uniform(-mean_s, 0.0)
    while onset_s < DURATION_S + 1:
        beats.append(Beat(onset_s, mean_s))
        onset_s += mean_s * (1 + spread * float(np.interp(onset_s, times_s, modulation)))
    return beats, times_s, breath


def _fibrillating(rate_hz: float, rng: np.random.Generator) -> list[Beat]:
    """Return beats whose intervals are independent: the node passes f waves at random."""
    shortest_s = 0.32
    free_s = 1 / rate_hz - shortest_s
    variation = rng.uniform(0.16, 0.26) / rate_hz
    shape = (free_s / variation) ** 2
    intervals = shortest_s + rng.gamma(shape, free_s / shape, size=64)
    onsets = np.cumsum(intervals) - 1.5 - intervals[0] * rng.uniform(0, 1)
    kept = np.flatnonzero(onsets < DURATION_S + 1)
    return [
        Beat(float(onsets[k]), float(0.5 * (intervals[k] + 1 / rate_hz)), atrial=False)
        for k in kept
    ]


def _with_ectopics(beats: list[Beat], pr_s: float, rng: np.random.Generator) -> list[Beat]:
    """Put premature ventricular beats after some sinus beats.

    The next sinus beat finds the ventricles refractory: its P falls into the ectopic ST-T and
    nothing follows, so that the pause is fully compensatory. Coupling is fixed within a record.
    """
    rr_s = beats[0].rr_s
    coupling_s = min(rng.uniform(0.54, 0.68) * rr_s, rr_s - pr_s - 0.04)
    candidates = [k for k, beat in enumerate(beats) if 0.4 < beat.onset_s < DURATION_S - 2.2 * rr_s]
    period = int(rng.choice([2, 3, 4, 99], p=[0.15, 0.2, 0.25, 0.4]))
    start = int(rng.choice(candidates if period == 99 else candidates[:period]))
    hosts = range(start, candidates[-1] + 1, period)
    result = []
    for k, beat in enumerate(beats):
        blocked = (k - 1) in hosts
        result.append(Beat(beat.onset_s, beat.rr_s, ventricular=not blocked))
        if k in hosts:
            onset_s = beat.onset_s + coupling_s + rng.normal(0.0, 0.006)
            result.append(Beat(onset_s, beat.rr_s, atrial=False, ectopic=True))
    return result


def _ventricular(beat: Beat, kind: Kind, patient: Patient, rng: np.random.Generator) -> Waves:
    """Return QRS and T of one beat; QT follows Fridericia's cube root of RR, longer by a block."""
    qt_s = patient.qtc_s * beat.rr_s ** (1 / 3)
    if beat.ectopic:
        ectopic = dipole.ectopic_beat(patient.ectopic_origin, qt_s + 0.05)
        return ectopic.turned(patient.qrs * np.exp(rng.normal(0.0, 0.03)))
    qrs = dipole.QRS[kind.conduction].turned(patient.qrs).moved(stretch=patient.qrs_stretch)
    if kind.conduction != "normal":
        qt_s += 0.6 * (dipole.QRS_END_S[kind.conduction] - dipole.QRS_END_S["normal"])
    peak_s = dipole.t_peak_s(qt_s) + rng.normal(0.0, 0.002)
    t_stretch = float(np.clip(beat.rr_s ** (1 / 3), 0.75, 1.1))
    t_wave = dipole.T_WAVE[kind.conduction].turned(patient.t_wave).moved(peak_s, t_stretch)
    return dipole.joined([qrs, t_wave])


def eight_leads(seed: int, where: Place) -> Array:
    """Return leads I, II, V1..V6 in mV at 500 Hz, with `MARGIN` samples on both sides."""
    kind = KINDS[where.kind]
    patient = Patient.draw(_generator(seed, 2, where.patient), kind.conduction)
    rng = _generator(seed, 3, where.index)
    mean, deviation, limit = kind.rate_per_min
    rate_hz = float(np.clip(rng.normal(mean, deviation), mean - limit, mean + limit)) / 60
    shortest_pr_s, longest_pr_s = kind.pr_s
    pr_s = shortest_pr_s + patient.pr_share * (longest_pr_s - shortest_pr_s)
    breath_hz = float(rng.uniform(0.18, 0.32))
    beats, breath_times_s, breath = _sinus(rate_hz, breath_hz, rng)
    if kind.fibrillating:
        beats = _fibrillating(rate_hz, rng)
    if kind.ectopic:
        beats = _with_ectopics(beats, pr_s, rng)

    times_s = (np.arange(DURATION_S * RATE_HZ + 2 * MARGIN) - MARGIN) / RATE_HZ
    p_wave = dipole.P_WAVE.turned(patient.p_wave).moved(-pr_s)
    ventricles = dipole.vectorcardiogram(
        [
            (beat.onset_s, _ventricular(beat, kind, patient, rng))
            for beat in beats
            if beat.ventricular
        ],
        times_s,
    )
    atria = dipole.vectorcardiogram(
        [(beat.onset_s, p_wave) for beat in beats if beat.atrial], times_s
    )
    if kind.fibrillating:
        height_mv = 0.085 * np.exp(rng.normal(0.0, 0.35))
        atria = height_mv * dipole.fibrillation(times_s, float(rng.uniform(4.8, 7.5)), rng)
    # Breathing turns the heart by a degree or two and changes its height by a few percent.
    breathing = np.interp(times_s, breath_times_s, breath)
    turn = dipole.rotation(rng.normal(0.0, 1.0, size=3)) - np.eye(3)
    height = 1 + rng.uniform(0.01, 0.035) * breathing
    ventricles = ventricles * height + (turn @ ventricles) * breathing
    leads = patient.leads @ ventricles + dipole.ATRIAL_GAIN[:, None] * (patient.leads @ atria)
    noise = dipole.electrode_noise(len(times_s), RATE_HZ, rng)
    noise += np.outer(dipole.ELECTRODES @ rng.normal(0.0, 0.012, size=9), breathing)
    return np.asarray(leads + noise, dtype=np.float64)


def to_adc(leads: Array) -> NDArray[np.int16]:
    """Round eight leads (8, L) in mV to int16 and complete them to twelve, (12, L).

    III = II - I holds exactly; the augmented leads hold to the half unit that rounding leaves.
    """
    eight = np.rint(leads * GAIN_PER_MV)
    one, two = eight[0], eight[1]
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.concatenate([np.rint(np.stack(limbs)), eight[2:]]).astype(np.int16)


def simulate_record(seed: int, where: Place) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Return one record's 12 leads at gain 1000/mV: (12, 5000) at 500 Hz, (12, 1000) at 100 Hz."""
    leads = eight_leads(seed, where)
    return to_adc(leads[:, MARGIN:-MARGIN]), to_adc(dipole.decimated(leads, DECIMATION, MARGIN))


def simulate(out: Path, *, num_records: int, seed: int) -> None:
    """Write `num_records` records, 500 and 100 Hz, and their tables to the root `out`.

    The same call continues after an interruption and keeps whole records; a larger `num_records`
    with the same seed adds to a root.

    Raises:
        UserError: a number out of range, or `out` holds something else.
    """
    if not 1 <= num_records <= MAX_RECORDS:
        raise UserError(f"simulate --records is {num_records}; 1 to {MAX_RECORDS} are allowed")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"simulate --seed is {seed}; 0 to 2^63 - 1 are allowed")
    _claim(out, num_records, seed)
    busy = f"another process is simulating into {out}; wait for it or stop it"
    with locked(out / NOTE, busy):
        _complete(out, num_records, seed)


def _complete(out: Path, num_records: int, seed: int) -> None:
    """Write what the claimed root lacks."""
    remove_temporaries(out)
    places = [place(seed, index) for index in range(num_records)]
    rows = [_row(where) for where in places]
    for folder in {
        (out / name).parent for row in rows for name in (row.filename_lr, row.filename_hr)
    }:
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
    missing = [
        (where, row)
        for where, row in zip(places, rows, strict=True)
        if not (is_whole(out, row.filename_lr) and is_whole(out, row.filename_hr))
    ]
    done = num_records - len(missing)
    with Progress("simulate", total=num_records, unit="records", done=done) as progress:
        for where, row in missing:
            high, low = simulate_record(seed, where)
            comments = [f"simulated, seed {seed}, record {row.ecg_id}: {where.kind}"]
            for name, adc, rate_hz in (
                (row.filename_hr, high, RATE_HZ),
                (row.filename_lr, low, RATE_HZ // DECIMATION),
            ):
                path = out / name
                write_record(path.parent, path.name, adc, rate_hz, comments)
            progress.advance(1)
    finish_root(out, rows, card=CARD.format(num_records=num_records, seed=seed, version=VERSION))


def _row(where: Place) -> PtbxlRow:
    """Return the table row of a record; ecg_id counts from 1 and folders hold a thousand."""
    ecg_id = where.index + 1
    name = f"{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}"
    return PtbxlRow(
        ecg_id=ecg_id,
        patient_id=str(where.patient),
        strat_fold=where.strat_fold,
        scp_codes=dict(KINDS[where.kind].scp_codes),
        filename_lr=f"records100/{name}_lr",
        filename_hr=f"records500/{name}_hr",
    )


def _claim(out: Path, num_records: int, seed: int) -> None:
    """Note in the root what it holds, or refuse a root that holds something else."""
    note = out / NOTE
    wanted = {"seed": seed, "version": VERSION, "records": num_records}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out must name a new or an earlier simulated folder")
    held = read_json(note) if note.exists() else None
    if held is not None:
        known = isinstance(held, dict) and isinstance(held.get("records"), int)
        if not known or (held.get("seed"), held.get("version")) != (seed, VERSION):
            raise UserError(
                f"{out} holds a simulated set of another seed or version ({held}); asked for is "
                f"seed {seed} of version {VERSION}: choose another --out"
            )
        if held["records"] > num_records:
            raise UserError(
                f"{out} holds {held['records']} records already, --records is {num_records}: "
                f"ask for at least as many or choose another --out"
            )
    elif out.is_dir() and not all(map(is_temporary, out.iterdir())):
        raise UserError(f"{out} is not empty and no simulated set: choose a new folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    if held != wanted:
        write_json(note, wanted)
