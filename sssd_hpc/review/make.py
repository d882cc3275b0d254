"""Make a blinded questionnaire: one HTML file to send, one key to keep.

Real and generated records are drawn by the same rule, as many of each in every class, and go
through the same preparation, so that only what the generator drew can tell them apart: not length,
resolution, offset, order or name. Source: SSSD-ECG-nle (arXiv 2407.11108), section V-B: 20 records
of AFIB, CRBBB, IMI, PVC and Other, real and synthetic each.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc import __version__
from sssd_hpc.ecg.leads import EIGHT, LEADS, take, to_twelve
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_write_bytes, sha256_bytes, sha256_file
from sssd_hpc.review.key import ASK, KINDS, OTHER, Key, KeyRecord, write_private

PAGE, KEY = "questionnaire.html", "key.json"
RECORDS_PER_CLASS = 20
MAX_SIGNAL_BYTES = 1 << 27
UV_PER_UNIT = 5
"""Resolution of the page's samples: a twentieth of a small square, and a common one of devices."""

# What an ECG device's display does: AHA/ACC/HRS 2007 allow a zero-phase high-pass up to 0.67 Hz.
PASS_HZ = (0.5, 40.0)
FILTER_ORDER = 2
PADDING_S = 3

# No vowels, no look-alikes: an id that neither reads as a word nor is misread.
ID_ALPHABET = "bcdfghjkmnpqrstvwxz2456789"
ID_LETTERS = 6

Signals = NDArray[np.int16]


@dataclass(frozen=True)
class Pick:
    """One record drawn for the questionnaire."""

    kind: str
    label: str
    row: int


def make(
    real: Store,
    synthetic: Store,
    out: Path,
    *,
    labels: Sequence[str] = ("AFIB", "CRBBB", "PVC", "IMI"),
    records_per_class: int = RECORDS_PER_CLASS,
    ask: str = "both",
    seed: int = 0,
) -> Key:
    """Write OUT/questionnaire.html and, readable by its owner alone, OUT/key.json.

    Args:
        real: store of real records.
        synthetic: store of generated ones, at the same rate.
        out: folder; one that holds another questionnaire's key is refused.
        labels: statement codes or label names asked about; class Other is added.
        records_per_class: of each kind, so a class has twice as many.
        ask: report (free text), generated (the yes/no question) or both.
        seed: of choice, order and ids; they depend on the stores too, so that a reader who knows
            the seed learns nothing.

    Raises:
        UserError: too few records of a class, different rates, or a bad argument.
    """
    _check(real, synthetic, labels, records_per_class, ask, seed)
    manifests = [sha256_file(store.path / "manifest.json") for store in (real, synthetic)]
    if manifests[0] == manifests[1]:
        raise UserError(f"{real.path} and {synthetic.path} are the same store; give two")
    rng = _generator(seed, manifests)
    stores = dict(zip(KINDS, (real, synthetic), strict=True))
    picks, other = _draw(stores, labels, records_per_class, rng)
    order = rng.permutation(len(picks))
    picks = [picks[k] for k in order]
    units = _prepared(stores, picks)
    ids = _ids(len(picks), rng)
    payload = _payload(units, ids, real.rate_hz, ask)
    key = Key(
        ask=ask,
        classes=(*labels, OTHER),
        other=other,
        records=tuple(
            KeyRecord(record_id, pick.kind, pick.label, int(stores[pick.kind].ecg_id[pick.row]))
            for record_id, pick in zip(ids, picks, strict=True)
        ),
        signals_sha256=sha256_bytes(_json(payload).encode()),
        salt=rng.bytes(16).hex(),
        source={
            "stores": {
                kind: {"name": store.path.name, "manifest_sha256": manifest}
                for (kind, store), manifest in zip(stores.items(), manifests, strict=True)
            },
            "seed": seed,
            "records_per_class": records_per_class,
            "rate_hz": real.rate_hz,
            "length": units.shape[2],
            "pass_hz": list(PASS_HZ),
            "uv_per_unit": UV_PER_UNIT,
            "sssd_hpc": __version__,
        },
    )
    page = page_html({"questionnaire": key.questionnaire, **payload})
    _write(out, page, key)
    return key


