"""The folder that a synthetic set is made in: whose it is, who works on it, what it holds.

Several processes may claim a root and work on it at once, on any machines. Refuses a folder that
belongs to another request, or that holds anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sssd_hpc import files
from sssd_hpc.ecg import ptbxl, statements
from sssd_hpc.ecg.wfdb_io import is_whole
from sssd_hpc.errors import UserError
from sssd_hpc.files import inside, is_temporary, read_json, sha256_file
from sssd_hpc.generate import manifest as manifests
from sssd_hpc.generate.manifest import Manifest, Request
from sssd_hpc.generate.names import JOBS, MANIFEST_FILE, REQUEST_FILE, SHARDS, SUMS_FILE

REQUEST_FORMAT = 1
TABLES = ("README.md", "RECORDS", ptbxl.FILE, statements.FILE)


def claim(out: Path, manifest: Manifest, request: Request) -> None:
    """Make `out` the root of `request`, or see that it already is; the manifest is written once.

    Raises:
        UserError: `out` is a file, belongs to another request, holds what this did not write, or
            its manifest was edited.
    """
    path = out / REQUEST_FILE
    if not path.exists():
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; give a new or empty folder")
        out.mkdir(parents=True, exist_ok=True)
        foreign = [e for e in out.iterdir() if not is_temporary(e) and e.name != JOBS]
        # Beside another process that claims it at this moment, its files are none of a stranger.
        if foreign and not path.exists():
            raise UserError(
                f"--out {out} holds files that sampling did not write; give a new folder"
            )
        text = json.dumps(_as_json(request), indent=2, allow_nan=False) + "\n"
        files.create_file(path, text.encode())
    check(out, request)
    _keep_manifest(out, manifest, request)


def check(out: Path, request: Request, *, besides: tuple[str, ...] = ()) -> None:
    """See that a root is of this request, fields `besides` excepted.

    Raises:
        UserError: it belongs to another request.
    """
    unequal = differences(out, request)
    told = ", ".join(f"{n} {pair[0]} (now {pair[1]})" for n, pair in unequal.items())
    matters = unequal.keys() - set(besides)
    if matters == {"device"}:
        raise UserError(
            f"{out} was begun with {told}, which rounds differently; go on where there is such a "
            f"device (options: {{constraint: ..}} of slurm/cluster.yaml), or give another --out"
        )
    if matters:
        raise UserError(
            f"{out} was begun with {told}; repeat that command to go on, or give another --out"
        )


def differences(out: Path, request: Request) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which a root's request, first, differs from this one.

    Raises:
        UserError: `out` is no root.
    """
    held, wanted = read_json(out / REQUEST_FILE), _as_json(request)
    held = held if isinstance(held, dict) else {}
    return {n: (held.get(n), value) for n, value in wanted.items() if held.get(n) != value}


def held_batch_size(out: Path) -> int | None:
    """Return the batch size that a root was begun with; None where it does not say."""
    held = read_json(out / REQUEST_FILE)
    size = held.get("batch_size") if isinstance(held, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def _keep_manifest(out: Path, manifest: Manifest, request: Request) -> None:
    path = out / MANIFEST_FILE
    text = manifest.lines(request.seed, request.batch_size).encode()
    if not path.exists():
        files.atomic_write_bytes(path, text)
    elif path.read_bytes() != text:
        raise UserError(
            f"{path} was changed after it was written; remove it and repeat the same command, "
            f"which writes it again"
        )


def read_back(out: Path) -> tuple[Manifest, Request]:
    """Return what a root is made of, from its own files.

    Raises:
        UserError: `out` is no root, or its manifest was edited.
    """
    if not (out / REQUEST_FILE).is_file():
        raise UserError(f"{out} is not a folder that sample made: it has no {REQUEST_FILE}")
    held = read_json(out / REQUEST_FILE)
    path = out / MANIFEST_FILE
    try:
        number = held.pop("format")
        if number != REQUEST_FORMAT:
            raise UserError(f"{out / REQUEST_FILE} has format {number}, this version reads 1")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in held.items()
        }
        request = Request(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{out / REQUEST_FILE} is not a request of this version") from error
    try:
        text = path.read_text(encoding="utf-8")
        manifest = manifests.parse(text)
        same = text == manifest.lines(request.seed, request.batch_size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        same = False
    if not same or manifest.sha256() != request.manifest_sha256:
        raise UserError(
            f"{path} is not the manifest that {out} was begun with: its hash differs; remove it "
            f"and repeat the sample command, which writes it again"
        )
    return manifest, request


def locked(
    out: Path, *, shared: bool = False, patience_s: float = 0.0
) -> contextlib.AbstractContextManager[None]:
    """Keep other processes off a claimed root, or off its end (`shared`); dies with the process.

    Raises:
        UserError: another process holds it, for longer than `patience_s`.
    """
    busy = f"another process is sampling into {out}; wait for it or stop it"
    return files.locked(out / REQUEST_FILE, busy, shared=shared, patience_s=patience_s)


@contextlib.contextmanager
def shard_locked(out: Path, number: int, count: int, *, patience_s: float = 0.0) -> Iterator[None]:
    """Keep a second launch off the same shard; inside `locked`.

    Raises:
        UserError: another process holds it, for longer than `patience_s`.
    """
    path = out / SHARDS / f"{number:05d}-of-{count:05d}.lock"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    busy = f"another process makes shard {number}/{count} of {out}; wait for it or stop it"
    with files.locked(path, busy, patience_s=patience_s):
        yield


def clear(out: Path) -> None:
    """Remove what only unfinished roots need; nobody else may be at work."""
    files.remove_temporaries(out)
    shutil.rmtree(out / SHARDS, ignore_errors=True)


def has_record(out: Path, manifest: Manifest, request: Request, row: int) -> bool:
    """Tell whether a row's record lies whole in `out` and answers this very request."""
    name = manifest.name(row)
    if not is_whole(out, name):
        return False
    with contextlib.suppress(OSError):
        lines = (out / f"{name}.hea").read_text(encoding="utf-8", errors="replace").splitlines()
        comments = tuple(line[1:].strip() for line in lines if line.startswith("#"))
        return comments == request.comments(manifest.codes(row))
    return False


def damaged(out: Path, manifest: Manifest) -> set[str] | None:
    """Return the files of a finished root that differ from its list of hashes; None if unfinished.

    Finished means that the list, written last, is there; a file that it lacks counts as damaged.
    """
    sums = out / SUMS_FILE
    if not sums.is_file():
        return None
    right = set()
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition(" ")
        with contextlib.suppress(UserError, OSError):
            if sha256_file(inside(out, name)) == digest:
                right.add(name)
    return {*manifest.files(), *TABLES} - right


def reopen(out: Path, manifest: Manifest, broken: set[str]) -> None:
    """Make a finished root with damaged files unfinished: those records will be drawn again."""
    records = {name.rpartition(".")[0] for name in broken & manifest.files()}
    for record in sorted(records):
        # Without its header a record is none; the list goes last, so that a kill loses no damage.
        inside(out, f"{record}.hea").unlink(missing_ok=True)
    (out / SUMS_FILE).unlink()


def _as_json(request: Request) -> dict[str, Any]:
    values = dataclasses.asdict(request)
    lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {"format": REQUEST_FORMAT, **values, **lists}
