"""What judging a whole synthetic PTB-XL costs: seconds and peak memory, training left out.

    python -m bench.evaluation [--records 22000] [--training 17400] [--heldout 4400] [--repeats 5]

Everything that `sssd_hpc.evaluate.inspection.inspect` computes: features of an xresnet1d50, every
measure of fidelity beside its floor, physiology, effects of labels, the audit of privacy. Records
are a few hundred simulated ones, each many times at another gain and moment: what they cost does
not depend on how they differ. Features are timed on some records and counted for all, since each
record costs the same. The bound is 300 s and 4 GB on 2 cores; `seconds` and `cpu_seconds` stand
beside each other, for a machine that is shared.
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
from sssd_hpc.ecg.simulate import place, simulate_record
from sssd_hpc.ecg.store import GAIN_PER_MV
from sssd_hpc.evaluate import physiology, privacy
from sssd_hpc.evaluate.classify import Classifier
from sssd_hpc.evaluate.comparison import Measure, Side, compare
from sssd_hpc.evaluate.inspection import MEASURES
from sssd_hpc.evaluate.xresnet1d import HEAD_WIDTH, XResNet1d

BOUND_S, BOUND_GB = 300.0, 4.0
NUM_LABELS, RATE_HZ, LENGTH = 71, 100, 1000
SIMULATED_RECORDS = 300
FEATURE_RECORDS = 512


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
        say(f"  {name}: {spent[0]:.1f} s, {peak_gb():.2f} GB")
        return result

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return the sums, longest first."""
        ordered = sorted(self.spent.items(), key=lambda item: -item[1][0])
        return {
            name: {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
            for name, (wall, cpu) in ordered
        }


def varied_side(simulated: np.ndarray, count: int, seed: int, *, features: bool = True) -> Side:
    """Return simulated records again and again, each at another gain and moment."""
    generator = np.random.default_rng(seed)
    signals = np.empty((count, 12, LENGTH), dtype=np.float32)
    for row in range(count):
        source = simulated[generator.integers(len(simulated))]
        signals[row] = generator.uniform(0.7, 1.4) * np.roll(source, generator.integers(LENGTH), 1)
    return Side(
        signals,
        (generator.random((count, NUM_LABELS)) < 0.04).astype(np.int64),
        generator.normal(size=(count, HEAD_WIDTH if features else 0)),
        RATE_HZ,
        label_names=tuple(f"label{k}" for k in range(NUM_LABELS)),
        patients=generator.integers(0, count, count),
    )


def watched(measure: Measure, spent: dict[str, float]) -> Measure:
    """Return the measure with its time taken."""

    def compute(candidate: Side, reference: Side, generator: np.random.Generator) -> float:
        begin = time.perf_counter()
        value = measure.compute(candidate, reference, generator)
        spent[measure.name] = spent.get(measure.name, 0.0) + time.perf_counter() - begin
        return value

    return replace(measure, compute=compute)


def main() -> None:
    """Measure and store the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, default=22_000)
    parser.add_argument("--training", type=int, default=17_400)
    parser.add_argument("--heldout", type=int, default=4_400)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    window = int(2.5 * RATE_HZ)
    classifier = Classifier(XResNet1d(num_outputs=NUM_LABELS), 0.0, 0.2, window)
    simulated = np.stack([simulate_record(0, place(0, k))[1] for k in range(SIMULATED_RECORDS)])
    simulated = (simulated / GAIN_PER_MV).astype(np.float32)

    watch = Stopwatch()
    forget_peak()
    synthetic = varied_side(simulated, options.records, 0)
    heldout = varied_side(simulated, options.heldout, 1)
    training = varied_side(simulated, options.training, 2, features=False)
    tried = privacy.members(len(training), 0)
    classifier.features(heldout.signals_mv[:64])
    watch("features", lambda: classifier.features(heldout.signals_mv[:FEATURE_RECORDS]))
    # What was timed counts as many times as there are records.
    all_featured = options.records + options.heldout + len(tried)
    scale = all_featured / min(FEATURE_RECORDS, options.heldout)
    watch.spent["features"] = [scale * spent for spent in watch.spent["features"]]

    by_measure: dict[str, float] = {}
    measures = [watched(measure, by_measure) for measure in MEASURES]
    found = watch("compare", lambda: compare(measures, heldout, synthetic, repeats=options.repeats))
    undefined = {name: result.reason for name, result in found.items() if result.reason}
    watch("physiology", lambda: [physiology.drawn_table(s, 0) for s in (heldout, synthetic)])
    watch("label_effects", lambda: physiology.label_effects(heldout, synthetic))
    features = np.random.default_rng(3).normal(size=(len(tried), HEAD_WIDTH))
    watch(
        "privacy",
        lambda: privacy.audit(synthetic, training, heldout, member_features=features),
    )
    parts = watch.to_json()
    record(
        "evaluation",
        {
            "records": options.records,
            "training": options.training,
            "heldout": options.heldout,
            "repeats": options.repeats,
            "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
            "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts.values()), 1),
            "peak_gb": round(peak_gb(), 2),
            "bound_s": BOUND_S,
            "bound_gb": BOUND_GB,
            "features_timed_on": FEATURE_RECORDS,
            "undefined": undefined,
            "parts": parts,
            "measures_s": {
                name: round(spent, 2)
                for name, spent in sorted(by_measure.items(), key=lambda item: -item[1])
            },
        },
    )


if __name__ == "__main__":
    main()
