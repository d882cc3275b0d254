"""The checkpoints of a run as they are read: RUN/checkpoints/samples-%09d/.

A checkpoint is a folder of safetensors files, `state.json` and `MANIFEST.json` with the SHA-256 of
each. Its tensors are whole and named. Holds no pickles, writes nothing: `train` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from sssd_hpc import files
from sssd_hpc.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
FOLDER = re.compile(r"samples-(\d{9})")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after `samples` records.

    `tensors` maps a file's stem to its named tensors, contiguous and on the CPU; `state` holds
    plain JSON values.
    """

    samples: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


def folder(run: Path, samples: int) -> Path:
    """Return where the checkpoint at `samples` samples lies."""
    return run / "checkpoints" / f"samples-{samples:09d}"


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
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, expected in hashes.items():
        member = files.inside(path, name)
        if member.is_symlink() or not member.is_file():
            raise UserError(f"{member} is missing")
        # Bytes, not a mapped file: retention removes it while training still holds the tensors.
        content = member.read_bytes()
        if files.sha256_bytes(content) != expected:
            raise UserError(f"{member} does not have the SHA-256 of its manifest")
        if name.endswith(".safetensors"):
            stem = Path(name).stem.partition("-")[0]
            tensors.setdefault(stem, {}).update(load(content))
    if STATE not in hashes:
        raise UserError(f"{path / MANIFEST} does not name {STATE}")
    return Checkpoint(manifest["samples"], tensors, files.read_json(path / STATE))


def _manifest(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path / MANIFEST} is not of format version {FORMAT_VERSION}")
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict) or not isinstance(manifest.get("samples"), int):
        raise UserError(f"{path / MANIFEST} lacks its hashes or its count of samples")
    return manifest


def names(place: Path) -> list[str]:
    """Return the names of the checkpoints in a folder, newest first, whole or not."""
    if not place.is_dir():
        return []
    return sorted((e.name for e in place.iterdir() if FOLDER.fullmatch(e.name)), reverse=True)
