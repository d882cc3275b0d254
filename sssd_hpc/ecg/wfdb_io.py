"""WFDB records, read through a guard and written atomically.

Reading: headers are other people's text. A strict grammar checks every field against the files'
real sizes before `wfdb` sees the record, so a header can neither allocate past its data file, nor
hang, nor lead out of the root. Only single-segment records in format 16 with all signals in one
file are read: the form of PTB-XL and of most 12-lead collections on PhysioNet.
Reasons for refusing a record never repeat the header's free text (names, comments).

Writing: format 16, gain 1000/mV, baseline 0, text equal to `wfdb.wrsamp` byte for byte, which is
far too slow for a data set. Each file is whole or absent; the header comes last.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS, canonical, positions
from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_write_bytes, inside

GAIN_PER_MV = 1000
MAX_ADC = 32767
"""Largest magnitude of a sample; -32768 is WFDB's mark of an invalid one."""

MAX_HEADER_BYTES = 1 << 16
MAX_DATA_BYTES = 1 << 24
MAX_SIGNALS = 64

_UNIT_MV = {"mV": 1.0, "mv": 1.0, "uV": 1e-3, "uv": 1e-3, "V": 1e3, "v": 1e3}
_NAME = re.compile(r"[-A-Za-z0-9_]{1,64}\Z")
_RELATIVE_NAME = re.compile(r"[-A-Za-z0-9_./]{1,255}\Z")
_RECORD_LINE = re.compile(
    r"(?P<name>[-A-Za-z0-9_]+)(?P<segments>/\d+)?[ \t]+(?P<signals>\d{1,15})[ \t]+"
    r"(?P<rate>\d{1,9}(\.\d{1,9})?)[ \t]+(?P<length>\d{1,15})([ \t]+[\d:.]+([ \t]+[\d/]+)?)?\Z"
)
_SIGNAL_LINE = re.compile(
    r"(?P<file>[-A-Za-z0-9_]+\.[A-Za-z0-9]+)[ \t]+"
    r"(?P<format>\d+(x(?!1\b)\d+|:\d+)?)(x1)?(\+(?P<offset>\d{1,12}))?[ \t]+"
    r"(?P<gain>\d{1,15}(\.\d{0,15})?(e[+-]?\d{1,3})?)(\((?P<baseline>-?\d{1,10})\))?"
    r"(/(?P<unit>\S{1,20}))?[ \t]+\d{1,3}[ \t]+(?P<zero>-?\d{1,10})[ \t]+"
    r"-?\d{1,10}[ \t]+(?P<checksum>-?\d{1,10})[ \t]+\d{1,9}[ \t]+(?P<lead>\S.*)\Z"
)


class RecordError(ValueError):
    """A record that cannot be used; the message is the reason, `file` is its name in the root."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


@dataclass(frozen=True)
class Record:
    """One ECG: `adc` int16 (12, L), 1000 units a mV, leads in `LEADS` order."""

    adc: NDArray[np.int16]
    rate_hz: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class _Header:
    """What the guard has proven about a record."""

    rate_hz: float
    length: int
    data: str
    offset: int
    leads: tuple[str, ...]
    units_per_mv: NDArray[np.float64]
    baseline: NDArray[np.int64]
    checksum: NDArray[np.int64]


def _read_text(path: Path) -> list[str]:
    """Return a header's lines without comments and blank lines."""
    if _plain_size(path, "header") > MAX_HEADER_BYTES:
        raise ValueError(f"its header is longer than {MAX_HEADER_BYTES} bytes")
    with open(path, "rb") as stream:
        data = stream.read(MAX_HEADER_BYTES)
    if any(byte < 32 and byte not in b"\t\r\n" for byte in data):
        raise ValueError("its header holds control characters")
    lines = [line.strip() for line in data.replace(b"\r", b"\n").split(b"\n")]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    if not all(line.isascii() for line in lines):
        raise ValueError("its header is not ASCII text")
    return [line.decode("ascii") for line in lines]


