"""WFDB records: the guard before wfdb, conversion, quality flags, the writer and its oracle."""

from __future__ import annotations

import os
import string
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sssd_hpc.ecg import wfdb_io
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.wfdb_io import (
    RecordError,
    is_whole,
    quality_flags,
    read_record,
    to_adc,
    write_record,
)

# One test writes many examples into one folder: each overwrites the last.
MANY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_adc(length: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-2000, 2000, (12, length)).astype(np.int16)


def signal_line(adc, lead, *, file="r.dat", form="16", gain="1000.0(0)/mV", checksum=None):
    total = int(adc.astype(np.int64).sum()) % 65536 if checksum is None else checksum
    return f"{file} {form} {gain} 16 0 {adc[0]} {total} 0 {lead}"


def put(root: Path, adc=None, *, names=LEADS, first=None, comments=(), **fields) -> str:
    """Write a record by hand, so that anything in it can be wrong; return its relative name."""
    adc = random_adc() if adc is None else adc
    first = f"r {len(adc)} 100 {adc.shape[1]}" if first is None else first
    lines = [first, *(signal_line(row, name, **fields) for row, name in zip(adc, names))]  # noqa: B905
    (root / "sub").mkdir(exist_ok=True)
    (root / "sub" / "r.dat").write_bytes(np.ascontiguousarray(adc.T, dtype="<i2").tobytes())
    (root / "sub" / "r.hea").write_text("\n".join([*lines, *comments]) + "\n")
    return "sub/r"


def edit(root: Path, old: str, new: str) -> None:
    header = root / "sub" / "r.hea"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new, 1))


def refuses(root: Path, name: str, reason: str) -> None:
    with pytest.raises(RecordError, match=reason) as caught:
        read_record(root, name)
    assert caught.value.file == name
    assert str(root) not in caught.value.reason


@pytest.fixture
def no_wfdb(monkeypatch):
    """Fail if the guard lets the record through to wfdb."""

    def refuse(*args, **kwargs):
        raise AssertionError("the guard called wfdb")

    monkeypatch.setattr(wfdb, "rdrecord", refuse)


# Reading


def test_a_record_reads_as_written(tmp_path):
    adc = random_adc()
    record = read_record(tmp_path, put(tmp_path, adc))
    assert np.array_equal(record.adc, adc)
    assert record.adc.dtype == np.int16
    assert (record.rate_hz, record.flags) == (100.0, ())


def test_real_records_equal_wfdbs_reading(ptbxl_root):
    for name in ("records100/00000/00007_lr", "records500/00000/00007_hr"):
        record = read_record(ptbxl_root, name)
        physical = wfdb.rdrecord(str(ptbxl_root / name)).p_signal
        assert np.array_equal(record.adc, np.rint(physical.T * 1000))
        assert np.array_equal(record.adc.astype(np.float64) / 1000, physical.T)


@MANY
@given(order=st.permutations(range(12)), case=st.sampled_from(["upper", "lower", "swapcase"]))
def test_leads_are_found_in_any_order_and_case(tmp_path, order, case):
    adc = random_adc(20)
    names = [getattr(LEADS[lead], case)() for lead in order]
    record = read_record(tmp_path, put(tmp_path, adc[list(order)], names=names))
    assert np.array_equal(record.adc, adc)


def test_extra_leads_are_dropped(tmp_path):
    adc = random_adc(50)
    wide = np.concatenate([np.full_like(adc[:1], -32768), adc, adc[:2]])
    names = ["VX", *LEADS, "resp", "resp"]
    assert np.array_equal(read_record(tmp_path, put(tmp_path, wide, names=names)).adc, adc)


def test_a_missing_lead_is_refused(tmp_path):
    adc = random_adc(50)
    names = [*LEADS[:-1], "VX"]
    refuses(tmp_path, put(tmp_path, adc, names=names), r"missing lead\(s\) V6")


def test_a_lead_twice_is_refused(tmp_path):
    refuses(tmp_path, put(tmp_path, random_adc(50), names=[*LEADS[:-1], "i"]), "missing lead")
    adc = np.concatenate([random_adc(50), random_adc(50)[:1]])
    refuses(tmp_path, put(tmp_path, adc, names=[*LEADS, "avl"]), r"lead\(s\) AVL named twice")


