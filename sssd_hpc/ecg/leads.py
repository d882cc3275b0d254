"""Lead names, and the arithmetic between 8 and 12 leads.

Leads are found by name, never by position: the public codes disagree about positions.
Six limb leads hold two independent ones (Einthoven, Goldberger), so 8 leads determine 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
"""The 12 leads in PTB-XL's order, which is the order of every file and store written here."""

Scalar = TypeVar("Scalar", bound=np.generic)
Float = TypeVar("Float", bound=np.floating)

CHEST = LEADS[6:]

EIGHT = ("I", "AVF", *CHEST)
"""The 8 independent leads in the order of SSSD-ECG-nle; what models use by default."""

SSSD_ECG_EIGHT = ("I", *CHEST, "AVF")
"""The same leads in SSSD-ECG's order."""

SSSD_ECG_TWELVE = ("I", "II", *CHEST, "III", "AVR", "AVL", "AVF")
"""The order of SSSD-ECG's 12-lead arrays."""


def canonical(name: str) -> str:
    """Return a lead name as spelled in `LEADS`, whatever its case ("aVR" is "AVR")."""
    return name.strip().upper()


def positions(have: Sequence[str], want: Sequence[str]) -> list[int]:
    """Return where each lead of `want` stands in `have`.

    Raises:
        ValueError: a wanted lead is missing, or `have` names it twice.
    """
    names = [canonical(name) for name in have]
    wanted = [canonical(name) for name in want]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(f"missing lead(s) {', '.join(missing)}")
    twice = [name for name in dict.fromkeys(wanted) if names.count(name) > 1]
    if twice:
        raise ValueError(f"lead(s) {', '.join(twice)} named twice")
    return [names.index(name) for name in wanted]


def take(x: NDArray[Scalar], have: Sequence[str], want: Sequence[str]) -> NDArray[Scalar]:
    """Return the leads `want` of `x` (..., len(have), L), in that order.

    Raises:
        ValueError: as `positions`, or `x` does not have `len(have)` leads.
    """
    if x.ndim < 2 or x.shape[-2] != len(have):
        raise ValueError(f"an array of shape {x.shape} does not hold the {len(have)} leads named")
    return x[..., positions(have, want), :]


def to_twelve(x: NDArray[Float], leads: Sequence[str]) -> NDArray[Float]:
    """Return all 12 leads (..., 12, L) in `LEADS` order from 8 or 12 leads (..., len(leads), L).

    From I and AVF: II = I/2 + AVF, III = AVF - I/2, AVR = -3/4 I - AVF/2, AVL = 3/4 I - AVF/2.
    Twelve given leads are reordered, not recomputed.

    Raises:
        ValueError: `leads` is neither the 12 nor the 8 leads of `EIGHT`, in any order.
    """
    names = [canonical(name) for name in leads]
    if len(names) == len(LEADS):
        return take(x, names, LEADS)
    if len(names) != len(EIGHT):
        raise ValueError(f"12 leads need 8 or 12 leads to start from, not {len(names)}: {names}")
    eight = take(x, names, EIGHT)
    one, foot = eight[..., 0, :], eight[..., 1, :]
    half, quarters = one * 0.5, one * 0.75
    limbs = [one, foot + half, foot - half, -quarters - foot * 0.5, quarters - foot * 0.5, foot]
    return np.concatenate([np.stack(limbs, axis=-2), eight[..., 2:, :]], axis=-2, dtype=x.dtype)
