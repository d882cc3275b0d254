"""Answer files, read as what they are: text from outside, possibly broken or forged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sssd_hpc.errors import UserError
from sssd_hpc.files import sha256_bytes
from sssd_hpc.review.key import Key

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_BYTES = 16 << 20
MAX_REPORT = 5000
MAX_RATER = 80
CONFIDENCE = (1, 2, 3)
"""Guessing, fairly sure, certain."""


@dataclass(frozen=True)
class Answer:
    """What a rater said of one record; empty or None where nothing was said."""

    report: str
    generated: bool | None
    confidence: int | None


@dataclass(frozen=True)
class Rater:
    """One file of answers, by record id."""

    name: str
    answers: Mapping[str, Answer]
    file: str
    sha256: str


def read_all(paths: Sequence[Path], key: Key) -> list[Rater]:
    """Read files of answers to the questionnaire of `key`, one a rater.

    Raises:
        UserError: as `read`, no file at all, or two of one rater.
    """
    if not paths:
        raise UserError("--answers names no file; give what raters saved")
    raters = [read(path, key) for path in paths]
    names: dict[str, Path] = {}
    for path, rater in zip(paths, raters, strict=True):
        earlier = names.setdefault(" ".join(rater.name.casefold().split()), path)
        if earlier is not path:
            raise UserError(
                f"{earlier} and {path} are both of rater {_short(rater.name)}; give one of them, "
                f"or let two people use two names"
            )
    alike: dict[str, Path] = {}
    for path, rater in zip(paths, raters, strict=True):
        earlier = alike.setdefault(repr(sorted(rater.answers.items())), path)
        if earlier is not path and rater.answers:
            logger.warning("%s answers word for word as %s does: a copy?", path, earlier)
    return raters


def read(path: Path, key: Key) -> Rater:
    """Read and check one file of answers.

    Raises:
        UserError: no such file, too large, not JSON, another form or questionnaire, an unknown id,
            an id twice, or an answer that the page cannot give.
    """
    value, digest = _json(path)
    if not isinstance(value, dict) or not isinstance(value.get("questionnaire"), str):
        raise UserError(f"{path} holds no answers; give a file that the questionnaire's page saved")
    if value.get("format") != FORMAT:
        raise UserError(
            f"{path} holds answers of format {_short(value.get('format'))}, "
            f"this program reads {FORMAT}"
        )
    if value["questionnaire"] != key.questionnaire:
        raise UserError(
            f"{path} answers questionnaire {_short(value['questionnaire'])}, the key is that of "
            f"{key.questionnaire}; give the key that belongs to it"
        )
    name = value.get("rater")
    # A name goes to the terminal, where control characters would act.
    if (
        not isinstance(name, str)
        or not name.strip()
        or len(name) > MAX_RATER
        or not name.isprintable()
    ):
        raise UserError(
            f"{path}: rater is {_short(name)}; a name of 1 to {MAX_RATER} printable characters is "
            f"needed"
        )
    rows = value.get("answers")
    if not isinstance(rows, list):
        raise UserError(f"{path}: answers is no list; save the answers anew")
    known = {record.id for record in key.records}
    answers: dict[str, Answer] = {}
    for number, row in enumerate(rows, 1):
        record_id, answer = _answer(f"{path}: answer {number}", row)
        if record_id not in known:
            raise UserError(
                f"{path}: answer {number} is of record {_short(record_id)}, which questionnaire "
                f"{key.questionnaire} does not have"
            )
        if record_id in answers:
            raise UserError(f"{path}: record {record_id} is answered twice; keep one of them")
        answers[record_id] = answer
    return Rater(name.strip(), answers, path.name, digest)


def _answer(where: str, row: Any) -> tuple[str, Answer]:
    """Return one answer, proven to be one that the page can give."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UserError(f"{where} has no id; save the answers anew")
    report, generated, confidence = (row.get(k) for k in ("report", "generated", "confidence"))
    if not isinstance(report, str) or len(report) > MAX_REPORT:
        raise UserError(f"{where}: report must be text of at most {MAX_REPORT} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in report):
        raise UserError(f"{where}: report holds half a character, as no keyboard writes")
    if generated is not None and not isinstance(generated, bool):
        raise UserError(f"{where}: generated is {_short(generated)}; allowed are true, false, null")
    if confidence is not None and (type(confidence) is not int or confidence not in CONFIDENCE):
        raise UserError(f"{where}: confidence is {_short(confidence)}; allowed are 1, 2, 3, null")
    return row["id"], Answer(report, generated, confidence)


def _json(path: Path) -> tuple[Any, str]:
    """Return a file's JSON and SHA-256; a key that stands twice in an object is refused."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB, as no answers are; give a file that "
                f"the questionnaire's page saved"
            )
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique), sha256_bytes(data)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {_short(error, 120)}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return dict(pairs)


def _short(value: object, length: int = 40) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