@pytest.mark.parametrize(
    ("gain", "factor", "offset"),
    [
        ("1000.0(0)/mV", 1, 0),
        ("1000", 1, 0),
        ("1.0(0)/uV", 1, 0),
        ("1e6(0)/V", 1, 0),
        ("1000(100)/mV", 1, -100),
        ("500(-7)/mV", 2, 14),
        ("200/mv", 5, 0),
    ],
)
def test_units_gains_and_baselines_are_converted(tmp_path, gain, factor, offset):
    adc = random_adc(30)
    record = read_record(tmp_path, put(tmp_path, adc, gain=gain))
    assert np.array_equal(record.adc, adc * factor + offset)


def test_conversion_agrees_with_wfdbs_physical_units(tmp_path):
    adc = random_adc(200)
    name = put(tmp_path, adc, gain="4.88(-3)/uV")
    expected = wfdb.rdrecord(str(tmp_path / name)).p_signal.T
    assert np.abs(read_record(tmp_path, name).adc - expected).max() <= 0.5 + 1e-9


def test_a_baseline_left_out_is_the_adc_zero(tmp_path):
    adc = random_adc(30)
    name = put(tmp_path, adc, gain="1000/mV")
    text = (tmp_path / "sub" / "r.hea").read_text().replace("/mV 16 0 ", "/mV 16 10 ")
    (tmp_path / "sub" / "r.hea").write_text(text)
    assert np.array_equal(read_record(tmp_path, name).adc, adc - 10)


@pytest.mark.parametrize(
    ("gain", "reason"),
    [
        ("0(0)/mV", "not positive and finite"),
        ("0.0/mV", "not positive and finite"),
        ("1e999/mV", "not positive and finite"),
        ("-200/mV", "malformed"),
        ("nan/mV", "malformed"),
        ("inf/mV", "malformed"),
        ("1000(99999999999)/mV", "malformed"),
        ("1000(1e3)/mV", "malformed"),
        ("1e-300/mV", "exceeds"),
        ("1000(2000000000)/mV", "exceeds"),
        ("10.0(0)/mV", "exceeds"),
        ("1000/mmHg", "unknown unit"),
        ("1000/kV", "unknown unit"),
    ],
)
def test_a_gain_or_unit_without_meaning_is_refused(tmp_path, gain, reason):
    refuses(tmp_path, put(tmp_path, gain=gain), reason)


def test_an_invalid_sample_is_refused(tmp_path):
    adc = random_adc()
    adc[7, 500:510] = -32768
    refuses(tmp_path, put(tmp_path, adc), r"invalid samples in lead\(s\) V2")


def test_a_record_of_flat_leads_alone_is_refused(tmp_path):
    refuses(tmp_path, put(tmp_path, np.zeros((12, 1000), np.int16)), "every lead is flat")


def test_a_wrong_checksum_is_refused(tmp_path):
    name = put(tmp_path)
    with open(tmp_path / "sub" / "r.dat", "r+b") as stream:
        stream.seek(1001)
        byte = stream.read(1)
        stream.seek(1001)
        stream.write(bytes([byte[0] ^ 4]))
    refuses(tmp_path, name, "do not match the checksums")


@pytest.mark.parametrize("checksum_of", [lambda c: c, lambda c: c - 65536, lambda c: c + 65536])
def test_a_checksum_counts_modulo_65536(tmp_path, checksum_of):
    adc = np.arange(12, dtype=np.int16)[:, None] + np.arange(9, dtype=np.int16)
    name = put(tmp_path, adc)
    total = int(adc[3].sum())
    edit(tmp_path, f" {total} 0 AVR", f" {checksum_of(total)} 0 AVR")
    assert np.array_equal(read_record(tmp_path, name).adc, adc)


@pytest.mark.parametrize("change", [-24, -1, 1, 24, 24000])
def test_a_short_or_long_data_file_is_refused_before_wfdb(tmp_path, change, no_wfdb):
    name = put(tmp_path)
    os.truncate(tmp_path / "sub" / "r.dat", 24000 + change)
    refuses(tmp_path, name, f"has {24000 + change} bytes, its header promises 24000")


def test_a_byte_offset_is_honoured(tmp_path):
    adc = random_adc()
    name = put(tmp_path, adc, form="16x1+24")
    data = tmp_path / "sub" / "r.dat"
    data.write_bytes(b"\1" * 24 + data.read_bytes())
    assert np.array_equal(read_record(tmp_path, name).adc, adc)
    assert is_whole(tmp_path, name)


