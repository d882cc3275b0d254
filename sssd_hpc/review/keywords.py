"""Which findings a free-text report asserts or denies: keywords and negation, in English.

Negation follows NegEx (Chapman et al., J Biomed Inform 2001): a denial reaches a few words on
within its clause. A comma ends it too, unless the words after it go on a list: "no AF, PVC or
infarction" denies three things, "no AF, RBBB" one. It reads words, not meaning; the result shows
every report with its marks, so that a human can check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from sssd_hpc.config import read_yaml
from sssd_hpc.errors import UserError

MAX_WORDS = 6
"""How far a denial reaches."""
MAX_KEYWORD = 200
NEGATION = ("before", "after", "harmless", "ends")

_BREAK = re.compile(r"[;:\n!?]|\.(?=\s|$)|,")
_NAY = re.compile(r"\s*[:=-]\s*(?:no|none|negative|absent)\s*(?=[.,;\n]|$)", re.IGNORECASE)
_LIST_GOES_ON = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Mention:
    """A keyword in a report: characters `start` to `end`, of a class or a sign."""

    name: str
    start: int
    end: int
    denied: bool


@dataclass(frozen=True)
class Keywords:
    """Lists of keywords by class and by sign, and the words of negation."""

    classes: Mapping[str, tuple[str, ...]]
    signs: Mapping[str, tuple[str, ...]]
    negation: Mapping[str, tuple[str, ...]]

    def mentions(self, report: str) -> list[Mention]:
        """Return what a report mentions, in order; overlapping keywords once, the longest."""
        found = [
            (self._phrases[(match.lastindex or 0) - 1][1], *match.span())
            for match in self._pattern.finditer(report)
        ]
        spans = [(start, end) for _, start, end in found]
        denials = self._denials(report, spans)
        return [
            Mention(name, start, end, self._is_denied(report, start, end, spans, denials))
            for name, start, end in found
        ]

    def asserted(self, report: str) -> set[str]:
        """Return the classes and signs that a report asserts at least once."""
        return {mention.name for mention in self.mentions(report) if not mention.denied}

    @cached_property
    def _phrases(self) -> list[tuple[str, str]]:
        """Return (keyword, class or sign), the longest first: at each place the longest wins."""
        lists = [*self.classes.items(), *self.signs.items()]
        pairs = [(phrase, name) for name, phrases in lists for phrase in phrases]
        return sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Return one pattern of all keywords, one group each."""
        return _any(f"({_phrase(phrase)})" for phrase, _ in self._phrases)

    @cached_property
    def _negation(self) -> dict[str, re.Pattern[str]]:
        return {
            part: _any(_phrase(phrase) for phrase in sorted(self.negation[part], key=len)[::-1])
            for part in NEGATION
        }

    def _denials(self, report: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return where denials of what follows stand, outside keywords and harmless phrases."""
        harmless = [match.span() for match in self._negation["harmless"].finditer(report)]
        return [
            match.span()
            for match in self._negation["before"].finditer(report)
            if not any(start < match.end() and match.start() < end for start, end in spans)
            and not any(start <= match.start() < end for start, end in harmless)
        ]

    def _is_denied(
        self,
        report: str,
        start: int,
        end: int,
        spans: list[tuple[int, int]],
        denials: list[tuple[int, int]],
    ) -> bool:
        before = [denial for denial in denials if denial[1] <= start]
        if before and self._reaches(report, before[-1][1], start, spans):
            return True
        rest = report[end:]
        harmless = self._negation["harmless"].match(rest.lstrip())
        after = self._negation["after"].match(rest.lstrip(" "))
        return bool(_NAY.match(rest) or (after and not harmless))

    def _reaches(self, report: str, begin: int, start: int, spans: list[tuple[int, int]]) -> bool:
        """Tell whether a denial that ends at `begin` reaches a keyword at `start`."""
        between = report[begin:start]
        for first, last in spans:
            if begin <= first and last <= start:
                # Other keywords of a list are no words on the way.
                blank = " " * (last - first)
                between = between[: first - begin] + blank + between[last - begin :]
        if self._negation["ends"].search(between) or len(_WORD.findall(between)) > MAX_WORDS:
            return False
        for match in _BREAK.finditer(between):
            if match[0] != ",":
                return False
            clause = re.split(r"[;:\n!?]|\.(?=\s|$)", report[begin + match.end() :])[0]
            ahead = _LIST_GOES_ON.search(clause)
            item = start - begin - match.end()
            # The list ends with what follows its last "or".
            if not ahead or "," in clause[ahead.end() : max(item, 0)]:
                return False
        return True


def load(extra: Path | None = None) -> Keywords:
    """Return the built-in keywords, with those of the YAML file `extra` added.

    Raises:
        UserError: `extra` is not of the form of keywords.yaml.
    """
    with resources.as_file(resources.files("sssd_hpc.review") / "keywords.yaml") as path:
        trees = [_checked(path, read_yaml(path))]
    if extra is not None:
        trees.append(_checked(extra, read_yaml(extra)))
    merged: dict[str, dict[str, tuple[str, ...]]] = {"classes": {}, "signs": {}, "negation": {}}
    for tree in trees:
        for section, lists in tree.items():
            for name, phrases in lists.items():
                merged[section][name] = (*merged[section].get(name, ()), *phrases)
    return Keywords(**merged)


def _checked(path: Path, tree: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the tree, proven to be lists of keywords by name in known sections."""
    for section, lists in tree.items():
        if section not in ("classes", "signs", "negation") or not isinstance(lists, dict):
            raise UserError(
                f"{path}: {section!r} is no section of keywords; allowed are classes, signs and "
                f"negation, each with lists by name"
            )
        for name, phrases in lists.items():
            if section == "negation" and name not in NEGATION:
                raise UserError(f"{path}: negation has {', '.join(NEGATION)}, not {name!r}")
            good = isinstance(phrases, list) and all(
                isinstance(phrase, str) and _WORD.search(phrase) and len(phrase) <= MAX_KEYWORD
                for phrase in phrases
            )
            if not good or not isinstance(name, str):
                raise UserError(
                    f"{path}: {section}, {name!r}: give a list of keywords with letters, at most "
                    f"{MAX_KEYWORD} long; quote no, yes and numbers"
                )
    return {section: dict(lists) for section, lists in tree.items()}


def _any(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})", re.IGNORECASE)


def _phrase(phrase: str) -> str:
    """Return a pattern: words apart by spaces, hyphens or slashes, a final * for more letters."""
    parts = []
    for word in re.split(r"[\s/-]+", phrase.strip()):
        stem = word.removesuffix("*")
        parts.append(re.escape(stem) + (r"\w*" if word.endswith("*") else ""))
    # A phrase ends at a word's end, unless it ends in a sign such as a bracket.
    end = r"(?!\w)" if parts[-1][-1:].isalnum() or parts[-1].endswith("*") else ""
    return r"[\s/-]+".join(parts) + end