def _check(
    real: Store,
    synthetic: Store,
    labels: Sequence[str],
    records_per_class: int,
    ask: str,
    seed: int,
) -> None:
    if real.rate_hz != synthetic.rate_hz:
        raise UserError(
            f"the sampling rates differ, {real.rate_hz} Hz in {real.path.name} and "
            f"{synthetic.rate_hz} Hz in {synthetic.path.name}, which readers would see; "
            f"prepare both with the same --rate"
        )
    if not labels or len(set(labels)) != len(labels) or not all(labels):
        raise UserError(f"--labels {','.join(labels)!r}: give codes joined by commas, each once")
    if OTHER in labels:
        raise UserError(f"--labels names {OTHER}, which is always there; leave it out")
    if records_per_class < 1:
        raise UserError(f"--records-per-class is {records_per_class}; at least 1 is needed")
    if ask not in ASK:
        raise UserError(f"--ask is {ask!r}; allowed are {', '.join(ASK)}")
    if seed < 0:
        raise UserError(f"--seed is {seed}; 0 or more is allowed")
    length = min(real.length, synthetic.length)
    size = 2 * (len(labels) + 1) * records_per_class * len(LEADS) * length * 2
    if size > MAX_SIGNAL_BYTES:
        raise UserError(
            f"{2 * (len(labels) + 1) * records_per_class} records make {size >> 20} MiB of "
            f"signals, a page holds {MAX_SIGNAL_BYTES >> 20}; lower --records-per-class"
        )


def _generator(seed: int, manifests: Sequence[str]) -> np.random.Generator:
    """Return a generator that nobody can repeat who lacks either store."""
    digest = hashlib.sha256(json.dumps([seed, *manifests]).encode()).digest()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(digest))))


def _draw(
    stores: dict[str, Store],
    labels: Sequence[str],
    records_per_class: int,
    rng: np.random.Generator,
) -> tuple[list[Pick], str]:
    """Return as many records of each kind and class, one a patient, and the rule of class Other."""
    carried = {kind: _carried(store, labels) for kind, store in stores.items()}
    other = "without any of the labels asked about"
    normal = {kind: _has(store, "NORM") for kind, store in stores.items()}
    enough = all(
        np.count_nonzero(normal[kind] & (carried[kind].sum(axis=1) == 0)) >= records_per_class
        for kind in stores
    )
    if enough and "NORM" not in labels:
        other = "NORM, without any of the labels asked about"
    picks = []
    for kind, store in stores.items():
        sound = np.array([not flags for flags in store.flags])
        alone = carried[kind].sum(axis=1)
        taken: set[str] = set()
        for column, label in enumerate((*labels, OTHER)):
            if label == OTHER:
                fits = (alone == 0) & (normal[kind] if other.startswith("NORM") else True)
            else:
                fits = carried[kind][:, column] & (alone == 1)
            rows = rng.permutation(np.flatnonzero(fits & sound))
            chosen: list[int] = []
            for row in rows:
                patient = str(store.patient_id[row])
                if len(chosen) < records_per_class and patient not in taken:
                    taken.add(patient)
                    chosen.append(int(row))
            if len(chosen) < records_per_class:
                raise UserError(
                    f"{kind} {store.path.name} has {len(chosen)} usable record(s) of class "
                    f"{label} (one a patient, unflagged, with no other label asked about), "
                    f"{records_per_class} are needed; lower --records-per-class, "
                    f"or leave {label} out of --labels"
                )
            picks += [Pick(kind, label, row) for row in chosen]
    return picks, other