def test_crlf_and_comments_are_read(tmp_path):
    adc = random_adc()
    name = put(tmp_path, adc, comments=["#plain", "# Alter: 57", "  # with \u00e9"])
    header = tmp_path / "sub" / "r.hea"
    header.write_bytes(header.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(read_record(tmp_path, name).adc, adc)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("r/2 12 100 1000", "several segments"),
        ("r 0 100 1000", "promises 0 signals"),
        ("r 1000000000 100 1000", "promises 1000000000 signals"),
        ("r 99999999999999999999 100 1000", "does not begin"),
        ("r 13 100 1000", "promises 13 signals and describes 12"),
        ("r 12 0 1000", "at 0 Hz"),
        ("r 12 -100 1000", "does not begin"),
        ("r 12 nan 1000", "does not begin"),
        ("r 12 1e9 1000", "does not begin"),
        ("r 12 9999999999 1000", "does not begin"),
        ("r 12 100 0", "promises 0 samples"),
        ("r 12 100 -5", "does not begin"),
        ("r 12 100 1000000000000", "header promises 24000000000000"),
        ("r 12 100 " + "9" * 400, "does not begin"),
        ("r 12 100", "does not begin"),
        ("r 12", "does not begin"),
        ("other 12 100 1000", "names another record"),
        ("../r 12 100 1000", "does not begin"),
        ("r\u00a012 100 1000", "not ASCII"),
        ("\ufeffr 12 100 1000", "not ASCII"),
        ("", "does not begin"),
    ],
)
def test_a_hostile_first_line_is_refused_before_wfdb(tmp_path, first, reason, no_wfdb):
    refuses(tmp_path, put(tmp_path, first=first), reason)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../r.dat", "malformed"),
        ("/etc/passwd", "malformed"),
        ("~", "malformed"),
        ("~/r.dat", "malformed"),
        ("-", "malformed"),
        ("http://x.dat", "malformed"),
        ("s3://x/r.dat", "malformed"),
        ("absent.dat", "its data file cannot be read"),
        ("x" * 300 + ".dat", "its data file cannot be read|File name too long"),
    ],
)
def test_a_hostile_data_file_name_is_refused_before_wfdb(tmp_path, file, reason, no_wfdb):
    refuses(tmp_path, put(tmp_path, file=file), reason)


@pytest.mark.parametrize("form", ["212", "8", "80", "16x4", "16:100", "516", "24", "16x0"])
def test_another_format_is_refused_before_wfdb(tmp_path, form, no_wfdb):
    refuses(tmp_path, put(tmp_path, form=form), "not in format 16")


def test_signals_in_several_files_are_refused(tmp_path, no_wfdb):
    name = put(tmp_path)
    edit(tmp_path, "r.dat 16", "s.dat 16")
    refuses(tmp_path, name, "several data files")


@pytest.mark.parametrize("number", [0, 7, 11, 27, 31])
def test_control_characters_are_refused_even_in_comments(tmp_path, number, no_wfdb):
    refuses(tmp_path, put(tmp_path, comments=[f"# a{chr(number)}b"]), "control characters")


