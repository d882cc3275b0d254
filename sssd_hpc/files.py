"""Durable writes, hashes and safe paths: the one place for them.

A file written here is either whole or absent: temporary name, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sssd_hpc.errors import UserError

# A path that the user should not have named, and a disk that has no room for him: he can mend
# either, unlike a failing disk.
BAD_PATH = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

TEMP_PREFIX = ".tmp-"
MAX_CSV_FIELD = 1 << 20
LOCK_EVERY_S = 0.5
_TEMP_NAME = re.compile(r"\.tmp-.+-\d+-[0-9a-f]+")

_log = logging.getLogger(__name__)


class BusyError(UserError):
    """A lock that another process holds."""


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def age_s(path: Path, now: float) -> float | None:
    """Return how old a file is in seconds, None if it cannot be seen.

    `now` is in seconds since 1970; a file server's clock may be ahead of ours.
    """
    try:
        return max(round(now - path.stat().st_mtime, 1), 0.0)
    except OSError:
        return None


def temp_name(path: Path) -> Path:
    """Return an unused temporary name beside `path`, recognised by `is_temporary`."""
    return path.with_name(f"{TEMP_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def is_temporary(path: Path) -> bool:
    """Tell whether `temp_name` made this name; other people's `.tmp-*` are none of ours."""
    return _TEMP_NAME.fullmatch(path.name) is not None


def mendable(error: Exception) -> bool:
    """Tell whether a failed access to files is for the user to mend: a bad path, or no room.

    Libraries in Rust, such as safetensors, tell the number of the error in words alone.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    return number in (*BAD_PATH, *NO_ROOM)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path`: a full disk's write error names no file itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(
    path: Path, busy: str, *, shared: bool = False, patience_s: float = 0.0
) -> Iterator[None]:
    """Hold the lock of the file `path` inside the block; it dies with the process.

    `shared`: beside others that share it. Waits for `patience_s`, saying so once.

    Raises:
        BusyError: another process holds it; the message is `busy`.
    """
    # NFS locks a file for one process alone only if it is open for writing.
    with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as stream:
        end = time.monotonic() + patience_s
        told = False
        while not _lock(stream, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= end:
                raise BusyError(busy)
            if not told:
                _log.info("%s; waiting for up to %.0f s", busy.partition(";")[0], patience_s)
            told = True
            time.sleep(LOCK_EVERY_S)
        yield


def _lock(stream: IO[bytes], path: Path, kind: int) -> bool:
    """Lock an open file, and tell whether nobody else holds it."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some cluster file systems are mounted without locks.
        _log.warning("no lock on %s: %s", path, error.strerror)
    return True


def create_file(path: Path, data: bytes) -> bool:
    """Write a new file, whole or not at all; False where another has that name already.

    Of several processes that create it at once, on any machines, exactly one succeeds.
    """
    temp = temp_name(path)
    try:
        with naming(path):
            temp.write_bytes(data)
            fsync_path(temp)
            _name_new(temp, path)
    except FileExistsError:
        return False
    finally:
        temp.unlink(missing_ok=True)
    fsync_path(path.parent)
    return True


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary name; what the block writes there becomes `path` when it ends well.

    `durable=False` skips the fsyncs, for bulk data that a hash vouches for.

    Raises:
        OSError: the disk is full or not writable; the temporary file is removed first.
    """
    temp = temp_name(path)
    try:
        with naming(path):
            yield temp
            if durable:
                fsync_path(temp)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


def _name_new(temp: Path, path: Path) -> None:
    """Give a file a further name that nothing has yet, or raise FileExistsError."""
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # Without hard links two that come in the same instant both succeed: the last one stays.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temp, path)


def atomic_write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all; `durable=False` skips the fsync of bulk data.

    Raises:
        OSError: the disk is full or not writable; the temporary file is removed first.
    """
    with atomic_file(path, durable=durable) as temp, open(temp, "wb") as stream:
        stream.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    atomic_write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all; NaN is refused (it is not JSON)."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    Every file is flushed before the rename. `path` must not exist.
    """
    temp = temp_name(path)
    temp.mkdir(parents=True)
    try:
        yield temp
        for entry in sorted(temp.rglob("*")):
            fsync_path(entry)
        fsync_path(temp)
        os.rename(temp, path)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    fsync_path(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left in `folder` (not below it); warn of what stays."""
    for entry in filter(is_temporary, folder.glob(f"{TEMP_PREFIX}*")):
        try:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        except OSError as error:
            # On a node cut off from the others a writer may live on; a later call finds it dead.
            _log.warning("%s stays: %s", entry, error)


def inside(root: Path, relative: str) -> Path:
    """Return `root/relative`, proven to lie inside `root` once links are followed.

    Raises:
        UserError: `relative` is absolute, climbs with `..`, holds control characters or
            backslashes, begins with `~`, is a URL, or leads out through a symbolic link.
    """
    parts = relative.split("/")
    bad = (
        not relative
        or any(ord(character) < 32 or character == "\\" for character in relative)
        or "://" in relative
        or relative.startswith("~")
        or any(part in ("", ".", "..") for part in parts)
    )
    if bad:
        raise UserError(f"{relative[:200]!r} is not a plain path inside {root}")
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{relative[:200]!r} leads out of {root} through a symbolic link")
    return path


def read_csv(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV table as text cells; nothing is evaluated or converted.

    Raises:
        UserError: missing file, missing or repeated column, ragged row, NUL, a cell over 1 MiB.
    """
    previous = csv.field_size_limit(MAX_CSV_FIELD)
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, strict=True)
            header = next(reader, [])
            missing = [name for name in required if name not in header]
            if missing:
                raise UserError(f"{path} lacks the column(s) {', '.join(missing)}; it has {header}")
            if len(set(header)) != len(header):
                raise UserError(f"{path} names a column twice: {header}")
            rows = []
            for cells in reader:
                if len(cells) != len(header):
                    raise UserError(
                        f"{path} line {reader.line_num} has {len(cells)} cells, "
                        f"its header has {len(header)}"
                    )
                if any("\0" in cell for cell in cells):
                    raise UserError(f"{path} line {reader.line_num} holds a NUL character")
                rows.append(dict(zip(header, cells, strict=True)))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(previous)


def csv_text(value: str) -> str:
    """Quote text that a spreadsheet would run as a formula (OWASP: CSV injection, CWE-1236)."""
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


class _Lines(list[str]):
    """What csv.writer writes to: one string a row."""

    write = list.append


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV table whole or not at all; text cells pass through `csv_text`."""
    lines = _Lines()
    # The csv module quotes what occurs in its line terminator: a lone carriage return must be.
    writer = csv.writer(lines, lineterminator="\r\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in cells])
    atomic_write_text(path, "".join(line.removesuffix("\r\n") + "\n" for line in lines))
