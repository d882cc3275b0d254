"""The store of checkpoints: RUN/checkpoints/samples-%09d/, RUN/latest, RUN/best.

A checkpoint is a folder of safetensors files, `state.json` and `MANIFEST.json` with the SHA-256 of
each; it is written under a temporary name and renamed, so that it is whole or absent. Its tensors
are whole and named: how many ranks wrote them, and how ZeRO spread them, is forgotten. Loading
takes the newest that proves whole, names the damaged ones aloud, and refuses to start over in
silence. Holds no pickles; knows neither models nor optimizers. `latest` and `best` are for people
and scripts: training writes them and follows neither.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import save_file

from sssd_hpc import files
from sssd_hpc.errors import UserError
from sssd_hpc.model.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    Checkpoint,
    Tensors,
    folder,
    names,
    read,
)
from sssd_hpc.train.ranks import Group

_log = logging.getLogger(__name__)


def save(run: Path, part: Checkpoint, *, group: Group, keep: int) -> Path:
    """Write a checkpoint at once; see `Writer`. Return its folder."""
    with Writer(run, group, keep) as writer:
        writer.begin(part)
        writer.finish()
    return folder(run, part.samples)


class Writer:
    """Writes checkpoints beside the training; use as a context manager.

    `begin` hands a checkpoint to a thread and returns; once no rank is `busy`, `finish` makes what
    was written a checkpoint, points `latest` at it and keeps the newest `keep`. Every rank calls
    both at the same step, with the tensors that are its to write; rank 0 makes the folder, the
    manifest and the name. With several ranks a file is `<stem>-<rank>-of-<world size>`. What is not
    finished when the block ends is gone.

    Args:
        run: the run's folder.
        group: the processes of the run.
        keep: how many checkpoints to keep; 0 keeps all.
        then: called by rank 0 in the thread with each new checkpoint, whole.
    """

    def __init__(
        self, run: Path, group: Group, keep: int, then: Callable[[Checkpoint], None] | None = None
    ) -> None:
        self._run, self._group, self._keep, self._then = run, group, keep, then
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._part: Checkpoint | None = None
        self._temp = Path()
        self._written: Future[dict[str, str]] | None = None
        self._after: Future[None] | None = None
        self.best: int | None = None
        """Samples of the checkpoint that is kept however old it is, by `name_best`."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if self._part is not None and self._group.rank == 0:
            shutil.rmtree(self._temp, ignore_errors=True)
        if kind is None:
            self._group.first(self._rest)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished; the same on every rank."""
        return self._part is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._written is not None and not self._written.done()

    def begin(self, part: Checkpoint) -> None:
        """Begin to write a checkpoint; `part` must not change until `finish`.

        Raises:
            UserError, OSError: as `finish`, of this or of the checkpoint before.
        """
        self.finish()
        path = folder(self._run, part.samples)
        self._temp = Path(self._group.first(lambda: str(_begin(path))))
        self._part = part
        self._written = self._pool.submit(_write, path, self._temp, part.tensors, self._group)

    def finish(self) -> None:
        """Wait for the writing, then make it a checkpoint; nothing if none was begun.

        Raises:
            UserError: a rank had no room; older checkpoints are intact and no remains are left.
            OSError: so, but the disk failed.
        """
        if self._part is None or self._written is None:
            return
        part, written = self._part, self._written
        path = folder(self._run, part.samples)
        hashes = self._group.everywhere(written.result)
        size, best = self._group.world_size, self.best
        self._group.first(
            lambda: _commit(self._run, path, self._temp, part, hashes, size, self._keep, best)
        )
        self._part = self._written = None
        self._group.first(self._rest)
        if self._then and self._group.rank == 0:
            whole = (lambda: part) if self._group.world_size == 1 else (lambda: read(path))
            then = self._then
            self._after = self._pool.submit(lambda: then(whole()))

    def name_best(self, newest: int, best: int | None) -> None:
        """Let RUN/best name a checkpoint and keep it, however old, beside the newest ones.

        None removes RUN/best: of the checkpoints that are there none has been validated.
        """
        self.best = best

        def name() -> None:
            if best is None:
                (self._run / "best").unlink(missing_ok=True)
                return
            with _refusing(self._run / "best"):
                point(self._run, folder(self._run, best), "best")
                _retain(folder(self._run, newest), self._keep, best)

        self._group.first(name)

    def _rest(self) -> None:
        """Wait for what came after the checkpoint before; raise what it raised."""
        if self._after is not None:
            self._after.result()


def _begin(path: Path) -> Path:
    """Make the temporary folder of a checkpoint."""
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            # A run stands where its newest whole checkpoint does: this one was damaged.
            _discard(path)
        temp = files.temp_name(path)
        temp.mkdir()
        return temp


def _write(path: Path, temp: Path, tensors: Mapping[str, Tensors], group: Group) -> dict[str, str]:
    """Write a rank's files; return their hashes."""
    suffix = f"-{group.rank:05d}-of-{group.world_size:05d}" if group.world_size > 1 else ""
    hashes = {}
    with _refusing(path):
        for stem, named in tensors.items():
            file = temp / f"{stem}{suffix}.safetensors"
            save_file(dict(named), file)
            files.fsync_path(file)
            hashes[file.name] = files.sha256_file(file)
    return hashes