def test_a_huge_header_is_refused_unread(tmp_path, no_wfdb):
    name = put(tmp_path, comments=["# " + "x" * 10_000_000])
    tracemalloc.start()
    refuses(tmp_path, name, "longer than 65536 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_huge_sparse_data_file_is_refused_unread(tmp_path, no_wfdb):
    name = put(tmp_path, first="r 12 100 100000000000")
    os.truncate(tmp_path / "sub" / "r.dat", 2_400_000_000_000)
    refuses(tmp_path, name, "at most 16777216 are read")


@pytest.mark.parametrize("suffix", ["hea", "dat"])
def test_a_pipe_is_never_opened(tmp_path, suffix, no_wfdb):
    name = put(tmp_path)
    (tmp_path / "sub" / f"r.{suffix}").unlink()
    os.mkfifo(tmp_path / "sub" / f"r.{suffix}")
    refuses(tmp_path, name, "not a plain file")
    assert not is_whole(tmp_path, name)


@pytest.mark.parametrize("suffix", ["hea", "dat"])
def test_a_link_out_of_the_root_is_refused(tmp_path, suffix, no_wfdb):
    root = tmp_path / "root"
    root.mkdir()
    name = put(root)
    file = root / "sub" / f"r.{suffix}"
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    refuses(root, name, "leads out of the root")


def test_a_link_inside_the_root_is_followed(tmp_path):
    name = put(tmp_path)
    (tmp_path / "sub" / "r.dat").rename(tmp_path / "elsewhere.dat")
    (tmp_path / "sub" / "r.dat").symlink_to(tmp_path / "elsewhere.dat")
    assert read_record(tmp_path, name).adc.shape == (12, 1000)


def test_a_loop_of_links_is_refused(tmp_path, no_wfdb):
    name = put(tmp_path)
    (tmp_path / "sub" / "r.dat").unlink()
    (tmp_path / "sub" / "r.dat").symlink_to("r.dat")
    refuses(tmp_path, name, "cannot be re")


@pytest.mark.parametrize(
    "name",
    [
        "../sub/r",
        "/etc/passwd",
        "~/r",
        "sub/../sub/r",
        "sub//r",
        "http://x/r",
        "sub\\r",
        "a\0b",
        "",
    ],
)
def test_a_name_that_leaves_the_root_is_refused(tmp_path, name, no_wfdb):
    put(tmp_path)
    refuses(tmp_path, name, "name")


def test_an_absent_record_is_refused(tmp_path):
    refuses(tmp_path, "sub/absent", "its header cannot be read: No such file")


def test_what_wfdb_refuses_is_refused_without_its_words(tmp_path):
    name = put(tmp_path, first="r 12 100 1000 61:61:61")
    refuses(tmp_path, name, r"wfdb cannot read it \(ValueError\)")


def test_a_header_that_wfdb_understands_differently_is_refused(tmp_path, monkeypatch):
    name = put(tmp_path)
    shorter = wfdb.rdrecord(str(tmp_path / name), physical=False, sampto=10, return_res=16)
    monkeypatch.setattr(wfdb, "rdrecord", lambda *args, **kwargs: shorter)
    refuses(tmp_path, name, "understands its header differently")


TOKENS = st.one_of(
    st.sampled_from(
        [
            "r",
            "r.dat",
            "12",
            "0",
            "-1",
            "1e12",
            "1000000000000",
            "nan",
            "16",
            "16x9",
            "16+9",
            "~",
            "r/2",
            "../r",
            "1000.0(0)/mV",
            "/uV",
            "(",
            "#",
            "\n",
            "\r",
            " ",
            "\t",
            "I",
            "V6",
            "\x00",
        ]
    ),
    st.text(alphabet=string.printable, max_size=8),
    st.integers(-(10**20), 10**20).map(str),
)


@settings(MANY, max_examples=300)
@given(st.data())
def test_a_damaged_header_never_makes_wfdb_read_past_the_file(tmp_path, data):
    """Whatever is spliced into a header: a RecordError, or samples of the data file's size."""
    name = put(tmp_path, random_adc(40))
    header = tmp_path / "sub" / "r.hea"
    text = header.read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 12)))
        text = text[:begin] + data.draw(TOKENS) + text[end:]
    header.write_text(text)
    asked = []

    def watched(*args, original=wfdb.rdrecord, **kwargs):
        asked.append(wfdb.rdheader(args[0]))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wfdb, "rdrecord", watched)
        tracemalloc.start()
        try:
            assert read_record(tmp_path, name).adc.shape[0] == 12
        except RecordError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < 2_000_000
    size = (tmp_path / "sub" / "r.dat").stat().st_size
    assert all(2 * seen.n_sig * seen.sig_len <= size for seen in asked)


@settings(MANY, max_examples=100)
@given(text=st.binary(max_size=300))
def test_any_bytes_as_header_are_refused(tmp_path, text):
    name = put(tmp_path, random_adc(10))
    (tmp_path / "sub" / "r.hea").write_bytes(text)
    refuses(tmp_path, name, "its|it has")


# Quality


def test_flat_and_saturated_leads_are_flagged(tmp_path):
    adc = random_adc()
    adc[4] = 17
    adc[8, 300:320] = 5000
    adc[9, 300:320] = -5000
    assert read_record(tmp_path, put(tmp_path, adc)).flags == (
        "flat:AVL",
        "saturated:V3",
        "saturated:V4",
    )


def test_a_low_or_short_or_scattered_plateau_is_not_saturation():
    adc = random_adc()
    adc[0, 100:105] = 5000
    adc[1, ::20] = 5000
    adc[2] //= 2
    adc[2, 100:150] = 1999
    assert quality_flags(adc, 100) == ()
    assert quality_flags(adc, 40) == ("saturated:I",)


# Writing


@MANY
@given(
    adc=arrays(
        np.int16,
        st.tuples(st.just(12), st.integers(1, 30)),
        elements=st.integers(-32767, 32767),
    ),
    rate=st.sampled_from([1, 100, 250, 500, 1000]),
    name=st.text(alphabet=string.ascii_letters + string.digits + "-_", min_size=1, max_size=12),
    comments=st.lists(st.text(alphabet=string.printable[:95], max_size=30), max_size=3),
)
def test_files_equal_those_of_wfdb(tmp_path, adc, rate, name, comments):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir(exist_ok=True)
    write_record(ours, name, adc, rate, comments)
    wfdb.wrsamp(
        name,
        fs=rate,
        units=["mV"] * 12,
        sig_name=list(LEADS),
        d_signal=adc.T.copy(),
        fmt=["16"] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[0] * 12,
        comments=comments,
        write_dir=str(theirs),
    )
    for suffix in (".hea", ".dat"):
        assert (ours / (name + suffix)).read_bytes() == (theirs / (name + suffix)).read_bytes()
    assert np.array_equal(wfdb.rdrecord(str(ours / name), physical=False).d_signal, adc.T)
    assert is_whole(ours, name)


