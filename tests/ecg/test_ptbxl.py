"""PTB-XL's table: what is read, what is refused, and finished roots."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd_hpc.ecg.ptbxl import (
    COLUMNS,
    MAX_SCP_CHARS,
    finish_root,
    parse_scp_codes,
    read_table,
)
from sssd_hpc.ecg.statements import aggregate, load_statements
from sssd_hpc.ecg.wfdb_io import write_record
from sssd_hpc.errors import UserError
from sssd_hpc.files import read_csv


def test_the_real_table_is_read_whole(ptbxl_root):
    table = read_table(ptbxl_root)
    assert len(table.rows) == 500
    assert (table.rejected, table.patients_in_several_folds) == ([], [])
    assert (table.synthetic, table.version) == (False, "before 1.0.3")
    first = table.rows[0]
    assert (first.ecg_id, first.patient_id, first.strat_fold) == (1, "15709", 3)
    assert first.scp_codes == {"NORM": 100.0, "LVOLT": 0.0, "SR": 0.0}
    assert first.filename_hr == "records500/00000/00001_hr"


def test_the_version_is_told_by_the_number_of_records(tmp_path, write_table):
    write_table(tmp_path, ecg_id=list(range(1, 21800)))
    assert read_table(tmp_path).version == "1.0.3"


# scp_codes


def test_scp_codes_are_codes_with_likelihoods():
    assert parse_scp_codes(" {'NORM': 80, \"1AVB\": 0.5} ") == {"NORM": 80.0, "1AVB": 0.5}
    assert parse_scp_codes("{}") == {}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch hacked')",
        "{'NORM': __import__('os').getpid()}",
        "{'NORM': open('hacked', 'w')}",
        "{**{'NORM': 1}}",
        "[" * 5000,
        "{'A': " * 500 + "1" + "}" * 500,
        "(" * 2000 + ")" * 2000,
        "-" * 4000 + "1",
        "['NORM']",
        "'NORM'",
        "None",
        "",
        "{'NORM'}",
        "{'NORM': nan}",
        "{'NORM': 1e999}",
        "{'NORM': -1}",
        "{'NORM': 100.5}",
        "{'NORM': 200}",
        "{'NORM': '100'}",
        "{'NORM': True}",
        "{'NORM': None}",
        "{'NORM': 1j}",
        "{'NORM': " + "9" * 4000 + "}",
        "{1: 1}",
        "{'': 1}",
        "{'a\\nb': 1}",
        "{'" + "x" * 33 + "': 1}",
        "{'NORM': 100}" + " " * MAX_SCP_CHARS,
        "{[]: 1}",
        "{'A': 1}\0",
        "{'A': 0777}",
        "{'A': 1if 1else 2}",
    ],
    ids=lambda text: text[:20],
)
def test_bad_scp_codes_are_refused_and_never_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "eval", None)
    with pytest.raises(ValueError, match="scp_codes") as caught:
        parse_scp_codes(text)
    assert not isinstance(caught.value, UserError)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="{}[]()'\":,.0159eNORM_- *j", max_size=60)))
def test_any_cell_gives_codes_or_the_reason(text):
    codes: dict[str, float] = {}
    with contextlib.suppress(ValueError):
        codes = parse_scp_codes(text)
    assert all(0 <= likelihood <= 100 for likelihood in codes.values())


def test_a_bad_cell_rejects_its_row_not_the_table(tmp_path, write_table):
    write_table(tmp_path, scp_codes=["{'SR': 0.0}", "nonsense", "{'NORM': 300}", "{}"])
    table = read_table(tmp_path)
    assert [row.ecg_id for row in table.rows] == [1, 4]
    assert [entry.row.ecg_id for entry in table.rejected] == [2, 3]
    assert "not a dictionary" in table.rejected[0].reason
    assert "0 to 100" in table.rejected[1].reason


# Folds and ids


@pytest.mark.parametrize("fold", [0, 11, -1, "", "nan", "NaN", "3.5", "one", "1e0", "9" * 30])
def test_a_fold_outside_1_to_10_is_an_error(tmp_path, write_table, fold):
    write_table(tmp_path, strat_fold=[1, fold])
    for allow_leakage in (False, True):
        with pytest.raises(UserError, match="row 2: strat_fold is"):
            read_table(tmp_path, allow_leakage=allow_leakage)


@pytest.mark.parametrize("ecg_id", ["", "x", "-3", "1.5", "=1+1"])
def test_an_ecg_id_that_is_no_whole_number_is_an_error(tmp_path, write_table, ecg_id):
    write_table(tmp_path, ecg_id=[7, ecg_id])
    with pytest.raises(UserError, match="row 2: ecg_id is"):
        read_table(tmp_path)


def test_an_ecg_id_twice_is_an_error(tmp_path, write_table):
    write_table(tmp_path, ecg_id=[7, 8, "7.0"])
    with pytest.raises(UserError, match="row 3: ecg_id 7 comes twice"):
        read_table(tmp_path, allow_leakage=True)


def test_a_patient_in_two_folds_is_an_error_unless_allowed(tmp_path, write_table):
    write_table(tmp_path, patient_id=["5.0", "6", "5"], strat_fold=[1, 2, 9])
    with pytest.raises(UserError, match=r"1 patient\(s\).*several folds.*'5'"):
        read_table(tmp_path)
    table = read_table(tmp_path, allow_leakage=True)
    assert table.patients_in_several_folds == ["5"]
    assert len(table.rows) == 3


def test_an_empty_patient_id_is_an_error(tmp_path, write_table):
    write_table(tmp_path, patient_id=["5", " "])
    with pytest.raises(UserError, match="row 2: patient_id is empty"):
        read_table(tmp_path)


def test_an_empty_or_absent_table_is_an_error(tmp_path, write_table):
    with pytest.raises(UserError, match=r"ptbxl_database\.csv"):
        read_table(tmp_path)
    (tmp_path / "ptbxl_database.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(UserError, match="has no rows"):
        read_table(tmp_path)


@pytest.mark.parametrize("column", ["ecg_id", "patient_id", "scp_codes", "strat_fold"])
def test_a_missing_column_is_named(tmp_path, write_table, column):
    write_table(tmp_path, ecg_id=[1])
    path = tmp_path / "ptbxl_database.csv"
    path.write_text(path.read_text().replace(f",{column},", ",other,").replace("ecg_id,", "id,"))
    with pytest.raises(UserError, match=rf"lacks the column\(s\).*{column}|ecg_id"):
        read_table(tmp_path)


# Finished roots


def test_a_finished_root_has_ptbxls_layout_and_reads_back(tmp_path, make_root, rows_of):
    root = make_root(tmp_path / "root", 3, rates=(100, 500))
    assert sorted(entry.name for entry in root.iterdir()) == [
        "README.md",
        "RECORDS",
        "SHA256SUMS.txt",
        "ptbxl_database.csv",
        "records100",
        "records500",
        "scp_statements.csv",
    ]
    assert read_table(root).rows == rows_of(3)
    records = (root / "RECORDS").read_text().splitlines()
    assert records[0] == "records100/00000/00001_lr"
    assert records[-1] == "records500/00000/00003_hr"
    assert tuple(read_csv(root / "ptbxl_database.csv", ())[0]) == COLUMNS
    assert (root / "README.md").read_text() == "# A test set\n"


def test_sums_cover_every_file_in_ptbxls_form(tmp_path, make_root):
    root = make_root(tmp_path / "root", 2)
    lines = (root / "SHA256SUMS.txt").read_text().splitlines()
    listed = dict(reversed(line.split(" ")) for line in lines)
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert set(listed) == found - {"SHA256SUMS.txt"}
    for name, digest in listed.items():
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
    assert list(listed) == sorted(listed)


def test_synthetic_columns_appear_when_given(tmp_path, make_root, rows_of):
    root = make_root(tmp_path / "root", 2)
    rows = [replace(row, filename_hr="", source_ecg_id=77, seed=5) for row in rows_of(2)]
    rows[1] = replace(rows[1], source_ecg_id=None)
    finish_root(root, rows, statements_extra=[aggregate("MI")], card="card")
    cells = read_csv(root / "ptbxl_database.csv", ())
    assert tuple(cells[0]) == (*COLUMNS, "source_ecg_id", "seed")
    assert [cell["source_ecg_id"] for cell in cells] == ["77", ""]
    assert [cell["seed"] for cell in cells] == ["5", "5"]
    assert read_table(root).synthetic
    assert "MI" in load_statements(root)


def test_finishing_again_gives_the_same_bytes(tmp_path, make_root, rows_of):
    root = make_root(tmp_path / "root", 3)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    rows = [replace(row, filename_hr="") for row in rows_of(3)]
    finish_root(root, rows, card="# A test set\n")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_root_with_a_damaged_record_is_not_finished(tmp_path, rows_of, signal_of):
    folder = tmp_path / "records100" / "00000"
    folder.mkdir(parents=True)
    rows = [replace(row, filename_hr="") for row in rows_of(2)]
    write_record(folder, "00001_lr", signal_of(1), 100)
    with pytest.raises(ValueError, match="00002_lr is missing or damaged"):
        finish_root(tmp_path, rows, card="")
    assert not (tmp_path / "ptbxl_database.csv").exists()