def _commit(
    run: Path,
    path: Path,
    temp: Path,
    part: Checkpoint,
    hashes: list[dict[str, str]],
    world_size: int,
    keep: int,
    best: int | None,
) -> None:
    """Make the folder that all ranks wrote to a checkpoint."""
    with _refusing(path):
        files.atomic_write_text(temp / STATE, json.dumps(part.state, allow_nan=False) + "\n")
        named = {name: digest for of_rank in hashes for name, digest in of_rank.items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "samples": part.samples,
            "world_size": world_size,
            "sha256": {**named, STATE: files.sha256_file(temp / STATE)},
        }
        files.atomic_write_text(temp / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        files.fsync_path(temp)
        temp.rename(path)
        files.fsync_path(path.parent)
        point(run, path)
        _retain(path, keep, best)


@contextlib.contextmanager
def refusing(what: str, intact: str) -> Iterator[None]:
    """Say what cannot be written and what is left; no room is the user's error, a failing disk not.

    Raises:
        UserError, OSError: as said.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        kind = UserError if files.mendable(error) else OSError
        raise kind(
            f"{what} cannot be written: {error}; {intact} are intact: "
            "mend that and give the same command again"
        ) from error


def _refusing(path: Path) -> contextlib.AbstractContextManager[None]:
    return refusing(f"checkpoint {path}", "older checkpoints")


def point(run: Path, path: Path, pointer: str = "latest") -> None:
    """Let RUN/latest or RUN/best name this checkpoint; a killed writer may have left an older."""
    place, name = run / pointer, f"{path.relative_to(run)}\n"
    if place.is_symlink() or not place.is_file() or place.read_bytes() != name.encode():
        files.atomic_write_text(place, name)


def load_newest(run: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where none was ever written.

    Also removes what a killed writer left. Damaged checkpoints are passed over with a warning.

    Raises:
        UserError: checkpoints were written but none is whole.
    """
    place = run / "checkpoints"
    if place.is_dir():
        files.remove_temporaries(place)
    if run.is_dir():
        files.remove_temporaries(run)
    found = names(place)
    for name in found:
        try:
            checkpoint = read(place / name)
        except (UserError, OSError, SafetensorError) as error:
            _log.warning("checkpoint %s is damaged and passed over: %s", place / name, error)
        else:
            _log.info("going on from %s", place / name)
            return checkpoint
    if found or (run / "latest").exists():
        raise UserError(
            f"{run} has been trained, but none of the checkpoints in {place} is whole "
            f"({', '.join(found) or 'none is there'}); restore one, or give --run a new folder"
        )
    return None


def _retain(path: Path, keep: int, best: int | None) -> None:
    """Keep `path`, the best and the newest before it, `keep` or all; those beyond did not load."""
    found = names(path.parent)
    here = found.index(path.name)
    old = found[here + keep :] if keep else []
    for name in [*found[:here], *old]:
        if best is None or name != folder(Path(), best).name:
            _discard(path.parent / name)


def _discard(path: Path) -> None:
    """Remove a checkpoint by renaming it first, so that a kill leaves no half of it."""
    doomed = files.temp_name(path)
    path.rename(doomed)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)