def test_signals_in_mv_equal_wfdbs_conversion(tmp_path):
    signal_mv = np.random.default_rng(5).normal(size=(12, 500))
    write_record(tmp_path, "ours", signal_mv, 500)
    wfdb.wrsamp(
        "theirs",
        fs=500,
        units=["mV"] * 12,
        sig_name=list(LEADS),
        p_signal=signal_mv.T.copy(),
        fmt=["16"] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[0] * 12,
        write_dir=str(tmp_path),
    )
    assert (tmp_path / "ours.dat").read_bytes() == (tmp_path / "theirs.dat").read_bytes()
    assert np.array_equal(read_record(tmp_path, "ours").adc, to_adc(signal_mv))


def test_real_files_are_rewritten_byte_for_byte(ptbxl_root, tmp_path):
    for name, rate in (("records100/00000/00012_lr", 100), ("records500/00000/00012_hr", 500)):
        write_record(tmp_path, Path(name).name, read_record(ptbxl_root, name).adc, rate)
        for suffix in (".hea", ".dat"):
            written = tmp_path / (Path(name).name + suffix)
            assert written.read_bytes() == Path(f"{ptbxl_root / name}{suffix}").read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 32.768, -32.768, 1e30])
def test_samples_that_16_bits_cannot_hold_are_not_written(tmp_path, value):
    signal_mv = np.zeros((12, 10), np.float32)
    signal_mv[3, 4] = value
    with pytest.raises(ValueError, match=r"not finite|exceeds"):
        write_record(tmp_path, "r", signal_mv, 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("signal", "name", "rate", "comments", "reason"),
    [
        (np.full((12, 5), -32768, np.int16), "r", 100, (), "marks an invalid sample"),
        (np.zeros((8, 5), np.int16), "r", 100, (), "a record is int16 or mV"),
        (np.zeros((12, 0), np.int16), "r", 100, (), "a record is int16 or mV"),
        (np.zeros((12, 5), np.int32), "r", 100, (), "a record is int16 or mV"),
        (np.zeros((12, 5), np.int16), "../r", 100, (), "names are letters"),
        (np.zeros((12, 5), np.int16), "", 100, (), "names are letters"),
        (np.zeros((12, 5), np.int16), "r", 0, (), "rate >= 1"),
        (np.zeros((12, 5), np.int16), "r", 100, ("a\nb",), "one line of printable ASCII"),
        (np.zeros((12, 5), np.int16), "r", 100, ("\u00e9",), "one line of printable ASCII"),
        (np.zeros((12, 5), np.int16), "r", 100, ("x" * 70000,), "longer than"),
    ],
)  # fmt: skip
def test_what_a_record_cannot_hold_is_refused(tmp_path, signal, name, rate, comments, reason):
    with pytest.raises(ValueError, match=reason):
        write_record(tmp_path, name, signal, rate, comments)
    assert list(tmp_path.iterdir()) == []


def test_the_header_comes_last_and_nothing_partial_remains(tmp_path, monkeypatch):
    written = []

    def fails_on_header(path, data, *, durable):
        written.append(path.name)
        if path.suffix == ".hea":
            raise OSError("disk full")
        path.write_bytes(data)

    monkeypatch.setattr(wfdb_io, "atomic_write_bytes", fails_on_header)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, "r", random_adc(), 100)
    assert written == ["r.dat", "r.hea"]
    assert not is_whole(tmp_path, "r")


def test_a_damaged_record_is_not_whole(tmp_path):
    write_record(tmp_path, "r", random_adc(), 100)
    assert is_whole(tmp_path, "r")
    assert not is_whole(tmp_path, "s")
    data = (tmp_path / "r.dat").read_bytes()
    (tmp_path / "r.dat").write_bytes(bytes(len(data)))
    assert not is_whole(tmp_path, "r")
    (tmp_path / "r.dat").write_bytes(data[:-24])
    assert not is_whole(tmp_path, "r")
    (tmp_path / "r.dat").unlink()
    assert not is_whole(tmp_path, "r")