def _check_header(root: Path, relative: str) -> _Header:
    """Prove that a record's header is sound and agrees with its data file.

    Raises:
        ValueError: the reason why not.
    """
    if not _RELATIVE_NAME.match(relative):
        raise ValueError("its name is longer than 255 or has other characters than A-Z 0-9 - _ . /")
    folder, _, name = relative.rpartition("/")
    lines = _read_text(inside(root, f"{relative}.hea"))
    first = _RECORD_LINE.match(lines[0]) if lines else None
    if first is None:
        raise ValueError("its header does not begin with 'name signals rate length'")
    if first["segments"]:
        raise ValueError("it has several segments; join them first")
    if first["name"] != name:
        raise ValueError("its header names another record than its file name does")
    num_signals, length, rate_hz = int(first["signals"]), int(first["length"]), float(first["rate"])
    if not 0 < num_signals <= MAX_SIGNALS or num_signals != len(lines) - 1:
        raise ValueError(
            f"its header promises {num_signals} signals and describes {len(lines) - 1}; "
            f"1 to {MAX_SIGNALS} are allowed"
        )
    if rate_hz <= 0 or length <= 0:
        raise ValueError(f"its header promises {length} samples at {rate_hz:g} Hz")
    signals = [_check_signal(line) for line in lines[1:]]
    if len({(signal["file"], signal["offset"]) for signal in signals}) > 1:
        raise ValueError("its signals lie in several data files")
    offset = int(signals[0]["offset"] or 0)
    file = signals[0]["file"]
    size = _plain_size(inside(root, f"{folder}/{file}" if folder else file), "data file")
    expected = offset + 2 * num_signals * length
    if size != expected:
        raise ValueError(f"its data file has {size} bytes, its header promises {expected}")
    if size > MAX_DATA_BYTES:
        raise ValueError(f"its data file has {size} bytes; at most {MAX_DATA_BYTES} are read")
    return _Header(
        rate_hz=rate_hz,
        length=length,
        data=file,
        offset=offset,
        leads=tuple(canonical(signal["lead"]) for signal in signals),
        units_per_mv=np.array([float(s["gain"]) / _UNIT_MV[s["unit"] or "mV"] for s in signals]),
        baseline=np.array([int(s["baseline"] or s["zero"]) for s in signals]),
        checksum=np.array([int(s["checksum"]) for s in signals]),
    )


def _check_signal(line: str) -> re.Match[str]:
    """Return one signal line's fields, or raise ValueError with the reason."""
    signal = _SIGNAL_LINE.match(line)
    if signal is None:
        raise ValueError("a signal line of its header is malformed or lacks fields")
    if signal["format"] != "16":
        raise ValueError("its samples are not in format 16 with one sample a frame and no skew")
    if signal["unit"] and signal["unit"] not in _UNIT_MV:
        raise ValueError("a signal has an unknown unit; mV, uV and V are known")
    if not 0 < float(signal["gain"]) < np.inf:
        raise ValueError("a signal has a gain that is not positive and finite")
    return signal


def _plain_size(path: Path, what: str) -> int:
    """Return the size of a plain file, or raise ValueError: pipes and devices never get opened."""
    try:
        information = path.stat()
    except OSError as error:
        raise ValueError(f"its {what} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(information.st_mode):
        raise ValueError(f"its {what} is not a plain file")
    return information.st_size


def read_record(root: Path, relative_name: str) -> Record:
    """Read the record `root/relative_name` (no suffix); extra leads are dropped.

    Samples at gain 1000/mV and baseline 0 are returned as stored; others are converted to mV and
    rounded to 1 uV. Flags: `flat:LEAD` (constant), `saturated:LEAD` (clipped at its extreme).

    Raises:
        RecordError: broken, hostile or unusable; the reason is in the message.
    """
    try:
        header = _check_header(root, relative_name)
        order = positions(header.leads, LEADS)
        raw = _read_samples(root / relative_name, header)
        if bool(np.any((raw.sum(axis=1, dtype=np.int64) - header.checksum) % 65536)):
            raise ValueError("its samples do not match the checksums in its header")
        adc = _to_adc(raw[order], header, order)
    except UserError:
        raise RecordError(relative_name, "its name or a link leads out of the root") from None
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecordError(relative_name, reason or "it cannot be read") from error
    except RuntimeError:
        raise RecordError(relative_name, "its path cannot be resolved") from None
    return Record(adc=adc, rate_hz=header.rate_hz, flags=quality_flags(adc, header.rate_hz))


def _read_samples(path: Path, header: _Header) -> NDArray[np.int16]:
    """Return the digital samples (signals, L) as `wfdb` reads them."""
    # Loaded when used: it brings pandas along.
    import wfdb

    try:
        raw = wfdb.rdrecord(str(path.absolute()), physical=False, return_res=16).d_signal
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"wfdb cannot read it ({type(error).__name__})") from error
    if raw.shape != (header.length, len(header.leads)) or raw.dtype != np.int16:
        raise ValueError("wfdb understands its header differently")
    return np.ascontiguousarray(raw.T)


def _to_adc(raw: NDArray[np.int16], header: _Header, order: list[int]) -> NDArray[np.int16]:
    """Bring the 12 leads (12, L) to gain 1000/mV and baseline 0."""
    invalid = (raw == -32768).any(axis=1)
    if invalid.any():
        names = [name for name, bad in zip(LEADS, invalid, strict=True) if bad]
        raise ValueError(f"it has invalid samples in lead(s) {', '.join(names)}")
    if bool((raw == raw[:, :1]).all()):
        raise ValueError("every lead is flat: there is no ECG in it")
    gain, baseline = header.units_per_mv[order], header.baseline[order]
    if bool((gain == GAIN_PER_MV).all()) and not baseline.any():
        return raw
    with np.errstate(over="ignore"):
        adc = np.rint((raw - baseline[:, None]) / gain[:, None] * GAIN_PER_MV)
    if not bool((np.abs(adc) <= MAX_ADC).all()):
        raise ValueError(f"it exceeds +-{MAX_ADC / GAIN_PER_MV:g} mV")
    return adc.astype(np.int16)


