"""One comparison: what is computed, by whom, how exactly and how fast.

A result is reported only if it is right: every candidate's first outcome is compared with a float64
oracle, and an error above its bound ends the suite (`Refusal`). Baselines are not ours and have no
bound; their errors are reported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench.timing import Effort, graphed, interleave, quantiles, release, say
from sssd_hpc.errors import UserError
from sssd_hpc.ops.counts import Cost

# Relative norms; of gradients three times as much.
BOUNDS = {
    "kernel": {"float32": 1e-5, "float64": 1e-12},
    "convolution": {
        "float32": 1e-6,
        "tf32": 3e-3,
        "bfloat16": 2e-2,
        "float64": 1e-12,
    },
    "block": {"float32": 1e-5, "tf32": 3e-3, "bfloat16": 2e-2},
    # A network of 36 blocks against the textbook network in float32, not against float64.
    "model": {"float32": 1e-4, "tf32": 3e-2, "bfloat16": 1e-1},
}
GRADIENTS = 3
# A baseline this slow has no warm-up: the call that is checked is timed as well.
SLOW_S = 1.0

Outcome: TypeAlias = tuple[Tensor, ...]
Record: TypeAlias = dict[str, Any]


class Refusal(Exception):  # noqa: N818 - not a fault of the bench
    """A backend computes something else than it should: its speed is of no interest."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute; `work` returns the value, then gradients if any."""

    backend: str
    work: Callable[[], Outcome]
    bound: float | None = None
    """Largest relative error of the value, None for a baseline."""
    cost: Cost | None = None
    """Its own FLOPs and bytes where they differ from the comparison's."""
    precision: str = ""
    """What multiplies, where that is not the dtype: tf32, bf16."""


@dataclass
class Comparison:
    """Candidates for the same task; the first is the baseline."""

    op: str
    shape: dict[str, int]
    dtype: str
    cost: Cost
    oracle: Callable[[], Outcome]
    candidates: list[Candidate]
    pick: Callable[[Outcome], Outcome] = field(default=lambda outcome: outcome)
    """Takes from an outcome what the oracle has computed."""
    num_values: int = 1
    """How many values an outcome begins with; gradients follow."""


def run(
    comparisons: Iterator[Comparison], device: str, effort: Effort, ceilings: dict[str, float]
) -> list[Record]:
    """Check and time comparisons one after another.

    Raises:
        Refusal: a candidate's error is above its bound.
    """
    records = []
    for comparison in comparisons:
        records += compare(comparison, device, effort, ceilings)
        release(device)
    return records


def compare(
    comparison: Comparison, device: str, effort: Effort, ceilings: dict[str, float]
) -> list[Record]:
    """Check and time the candidates of one comparison, in turns."""
    truth = comparison.oracle()
    able, errors, works, first_s = [], [], [], 0.0
    for number, candidate in enumerate(comparison.candidates):
        begin = time.perf_counter()
        try:
            whole = candidate.work()
        except (torch.OutOfMemoryError, UserError) as error:
            reason = str(error).partition("\n")[0]
            say(f"  {comparison.op} {comparison.shape} by {candidate.backend}: {reason}")
            release(device)
            continue
        if number == 0 and device == "cpu":
            first_s = time.perf_counter() - begin
        errors.append(check(comparison, candidate, comparison.pick(whole), truth))
        del whole
        able.append(candidate)
        works.append(graphed(candidate.work) if device == "cuda" else candidate.work)
    del truth
    times = interleave(works, device, effort, first_s if first_s > SLOW_S else 0.0)
    records = [
        describe(comparison, candidate, mine, error, ceilings)
        for candidate, mine, error in zip(able, times, errors, strict=True)
    ]
    has_base = able[:1] == comparison.candidates[:1]
    cells = []
    for entry, candidate, work in zip(records, able, works, strict=True):
        if device == "cuda":
            entry["graph"] = work is not candidate.work
        base = records[0]["median_s"]
        entry["speedup"] = base / entry["median_s"] if has_base else None
        cells.append(f"{entry['backend']} {entry['median_s'] * 1e3:.3g} ms")
    if records:
        say(f"  {label(records[0])}: {', '.join(cells)}")
    return records


def check(
    comparison: Comparison, candidate: Candidate, outcome: Outcome, truth: Outcome
) -> tuple[float, float | None]:
    """Return the relative errors of the value and of the worst gradient.

    Raises:
        Refusal: one is above its bound or not a number.
    """
    assert len(outcome) == len(truth)
    errors = [relative_error(mine, true) for mine, true in zip(outcome, truth, strict=True)]
    count = comparison.num_values
    value = max(errors[:count], key=_nan_last)
    worst = max(errors[count:], key=_nan_last) if len(errors) > count else None
    if candidate.bound is not None:
        for what, error, bound in (
            ("value", value, candidate.bound),
            ("gradient", worst, GRADIENTS * candidate.bound),
        ):
            if error is not None and not error <= bound:
                raise Refusal(
                    f"{comparison.op} {comparison.shape} {comparison.dtype} by {candidate.backend}:"
                    f" relative error of the {what} is {error:.2e}, the bound is {bound:.0e}"
                )
    return value, worst


def describe(
    comparison: Comparison,
    candidate: Candidate,
    times: Sequence[float],
    error: tuple[float, float | None],
    ceilings: dict[str, float],
) -> Record:
    """Return the record of one candidate: times, counts, shares of the ceilings, errors."""
    cost = candidate.cost or comparison.cost
    precision = candidate.precision or {
        "float32": "fp32",
        "float64": "fp64",
        "bfloat16": "bf16",
    }.get(comparison.dtype, comparison.dtype)
    spread = quantiles(times)
    seconds = spread["median_s"]
    peak = ceilings.get(f"{precision}_flops_per_s", ceilings["fp32_flops_per_s"])
    return {
        "op": comparison.op,
        "shape": comparison.shape,
        "dtype": comparison.dtype,
        "backend": candidate.backend,
        "precision": precision,
        **spread,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "percent_of_copy": 100 * cost.bytes / seconds / ceilings["copy_bytes_per_s"],
        "percent_of_gemm": 100 * cost.flops / seconds / peak,
        "error": error[0],
        "error_gradient": error[1],
        "bound": candidate.bound,
    }


def relative_error(mine: Tensor, true: Tensor) -> float:
    """Return ||mine - true|| / ||true|| in double precision."""
    wide = torch.complex128 if true.is_complex() else torch.float64
    mine, true = mine.detach().to(wide), true.detach().to(wide)
    assert mine.shape == true.shape, (mine.shape, true.shape)
    return float((mine - true).norm() / true.norm())


def label(entry: Record) -> str:
    """Return a record's op, shape and dtype in short."""
    shape = " ".join(f"{name}{size}" for name, size in entry["shape"].items())
    return f"{entry['op']} {shape} {entry['dtype']}"


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error
