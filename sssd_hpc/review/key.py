"""The key of a questionnaire: which record is real and which generated. It never leaves its owner.

The questionnaire's id, which page and answers carry, is a hash over the whole key, a salt and the
page's signals: it gives nothing away, and a key changed afterwards no longer fits its own id.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_file, read_json, sha256_bytes

FORMAT = 1
KINDS = ("real", "synthetic")
OTHER = "Other"
"""The class of records that carry none of the labels asked about."""
ASK = ("both", "report", "generated")
ID_LENGTH = 16


@dataclass(frozen=True)
class KeyRecord:
    """One record of the questionnaire, in the page's order."""

    id: str
    kind: str
    label: str
    """One of the key's `classes`."""
    ecg_id: int


@dataclass(frozen=True)
class Key:
    """Everything that the page must not say."""

    ask: str
    classes: tuple[str, ...]
    other: str
    """How the records of class Other were chosen."""
    records: tuple[KeyRecord, ...]
    signals_sha256: str
    salt: str
    source: dict[str, Any]
    """Stores, seed, versions and preparation: told in the result, not needed to score."""

    @property
    def questionnaire(self) -> str:
        """The id that binds page, key and answers."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return sha256_bytes(text.encode())[:ID_LENGTH]

    def text(self) -> str:
        """Return the key as JSON."""
        value = {"format": FORMAT, "questionnaire": self.questionnaire, **asdict(self)}
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    with atomic_file(path) as temp:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)


def read_key(path: Path) -> Key:
    """Read a key that `make` wrote.

    Raises:
        UserError: no file, no key, another version, or changed since.
    """
    value = read_json(path)
    if not isinstance(value, dict) or "questionnaire" not in value:
        raise UserError(f"{path} is no key of a questionnaire; give the key.json of review make")
    if value.get("format") != FORMAT:
        raise UserError(
            f"{path} is a key of format {value.get('format')!r}, this program reads {FORMAT}"
        )
    try:
        key = Key(
            ask=value["ask"],
            classes=tuple(value["classes"]),
            other=value["other"],
            records=tuple(KeyRecord(**record) for record in value["records"]),
            signals_sha256=value["signals_sha256"],
            salt=value["salt"],
            source=value["source"],
        )
        whole = key.questionnaire == value["questionnaire"]
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} was changed after its questionnaire was made: it does not fit its own id; "
            f"give the key.json as review make wrote it"
        )
    return key