def quality_flags(adc: NDArray[np.int16], rate_hz: float) -> tuple[str, ...]:
    """Name the leads of `adc` (12, L) that are flat or saturated.

    Flat: constant throughout. Saturated: at least 0.1 s at a stretch at its own extreme value,
    that being 2 mV or more away from zero.
    """
    flat = (adc == adc[:, :1]).all(axis=1)
    flags = [f"flat:{name}" for name, yes in zip(LEADS, flat, strict=True) if yes]
    stretch = max(3, round(0.1 * rate_hz))
    for extreme in (adc.max(axis=1), adc.min(axis=1)):
        at_extreme = adc == extreme[:, None]
        clipped = (np.abs(extreme.astype(np.int32)) >= 2 * GAIN_PER_MV) & ~flat
        clipped &= at_extreme.sum(axis=1) >= stretch
        for lead in np.flatnonzero(clipped):
            runs = np.flatnonzero(np.diff(at_extreme[lead], prepend=False, append=False))
            if int((runs[1::2] - runs[::2]).max()) >= stretch:
                flags.append(f"saturated:{LEADS[lead]}")
    return tuple(dict.fromkeys(flags))


def to_adc(signal_mv: NDArray[np.floating]) -> NDArray[np.int16]:
    """Return samples in mV as int16 at gain 1000/mV, rounded to the nearest.

    Raises:
        ValueError: a sample is not finite or beyond +-32.767 mV.
    """
    scaled = np.rint(np.asarray(signal_mv, dtype=np.float64) * GAIN_PER_MV)
    if not bool(np.isfinite(scaled).all()):
        raise ValueError("the signal has samples that are not finite")
    if not bool((np.abs(scaled) <= MAX_ADC).all()):
        raise ValueError(f"the signal exceeds +-{MAX_ADC / GAIN_PER_MV:g} mV")
    return scaled.astype(np.int16)


def write_record(
    folder: Path,
    name: str,
    adc_or_mv: NDArray[np.int16] | NDArray[np.floating],
    rate_hz: int,
    comments: Sequence[str] = (),
) -> None:
    """Write the record `folder/name` (.dat, then .hea) from a signal (12, L) in `LEADS` order.

    int16 is taken as samples at gain 1000/mV, floating point as mV. The files are whole or absent
    but not flushed to the disk one by one: `is_whole` tells what a power failure spoiled.

    Raises:
        ValueError: not (12, L), non-finite or out of range, or a name or comment WFDB cannot hold.
    """
    adc = np.asarray(adc_or_mv)
    if np.issubdtype(adc.dtype, np.floating):
        adc = to_adc(adc)
    if adc.dtype != np.int16 or adc.ndim != 2 or len(adc) != len(LEADS) or not adc.shape[1]:
        raise ValueError(f"{name}: a record is int16 or mV (12, L), not {adc.dtype} {adc.shape}")
    if bool((adc == -32768).any()):
        raise ValueError(f"{name}: -32768 marks an invalid sample and cannot be written")
    if not _NAME.match(name) or rate_hz < 1:
        raise ValueError(f"{name!r} at {rate_hz} Hz: names are letters, digits, - and _; rate >= 1")
    if not all(text.isascii() and text.isprintable() for text in comments):
        raise ValueError(f"{name}: a header comment is one line of printable ASCII")
    checksums = adc.sum(axis=1, dtype=np.int64) % 65536
    lines = [f"{name} {len(LEADS)} {rate_hz:d} {adc.shape[1]}"]
    lines += [
        f"{name}.dat 16 {GAIN_PER_MV}.0(0)/mV 16 0 {first} {checksum} 0 {lead}"
        for lead, first, checksum in zip(LEADS, adc[:, 0], checksums, strict=True)
    ]
    lines += [f"# {text}" for text in comments]
    header = ("\n".join(lines) + "\n").encode("ascii")
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"{name}: its header would be longer than {MAX_HEADER_BYTES} bytes")
    samples = np.ascontiguousarray(adc.T, dtype="<i2").tobytes()
    atomic_write_bytes(folder / f"{name}.dat", samples, durable=False)
    atomic_write_bytes(folder / f"{name}.hea", header, durable=False)


def is_whole(folder: Path, name: str) -> bool:
    """Tell whether the record `folder/name` has both files complete and its checksums right."""
    try:
        header = _check_header(folder, name)
        data = (folder / name).parent / header.data
        samples = np.fromfile(data, dtype="<i2", offset=header.offset)
    except (ValueError, OSError):
        return False
    sums = samples.reshape(header.length, -1).sum(axis=0, dtype=np.int64)
    return not bool(np.any((sums - header.checksum) % 65536))
