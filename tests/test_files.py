"""Durable files: whole or absent, inside their root, text that stays text."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sssd_hpc import files
from sssd_hpc.errors import UserError
from sssd_hpc.files import (
    BusyError,
    atomic_directory,
    atomic_write_bytes,
    create_file,
    csv_text,
    inside,
    locked,
    read_csv,
    read_json,
    remove_temporaries,
    sha256_bytes,
    sha256_file,
    temp_name,
    write_csv,
    write_json,
)


class Killed(BaseException):
    """What a signal raises: no `except Exception` may swallow it."""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# Whole or absent


def test_a_written_file_holds_the_bytes_and_leaves_no_temporary(tmp_path):
    atomic_write_bytes(tmp_path / "a", b"one")
    atomic_write_bytes(tmp_path / "a", b"two", durable=False)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), Killed()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    atomic_write_bytes(tmp_path / "a", b"old")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(type(error)):
        atomic_write_bytes(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_durable_write_flushes_the_file_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(files.os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    atomic_write_bytes(tmp_path / "a", b"x")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "d") as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "f").write_text("x")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "sub" / "f").read_text() == "x"
    assert names(tmp_path) == ["d"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), Killed()], ids=repr)
def test_a_directory_that_fails_does_not_appear(tmp_path, error):
    def fail():
        with atomic_directory(tmp_path / "d") as temp:
            (temp / "f").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == []


def test_a_directory_does_not_replace_one_with_content(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "kept").write_text("x")
    with pytest.raises(OSError, match="d"), atomic_directory(tmp_path / "d") as temp:
        (temp / "f").write_text("y")
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["kept"]


def test_only_temporaries_are_removed(tmp_path):
    (tmp_path / "keep").write_text("x")
    (tmp_path / ".tmp-cache").mkdir()
    (tmp_path / ".tmp-of-another-program-7").write_text("x")
    temp_name(tmp_path / "f").write_text("x")
    folder = temp_name(tmp_path / "d")
    folder.mkdir()
    (folder / "f").write_text("x")
    temp_name(tmp_path / "link").symlink_to(tmp_path / "keep")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [".tmp-cache", ".tmp-of-another-program-7", "keep"]


def test_what_another_still_writes_to_stays_and_is_told(tmp_path, monkeypatch, caplog):
    folder = temp_name(tmp_path / "d")
    folder.mkdir()

    def rmtree(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    remove_temporaries(tmp_path)
    assert f"{folder} stays: " in caplog.text


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/a'"):
            atomic_write_bytes(tmp_path / "a", b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_file_is_created_once_and_whole(tmp_path):
    assert create_file(tmp_path / "a", b"first")
    assert not create_file(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_of_many_that_create_a_file_one_does(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda n: create_file(tmp_path / "a", b"%d" % n * 1000), range(32))
        winners = [n for n, yes in enumerate(made) if yes]
    assert len(winners) == 1
    assert (tmp_path / "a").read_bytes() == b"%d" % winners[0] * 1000
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["link", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "failing"), Killed()], ids=repr)
def test_a_file_whose_creation_fails_is_absent(tmp_path, monkeypatch, call, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        create_file(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_a_shared_lock_keeps_off_those_who_want_it_alone(tmp_path):
    (tmp_path / "a").write_text("x")
    with (
        locked(tmp_path / "a", "", shared=True),
        locked(tmp_path / "a", "", shared=True),
        pytest.raises(BusyError, match="busy"),
        locked(tmp_path / "a", "busy"),
    ):
        pass


def test_a_lock_is_held_once_and_ends_with_its_block(tmp_path):
    (tmp_path / "a").write_text("x")
    with (
        locked(tmp_path / "a", "busy"),
        pytest.raises(UserError, match="busy"),
        locked(tmp_path / "a", "busy"),
    ):
        pass
    with locked(tmp_path / "a", "busy"):
        pass
    assert (tmp_path / "a").read_text() == "x"


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path / "a", "busy"):
        pass
    assert "no lock on" in caplog.text


def test_hashes_are_sha256(tmp_path):
    data = bytes(range(256)) * 8192
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


# Inside the root


@pytest.mark.parametrize("relative", ["a", "a/b.txt", "..a/b..", "a b", "-x", "a:b"])
def test_a_plain_path_is_inside(tmp_path, relative):
    assert inside(tmp_path, relative) == tmp_path / relative


@pytest.mark.parametrize(
    "relative",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "./a",
        "a//b",
        "a/",
        "~",
        "~root/x",
        "s3://x",
        "file:///etc/passwd",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\x1bb",
    ],
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, relative):
    with pytest.raises(UserError, match="not a plain path inside"):
        inside(tmp_path, relative)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.sampled_from(["..", ".", "a", "", "~", "link", "up", "\\", "C:"]), max_size=5))
def test_no_relative_path_leaves_the_root(tmp_path, parts):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True, exist_ok=True)
    for name, target in (("link", "a"), ("up", "../..")):
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    try:
        path = inside(root, "/".join(parts))
    except UserError:
        return
    assert os.path.realpath(path).startswith(os.path.realpath(root) + os.sep)


def test_a_link_out_of_the_root_is_refused_and_one_inside_is_not(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "near").symlink_to("real")
    (root / "far").symlink_to(tmp_path)
    assert inside(root, "near/f") == root / "near" / "f"
    with pytest.raises(UserError, match="symbolic link"):
        inside(root, "far/f")


def test_a_root_that_is_a_link_itself_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    assert inside(tmp_path / "root", "f") == tmp_path / "root" / "f"


def test_the_message_does_not_repeat_a_huge_path(tmp_path):
    with pytest.raises(UserError) as caught:
        inside(tmp_path, "../" + "x" * 100_000)
    assert len(str(caught.value)) < 1000


# CSV


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_cells_are_read_as_text(tmp_path):
    path = write(tmp_path / "t.csv", '\ufeffa,b\r\n=1+1,"x,\n""y"""\r\n007,\r\n')
    assert read_csv(path, ["b"]) == [{"a": "=1+1", "b": 'x,\n"y"'}, {"a": "007", "b": ""}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\n1\n", r"lacks the column\(s\) b"),
        ("", r"lacks the column\(s\) a, b"),
        ("a,b,a\n1,2,3\n", "names a column twice"),
        ("a,b\n1\n", "line 2 has 1 cells"),
        ("a,b\n1,2,3\n", "line 2 has 3 cells"),
        ("a,b\n1,\0\n", "NUL"),
        ('a,b\n1,"2\n', "cannot be read as CSV"),
        ('a,b\n1,"2"x\n', "cannot be read as CSV"),
        (b"a,b\n1,\xff\n", "cannot be read as CSV"),
        ("a,b\n1," + "x" * (files.MAX_CSV_FIELD + 1) + "\n", "field larger than field limit"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_table_is_an_error_with_its_file(tmp_path, text, reason):
    path = write(tmp_path / "t.csv", text)
    limit = csv.field_size_limit()
    with pytest.raises(UserError, match=reason) as caught:
        read_csv(path, ["a", "b"])
    assert "t.csv" in str(caught.value)
    assert csv.field_size_limit() == limit


def test_an_absent_table_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_csv(tmp_path / "absent.csv", [])


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_text_that_a_spreadsheet_would_run_is_quoted(tmp_path, text):
    write_csv(tmp_path / "t.csv", ["a", "b"], [{"a": text, "b": -1.5}])
    (row,) = read_csv(tmp_path / "t.csv", ["a", "b"])
    assert row == {"a": f"'{text}", "b": "-1.5"}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
def test_written_text_reads_back(text):
    # Only the guard's quote may be added.
    assert csv_text(text) in (text, f"'{text}")


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_a_written_table_reads_back(tmp_path, cells):
    write_csv(tmp_path / "t.csv", ["a", "b"], ({"a": cell} for cell in cells))
    rows = read_csv(tmp_path / "t.csv", ["a", "b"])
    assert rows == [{"a": csv_text(cell), "b": ""} for cell in cells]


def test_a_table_whose_rows_fail_leaves_the_old_one(tmp_path):
    def failing():
        yield {"a": "1"}
        raise KeyboardInterrupt

    write_csv(tmp_path / "t.csv", ["a"], [{"a": "old"}])
    with pytest.raises(KeyboardInterrupt):
        write_csv(tmp_path / "t.csv", ["a"], failing())
    assert (tmp_path / "t.csv").read_text() == "a\nold\n"
    assert names(tmp_path) == ["t.csv"]


# JSON


def test_json_reads_back(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": "\u00e9"}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("-inf")]}], ids=repr)
def test_numbers_that_are_not_json_are_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "v.json", value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "{'a': 1}", '{"a": 1,}', b"\xff\xfe", "[" * 100_000],
    ids=["empty", "open", "quotes", "comma", "bytes", "deep"],
)
def test_broken_json_is_an_error_with_its_file(tmp_path, text):
    with pytest.raises(UserError, match=r"v\.json cannot be read as JSON"):
        read_json(write(tmp_path / "v.json", text))


def test_absent_json_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path / "absent.json")


def test_json_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "v.json", {"a": 1})
    assert (tmp_path / "v.json").read_text() == json.dumps({"a": 1}, indent=2) + "\n"
