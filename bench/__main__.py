"""Run benchmarks and keep their results.

    python -m bench [SUITE ...] [--device cpu|cuda] [--quick] [--base GIT_REF] [--out FILE]

A suite checks every number against its oracle before anything is timed; where one is wrong the
suite writes nothing and the exit code is 1. Results go to bench/results/<device>.json, suite by
suite, and `python -m bench.report` makes docs/performance.md of them. With --quick sizes are tiny
and nothing is kept unless --out says where. --base runs the same suites on another version, too,
and prints the ratios.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sssd_hpc
from bench import ceilings, timing
from bench.cases import Record, Refusal, run
from bench.timing import Effort, say

Suite = Callable[[str, bool, dict[str, float]], list[Record]]
# Seconds, and least and most turns, of one comparison.
EFFORTS = {"cpu": Effort(2.0, 2, 7), "cuda": Effort(0.5, 10, 30)}
QUICK = Effort(0.0, 2, 2)


def kernels(device: str, quick: bool, limits: dict[str, float]) -> list[Record]:
    """Run suite `kernels`."""
    from bench.kernels import comparisons

    return run(comparisons(device, quick), device, _effort(device, quick), limits)


def convolution(device: str, quick: bool, limits: dict[str, float]) -> list[Record]:
    """Run suite `convolution`."""
    from bench.convolution import comparisons

    return run(comparisons(device, quick), device, _effort(device, quick), limits)


def block(device: str, quick: bool, limits: dict[str, float]) -> list[Record]:
    """Run suite `block`."""
    from bench.block import comparisons

    return run(comparisons(device, quick), device, _effort(device, quick), limits)


def training_step(device: str, quick: bool, limits: dict[str, float]) -> list[Record]:
    """Run suite `training_step`."""
    from bench import model

    return model.training_step(device, quick, limits)


def denoising_step(device: str, quick: bool, limits: dict[str, float]) -> list[Record]:
    """Run suite `denoising_step`."""
    from bench import model

    return model.denoising_step(device, quick, limits)


SUITES: dict[str, Suite] = {
    suite.__name__: suite for suite in (kernels, convolution, block, training_step, denoising_step)
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two turns")
    parser.add_argument("--base", metavar="GIT_REF", help="version to compare with")
    parser.add_argument("--out", type=Path, help="file of results")
    options = parser.parse_args(arguments)
    suites = options.suites or list(SUITES)
    if unknown := [name for name in suites if name not in SUITES]:
        parser.error(f"there is no suite {unknown[0]!r}; use {', '.join(SUITES)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.base:
        from bench.compare import compare

        return compare(options.base, suites, device, options.quick)
    beside = Path(sssd_hpc.__file__).resolve().parents[1]
    if beside != timing.ROOT.resolve():
        parser.error(
            f"sssd_hpc comes from {beside}; run this in the root of the version to measure"
        )
    out = options.out
    if out is None and not options.quick:
        out = timing.RESULTS / f"{timing.device_slug(device)}.json"
    return measure(suites, device, options.quick, out)


def measure(suites: list[str], device: str, quick: bool, out: Path | None) -> int:
    """Run suites one after another; keep those that pass. Return 1 if one did not."""
    failed = 0
    begin = time.perf_counter()
    for number, name in enumerate(suites, 1):
        say(f"{name} ({number}/{len(suites)}), after {time.perf_counter() - begin:.0f} s")
        suite_begin = time.perf_counter()
        torch.manual_seed(0)
        try:
            limits = ceilings.measured(device, quick)
            records = SUITES[name](device, quick, limits)
        except Refusal as refusal:
            say(f"refused: {refusal}")
            if out is not None:
                keep(out, device, name, None)
            failed = 1
            continue
        except ImportError as error:
            say(f"left out: {error}")
            failed = 1
            continue
        result = {
            "machine": timing.machine(device),
            "quick": quick,
            "seconds": round(time.perf_counter() - suite_begin, 1),
            "ceilings": limits,
            "records": records,
        }
        if out is not None:
            keep(out, device, name, result)
    say(f"{time.perf_counter() - begin:.0f} s in all" + (f", kept in {out}" if out else ""))
    return failed


def keep(out: Path, device: str, name: str, result: dict[str, Any] | None) -> None:
    """Put a suite's result into a file of results, or take an older one out; other suites stay."""
    whole: dict[str, Any] = {"device": device, "suites": {}}
    if out.exists():
        whole = json.loads(out.read_text())
    elif result is None:
        return
    if result is None:
        whole["suites"].pop(name, None)
    else:
        whole["suites"][name] = _rounded(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(out)


@functools.singledispatch
def _rounded(value: Any) -> Any:
    """Keep five digits of every number: more would be noise."""
    return value


@_rounded.register
def _(value: float) -> float:
    return float(f"{value:.5g}")


@_rounded.register
def _(value: dict) -> dict[str, Any]:  # type: ignore[type-arg]
    return {key: _rounded(item) for key, item in value.items()}


@_rounded.register
def _(value: list) -> list[Any]:  # type: ignore[type-arg]
    return [_rounded(item) for item in value]


def _effort(device: str, quick: bool) -> Effort:
    return QUICK if quick else EFFORTS[device]


if __name__ == "__main__":
    sys.exit(main())
