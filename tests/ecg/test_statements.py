"""Statements: the official sets, the labels of a record, the table on the disk."""

from __future__ import annotations

import pytest

from sssd_hpc.ecg.statements import (
    COLUMNS,
    SETS,
    STATEMENTS,
    aggregate,
    encode,
    label_names,
    load_statements,
    write_statements,
)
from sssd_hpc.errors import UserError
from sssd_hpc.files import read_csv


def carried(names, row):
    return [name for name, yes in zip(names, row, strict=True) if yes]


@pytest.mark.parametrize(
    ("selection", "size"), list(zip(SETS, (71, 44, 23, 5, 19, 12), strict=True))
)
def test_the_official_sets_have_their_sizes_and_are_sorted(selection, size):
    names = label_names(selection, STATEMENTS)
    assert len(names) == size
    assert list(names) == sorted(set(names))


def test_the_embedded_table_is_ptbxls(ptbxl_root):
    official = load_statements(ptbxl_root)
    assert official == STATEMENTS
    assert list(official) == list(STATEMENTS)


def test_a_written_table_reads_back_with_its_extra_rows(tmp_path):
    extra = [aggregate("MI"), aggregate("_AVB")]
    write_statements(tmp_path / "scp_statements.csv", extra)
    found = load_statements(tmp_path)
    assert found == {**STATEMENTS, "MI": extra[0], "_AVB": extra[1]}
    assert tuple(read_csv(tmp_path / "scp_statements.csv", ())[0]) == COLUMNS


def test_a_list_of_codes_is_sorted_and_unique():
    assert label_names("SR, AFIB,SR", STATEMENTS) == ("AFIB", "SR")
    assert label_names("1AVB", STATEMENTS) == ("1AVB",)


@pytest.mark.parametrize("selection", ["afib", "AFIB,ABIF", "", "MI", "super,AFIB"])
def test_an_unknown_code_is_an_error_with_what_is_allowed(selection):
    with pytest.raises(UserError, match=r"unknown code.*all, diag, sub, super, form, rhythm"):
        label_names(selection, STATEMENTS)


def test_an_unknown_code_gets_close_matches():
    with pytest.raises(UserError, match=r"did you mean.*AFIB"):
        label_names("afbi", STATEMENTS)


def test_a_set_without_members_is_an_error():
    with pytest.raises(UserError, match="no such statements"):
        label_names("rhythm", {"NORM": STATEMENTS["NORM"]})


def test_every_code_counts_whatever_its_likelihood():
    names = label_names("all", STATEMENTS)
    row = encode({"SR": 0.0, "NORM": 80.0}, "all", names, STATEMENTS)
    assert carried(names, row) == ["NORM", "SR"]
    assert row.dtype == "uint8"


def test_a_minimal_likelihood_drops_diagnostic_statements_alone():
    names = label_names("all", STATEMENTS)
    codes = {"IMI": 35.0, "NORM": 50.0, "SR": 0.0, "PVC": 0.0}
    assert carried(names, encode(codes, "all", names, STATEMENTS, 50.0)) == ["NORM", "PVC", "SR"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("super", ["CD", "MI"]),
        ("sub", ["AMI", "_AVB"]),
        ("diag", ["1AVB", "ASMI"]),
        ("form", ["PVC"]),
        ("rhythm", ["SR"]),
        ("SR,ASMI,AFIB", ["ASMI", "SR"]),
    ],
)
def test_a_record_carries_the_names_of_the_set(selection, expected):
    names = label_names(selection, STATEMENTS)
    codes = {"ASMI": 100.0, "1AVB": 100.0, "SR": 0.0, "PVC": 100.0}
    assert carried(names, encode(codes, selection, names, STATEMENTS)) == expected


def test_classes_as_rows_count_for_their_sets_and_are_no_codes():
    table = {**STATEMENTS, "MI": aggregate("MI"), "_AVB": aggregate("_AVB")}
    for selection in SETS:
        assert label_names(selection, table) == label_names(selection, STATEMENTS)
    names = label_names("super", table)
    assert carried(names, encode({"MI": 100.0}, "super", names, table)) == ["MI"]
    assert carried(names, encode({"_AVB": 100.0}, "super", names, table)) == ["CD"]
    names = label_names("sub", table)
    assert carried(names, encode({"_AVB": 100.0, "MI": 1.0}, "sub", names, table)) == ["_AVB"]


def test_a_class_that_ptbxl_lacks_is_refused():
    with pytest.raises(ValueError, match="neither a superclass nor a subclass"):
        aggregate("XYZ")


def test_a_code_that_the_table_lacks_is_refused():
    with pytest.raises(ValueError, match="a code that"):
        encode({"NOPE": 1.0}, "all", ("SR",), STATEMENTS)


@pytest.mark.parametrize("code", ["", "NORM"], ids=["empty", "repeated"])
def test_a_table_with_an_empty_or_repeated_code_is_refused(tmp_path, code):
    write_statements(tmp_path / "scp_statements.csv")
    with open(tmp_path / "scp_statements.csv", "a") as stream:
        stream.write(code + "," * (len(COLUMNS) - 1) + "\n")
    with pytest.raises(UserError, match="empty or repeated code"):
        load_statements(tmp_path)
