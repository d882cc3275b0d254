"""What the fidelity measures cost on a whole synthetic PTB-XL: seconds and peak memory.

    python -m bench.evaluation [--records 22000] [--heldout 4400] [--repeats 5]

Records are random: a cost does not depend on what the numbers are. Features of an xresnet1d50 are
timed on some records and counted for all, each record costs the same; training it is not counted.
The bound is 300 s and 4 GB on 2 cores; `seconds` and `cpu_seconds` stand beside each other, for a
machine that is shared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.timing import forget_peak, peak_gb, record, say
from sssd_hpc.evaluate.classify import Classifier
from sssd_hpc.evaluate.comparison import Measure, Side, compare
from sssd_hpc.evaluate.features import FEATURES
from sssd_hpc.evaluate.relations import RELATIONS
from sssd_hpc.evaluate.xresnet1d import HEAD_WIDTH, XResNet1d

BOUND_S, BOUND_GB = 300.0, 4.0
NUM_LABELS, RATE_HZ, LENGTH = 71, 100, 1000
FEATURE_RECORDS = 512
MEASURES = (*FEATURES, *RELATIONS)


class Stopwatch:
    """Seconds spent under a name, on the wall and on all cores together."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what `work()` returns, and add what it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        spent = self.spent.setdefault(name, [0.0, 0.0])
        spent[0] += time.perf_counter() - wall
        spent[1] += time.process_time() - cpu
        return result

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return the sums, longest first."""
        ordered = sorted(self.spent.items(), key=lambda item: -item[1][0])
        return {
            name: {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
            for name, (wall, cpu) in ordered
        }


def random_side(count: int, seed: int) -> Side:
    """Return random walks that come back to zero, at the amplitude of an ECG."""
    generator = np.random.default_rng(seed)
    signals = generator.standard_normal((count, 12, LENGTH), dtype=np.float32)
    for begin in range(0, count, 256):
        chunk = signals[begin : begin + 256]
        for at in range(1, LENGTH):
            chunk[..., at] = 0.9 * chunk[..., at - 1] + 0.1 * chunk[..., at]
    labels = (generator.random((count, NUM_LABELS)) < 0.04).astype(np.int64)
    features = generator.normal(size=(count, HEAD_WIDTH))
    return Side(signals, labels, features, RATE_HZ, patients=generator.integers(0, count, count))


def watched(measure: Measure, watch: Stopwatch) -> Measure:
    """Return the measure with its time taken."""

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        value: float = watch(measure.name, lambda: measure.compute(candidate, reference, generator))
        return value

    return replace(measure, compute=compute)


def main() -> None:
    """Measure and store the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, default=22_000)
    parser.add_argument("--heldout", type=int, default=4_400)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    window = int(2.5 * RATE_HZ)
    classifier = Classifier(XResNet1d(num_outputs=NUM_LABELS), 0.0, 0.2, window)
    watch = Stopwatch()
    forget_peak()
    synthetic, heldout = random_side(options.records, 0), random_side(options.heldout, 1)
    timed = heldout.signals_mv[:FEATURE_RECORDS]
    watch("features", lambda: classifier.features(timed))
    # What was timed counts as many times as there are records.
    for at, spent in enumerate(watch.spent["features"]):
        watch.spent["features"][at] = spent / len(timed) * (options.records + options.heldout)
    say(f"{options.records} and {options.heldout} records, {peak_gb():.2f} GB")
    measures = [watched(measure, watch) for measure in MEASURES]
    found = watch("compare", lambda: compare(measures, heldout, synthetic, repeats=options.repeats))
    undefined = {name: result.reason for name, result in found.items() if result.reason}
    if undefined:
        raise SystemExit(f"undefined, hence not measured: {undefined}")
    parts = watch.to_json()
    whole = [parts[name] for name in ("features", "compare")]
    result = {
        "records": options.records,
        "heldout": options.heldout,
        "repeats": options.repeats,
        "seconds": round(sum(part["seconds"] for part in whole), 1),
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in whole), 1),
        "peak_gb": round(peak_gb(), 2),
        "bound_s": BOUND_S,
        "bound_gb": BOUND_GB,
        "features_timed_on": len(timed),
        "parts": parts,
    }
    record("evaluation", result)


if __name__ == "__main__":
    main()
