"""Small stores of both kinds, questionnaires of them, answers to these, and a browser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.review.key import Key
from sssd_hpc.review.make import KEY, make
from tests.review.browser import Page, browser, needed

RATE_HZ, LENGTH = 100, 300
CODES = ("AFIB", "PVC", "NORM")
StoreMaker = Callable[..., Store]


@pytest.fixture
def make_store(tmp_path: Path) -> StoreMaker:
    """Return a maker of stores whose records carry AFIB, PVC or NORM by turns."""

    def make_store(
        name: str,
        *,
        num_records: int = 36,
        seed: int = 0,
        length: int = LENGTH,
        rate_hz: int = RATE_HZ,
        signals: Any = None,
        **fields: Any,
    ) -> Store:
        rng = np.random.default_rng(seed)
        if signals is None:
            beats = 800 * np.exp(-(((np.arange(length) % 80) - 40) ** 2) / 8)
            signals = beats * rng.uniform(0.3, 1.5, (num_records, len(LEADS), 1))
            signals += rng.normal(0, 20, (num_records, len(LEADS), length))
        path = tmp_path / name
        path.mkdir()
        manifest = {"rate_hz": rate_hz, "label_names": ["NORM"], "source": name}
        (path / "manifest.json").write_text(json.dumps(manifest))
        codes = [{CODES[row % len(CODES)]: 100.0} for row in range(num_records)]
        parts: dict[str, Any] = {
            "path": path,
            "manifest": manifest,
            "signals": np.rint(signals).astype(np.int16),
            "labels": np.array([["NORM" in code] for code in codes], dtype=np.uint8),
            "ecg_id": np.arange(1, num_records + 1) + 7000 * (seed + 1),
            "patient_id": np.array([f"{name}-{row}" for row in range(num_records)]),
            "strat_fold": np.arange(num_records) % 10 + 1,
            "scp_codes": tuple(codes),
            "flags": ((),) * num_records,
        }
        return Store(**{**parts, **fields})

    return make_store


@pytest.fixture
def questionnaire(make_store: StoreMaker, tmp_path: Path) -> tuple[Path, Key]:
    """Return the folder and the key of a questionnaire of 12 records."""
    out = tmp_path / "review"
    key = make(
        make_store("real"),
        make_store("synthetic", seed=1),
        out,
        labels=["AFIB", "PVC"],
        records_per_class=2,
    )
    return out, key


@pytest.fixture
def answer(questionnaire: tuple[Path, Key], tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of answer files that fit the questionnaire, but for what is changed."""
    _, key = questionnaire

    def write(rater: str = "Anna", **changes: Any) -> Path:
        answers = [
            {"id": record.id, "report": "Sinus rhythm", "generated": False, "confidence": 2}
            for record in key.records
        ]
        value: dict[str, Any] = {
            "format": 1,
            "questionnaire": key.questionnaire,
            "rater": rater,
            "answers": answers,
        }
        path = tmp_path / f"answers-{len(list(tmp_path.glob('answers-*')))}.json"
        path.write_text(json.dumps({**value, **changes}))
        return path

    return write


@pytest.fixture
def key_path(questionnaire: tuple[Path, Key]) -> Path:
    """Return the path of the questionnaire's key."""
    return questionnaire[0] / KEY


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Start Chromium once for all tests."""
    with browser(needed(), tmp_path_factory.mktemp("downloads")) as page:
        yield page


@pytest.fixture
def page(_chromium: Page) -> Page:
    """Return an empty tab of the browser, as wide as a desktop's."""
    _chromium.open("about:blank")
    _chromium.events.clear()
    _chromium.seen.clear()
    _chromium.resize(1440, 900)
    return _chromium
