"""The store of checkpoints: RUN/checkpoints/samples-%09d/, RUN/latest.

A checkpoint is a folder of safetensors files, `state.json` and `MANIFEST.json` with the SHA-256 of
each; it is written under a temporary name and renamed, so that it is whole or absent. Loading takes
the newest that proves whole, names the damaged ones aloud, and refuses to start over in silence.
Holds no pickles; knows neither models nor optimizers. `latest` is for people and scripts: it is
written, never followed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sssd_hpc import files
from sssd_hpc.errors import UserError

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
FOLDER = re.compile(r"samples-(\d{9})")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `samples` records.

    `tensors` maps a file's stem to its named tensors, `state` holds plain JSON values.
    """

    samples: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def save(run: Path, checkpoint: Checkpoint, *, world_size: int, keep: int) -> Path:
    """Write a checkpoint, point `latest` at it, keep the newest `keep`; return its folder.

    Raises:
        UserError: it cannot be written; older checkpoints are intact and no remains are left.
    """
    folder = run / "checkpoints"
    path = folder / f"samples-{checkpoint.samples:09d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            # A run stands where its newest whole checkpoint does: this one was damaged.
            _discard(path)
        with files.atomic_directory(path) as temp:
            for stem, tensors in checkpoint.tensors.items():
                whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
                save_file(whole, temp / f"{stem}.safetensors")
            (temp / STATE).write_text(json.dumps(checkpoint.state, allow_nan=False) + "\n")
            manifest = {
                "format_version": FORMAT_VERSION,
                "samples": checkpoint.samples,
                "world_size": world_size,
                "sha256": {
                    entry.name: files.sha256_file(entry) for entry in sorted(temp.iterdir())
                },
            }
            (temp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        files.atomic_write_text(run / "latest", f"{path.relative_to(run)}\n")
        _retain(folder, checkpoint.samples, keep)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} cannot be written: {error}; older checkpoints are intact: "
            "make room and give the same command again"
        ) from error
    return path


def load_newest(run: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where none was ever written.

    Also removes what a killed writer left. Damaged checkpoints are passed over with a warning.

    Raises:
        UserError: checkpoints were written but none is whole.
    """
    folder = run / "checkpoints"
    if folder.is_dir():
        files.remove_temporaries(folder)
    if run.is_dir():
        files.remove_temporaries(run)
    names = _names(folder)
    for name in names:
        try:
            checkpoint = read(folder / name)
        except (UserError, OSError, SafetensorError) as error:
            _log.warning("checkpoint %s is damaged and passed over: %s", folder / name, error)
        else:
            _log.info("going on from %s", folder / name)
            return checkpoint
    if names or (run / "latest").exists():
        raise UserError(
            f"{run} has been trained, but none of the checkpoints in {folder} is whole "
            f"({', '.join(names) or 'none is there'}); restore one, or give --run a new folder"
        )
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint, proving every file by its hash before it is parsed.

    Raises:
        UserError: a file is missing, altered or not named by the manifest.
    """
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} is not a folder of this run")
    manifest = _manifest(path)
    match = FOLDER.fullmatch(path.name)
    if match is None or manifest["samples"] != int(match[1]):
        raise UserError(f"{path / MANIFEST} counts {manifest['samples']} samples")
    hashes = manifest["sha256"]
    for name, expected in hashes.items():
        member = files.inside(path, name)
        if member.is_symlink() or not member.is_file():
            raise UserError(f"{member} is missing")
        if files.sha256_file(member) != expected:
            raise UserError(f"{member} does not have the SHA-256 of its manifest")
    if STATE not in hashes:
        raise UserError(f"{path / MANIFEST} does not name {STATE}")
    tensors = {
        Path(name).stem: load_file(path / name) for name in hashes if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["samples"], tensors, files.read_json(path / STATE))


def _manifest(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path / MANIFEST} is not of format version {FORMAT_VERSION}")
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not isinstance(manifest.get("samples"), int):
        raise UserError(f"{path / MANIFEST} lacks its hashes or its count of samples")
    return manifest


def _names(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((e.name for e in folder.iterdir() if FOLDER.fullmatch(e.name)), reverse=True)


def _retain(folder: Path, samples: int, keep: int) -> None:
    """Remove all but the newest `keep`, and those beyond `samples`, which did not load."""
    names = _names(folder)
    here = names.index(f"samples-{samples:09d}")
    for name in [*names[:here], *names[here + keep :]]:
        _discard(folder / name)


def _discard(path: Path) -> None:
    """Remove a checkpoint by renaming it first, so that a kill leaves no half of it."""
    doomed = files.temp_name(path)
    path.rename(doomed)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)