def _carried(store: Store, labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return (records, labels): which record carries which label."""
    return np.stack([_has(store, label) for label in labels], axis=1)


def _has(store: Store, label: str) -> NDArray[np.bool_]:
    """Return which records carry a label of the store or, if it is none, a statement code."""
    if label in store.label_names:
        column = store.label_names.index(label)
        return np.asarray(store.labels[:, column] == 1, dtype=np.bool_)
    return np.array([label in codes for codes in store.scp_codes], dtype=np.bool_)


def _prepared(stores: dict[str, Store], picks: Sequence[Pick]) -> Signals:
    """Return the signals of all picks in units of the page, (n, 12, L), L the shortest length."""
    length = min(store.length for store in stores.values())
    signals = [
        stores[pick.kind].signals_mv([pick.row], LEADS)[0, :, :length].astype(np.float64)
        for pick in picks
    ]
    return prepare(np.stack(signals), stores["real"].rate_hz)


def prepare(signals_mv: NDArray[np.floating[Any]], rate_hz: int) -> Signals:
    """Filter, centre and round signals (n, 12, L) in mV to units of the page.

    A zero-phase Butterworth band-pass of `PASS_HZ`, then the medians of the independent leads to
    zero, then int16 in steps of `UV_PER_UNIT`: steps and offsets of a source are gone, what its
    leads are to each other stays.
    """
    from scipy.signal import butter, sosfiltfilt

    sections = butter(FILTER_ORDER, PASS_HZ, btype="bandpass", fs=rate_hz, output="sos")
    # Mirrored ends: a record that ends in a QRS complex must not drift towards it.
    padding = min(PADDING_S * rate_hz, signals_mv.shape[-1] - 1)
    filtered = sosfiltfilt(sections, signals_mv, padtype="even", padlen=padding)
    # Limb leads move together: a median of each would break Einthoven's law.
    middle = np.median(take(filtered, LEADS, EIGHT), axis=-1, keepdims=True)
    filtered -= to_twelve(middle, EIGHT)
    limits = np.iinfo(np.int16)
    units = np.rint(filtered * (1000 / UV_PER_UNIT)).clip(limits.min, limits.max)
    return np.asarray(units, dtype=np.int16)


def _ids(count: int, rng: np.random.Generator) -> list[str]:
    """Return different random ids."""
    ids: dict[str, None] = {}
    while len(ids) < count:
        letters = rng.integers(0, len(ID_ALPHABET), ID_LETTERS)
        ids["".join(ID_ALPHABET[k] for k in letters)] = None
    return list(ids)


def _payload(units: Signals, ids: Sequence[str], rate_hz: int, ask: str) -> dict[str, Any]:
    """Return what the page holds beside its id: nothing here may depend on a record's kind."""
    return {
        "ask": ["report", "generated"] if ask == "both" else [ask],
        "rate_hz": rate_hz,
        "uv_per_unit": UV_PER_UNIT,
        "filter": f"{PASS_HZ[0]:g}-{PASS_HZ[1]:g} Hz",
        "leads": list(LEADS),
        "records": [
            {"id": record_id, "signals": base64.b64encode(signals.astype("<i2").tobytes()).decode()}
            for record_id, signals in zip(ids, units, strict=True)
        ],
    }


def page_html(data: dict[str, Any]) -> str:
    """Return the whole page: its policy lets it run its own script and style, and load nothing."""
    css = template("page.css")
    script = template("paper.js") + template("form.js")
    policy = (
        f"default-src 'none'; script-src '{csp_hash(script)}'; style-src '{csp_hash(css)}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "<" could end the data.
    parts = {
        "POLICY": policy,
        "STYLE": css,
        "DATA": _json(data).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    page = template("page.html")
    for name, text in parts.items():
        before, after = page.split(f"@{name}@")
        page = before + text + after
    return page


def template(name: str) -> str:
    """Return a file of this room that goes into a page."""
    return resources.files("sssd_hpc.review").joinpath(name).read_text(encoding="utf-8")


def csp_hash(text: str) -> str:
    """Return what lets a page's policy allow this very script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _write(out: Path, page: str, key: Key) -> None:
    """Write page and key; another questionnaire's key, which answers may need, is never replaced.

    The key comes first: a page without its key could be answered and never scored.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / KEY
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != key.text():
        raise UserError(
            f"{path} is the key of another questionnaire, whose answers need it; "
            f"choose another --out"
        )
    write_private(path, key.text())
    atomic_write_bytes(out / PAGE, page.encode())
