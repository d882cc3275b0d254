"""Does the evaluation tell the truth where it is known? Generators on simulated records.

    python -m bench.truth [--records 2000] [--seeds 1] [--work FOLDER] [--page]

`oracle` simulates anew: nothing may tell it from the real ones. `blind` is the oracle with its
labels shuffled: fidelity may not tell, what labels teach must. `copies` repeats training records:
fidelity may not tell, privacy must; in `disguised` they are shifted, scaled and noisy, which is a
fault that fidelity may see. `collapsed` gives each record the mean of its label: everything must
tell. Classifiers learn AFIB, CRBBB and 1AVB at once; as that is easy, also under noise on both
sides, where an oracle must still teach as much. Writes bench/results/truth.json and the section of
docs/evaluation.md between its marks; with --page only the section.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.scaling_page import between, table
from bench.timing import RESULTS, ROOT, machine, say
from sssd_hpc.ecg.leads import EIGHT, LEADS, take, to_twelve
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from sssd_hpc.ecg.store import GAIN_PER_MV, Store
from sssd_hpc.evaluate import tables
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.evaluate.copies import PLANTS
from sssd_hpc.evaluate.inspection import inspect
from sssd_hpc.evaluate.splits import FOLDS
from sssd_hpc.evaluate.summary import beyond_floor
from sssd_hpc.evaluate.utility import Laboratory

Results = dict[str, Any]

LABELS = ("AFIB", "CRBBB", "1AVB")
FEATURE_LABEL = "CRBBB"
NOISE_MV = 0.3
"""White noise that makes the labels hard: more than what a lead itself deviates."""
SCORES = ("set", "protocol", *LABELS, "macro ROC-AUC (95 %)")
PAGE = ROOT / "docs" / "evaluation.md"
MARK = "<!-- truth -->"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results and the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--work", type=Path, help="where sets and scores stay; default: nowhere")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "truth.json")
    options = parser.parse_args(arguments)
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, options.work or Path(folder))
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    results = json.loads(options.out.read_text())
    PAGE.write_text(between(PAGE.read_text(), MARK, section(results)))
    return 0


def measure(options: argparse.Namespace, work: Path) -> Results:
    """Score the generators."""
    real, fresh = (simulated(work, options.records, seed) for seed in (0, 1))
    recipe = Recipe(epochs=options.epochs)
    laboratory = Laboratory(recipe, tuple(range(options.seeds)), work / "cache")
    found: Results = {
        "machine": machine(),
        "records": options.records,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "generators": {},
    }
    for name, make in GENERATORS.items():
        synthetic = make(real, fresh)
        rows = tables.multilabel(real, synthetic, LABELS, laboratory, seed=0)["rows"]["all"]
        inspected = inspect(real, synthetic, FEATURE_LABEL, laboratory, seed=0).found
        fidelity = {k: row for group in inspected["fidelity"].values() for k, row in group.items()}
        known = {k: row for k, row in fidelity.items() if row["value"] is not None}
        found["generators"][name] = {
            "rows": rows,
            "measures": len(known),
            "differs": sorted(k for k, row in known.items() if beyond_floor(row)),
            "privacy": inspected["privacy"]["measures"],
        }
        say(f"  {name}: {len(found['generators'][name]['differs'])} of {len(known)} differ")
    rows = tables.multilabel(noisy(real, 2), noisy(fresh, 3), LABELS, laboratory, seed=0)["rows"]
    found["noise_mv"], found["noisy_rows"] = NOISE_MV, rows["all"]
    return found


def simulated(work: Path, records: int, seed: int) -> Store:
    """Return a simulated store, made now unless it is there."""
    root, store = work / f"simulated-{seed}", work / f"store-{seed}"
    simulate(root, num_records=records, seed=seed)
    return prepare(root, store, labels=",".join(LABELS))


def noisy(store: Store, seed: int) -> Store:
    """Return a store with white noise on the eight independent leads, the others made of them."""
    generator = np.random.default_rng(seed)
    eight = store.signals_mv(np.arange(store.num_records), EIGHT)
    eight += generator.normal(0.0, NOISE_MV, eight.shape).astype(np.float32)
    signals = take(to_twelve(eight, EIGHT), LEADS, store.lead_names)
    return replace(store, signals=np.rint(signals * GAIN_PER_MV).astype(np.int16))


def oracle(real: Store, fresh: Store) -> Store:
    """Return a fresh simulation."""
    return fresh


def blind(real: Store, fresh: Store) -> Store:
    """Return a fresh simulation whose labels say nothing."""
    return replace(fresh, labels=np.random.default_rng(0).permutation(fresh.labels))


def copying(real: Store, fresh: Store, kind: str) -> Store:
    """Return copies of training records, of a kind of `PLANTS`, each with its label."""
    generator = np.random.default_rng(0)
    # As seldom twice as can be: a record that recurs in one set is a fault of its own.
    training = real.indices(FOLDS["training"])
    rows = np.resize(generator.permutation(training), fresh.num_records)
    signals = PLANTS[kind](real.signals_mv(rows, LEADS), real.rate_hz, generator)
    return replace(
        fresh,
        signals=np.clip(np.rint(signals * GAIN_PER_MV), -32767, 32767).astype(np.int16),
        labels=real.labels[rows],
    )


def collapsed(real: Store, fresh: Store) -> Store:
    """Return the mean of the records of each combination of labels, again and again."""
    signals = np.empty(fresh.signals.shape, dtype=np.int16)
    for combination in np.unique(fresh.labels, axis=0):
        rows = np.flatnonzero((fresh.labels == combination).all(axis=1))
        signals[rows] = fresh.signals[rows].mean(axis=0).round()
    return replace(fresh, signals=signals)


GENERATORS: dict[str, Callable[[Store, Store], Store]] = {
    "oracle": oracle,
    "blind": blind,
    "copies": functools.partial(copying, kind="exact"),
    "disguised": functools.partial(copying, kind="disguised"),
    "collapsed": collapsed,
}


def section(results: Results) -> str:
    """Return the text between the marks."""
    scores = []
    for name, found in results["generators"].items():
        scores += score_rows(name, found["rows"], real=name == "oracle")
    verdicts = []
    for name, found in results["generators"].items():
        exposed = [row["title"] for row in found["privacy"].values() if row["exposed"]]
        verdicts.append(
            (
                name,
                f"{len(found['differs'])} of {found['measures']}",
                number(found["privacy"]["membership_signal"]["value"]),
                number(found["privacy"]["copies"]["value"]),
                f"{len(exposed)} of {len(found['privacy'])}",
            )
        )
    return _TEXT.format(
        records=results["records"],
        scores=table(SCORES, scores),
        noise_mv=results["noise_mv"],
        noisy=table(SCORES, score_rows("oracle", results["noisy_rows"])),
        verdicts=table(
            (
                "set",
                "measures of fidelity that differ",
                "membership, ROC-AUC",
                "share of copies",
                "measures of privacy that tell",
            ),
            verdicts,
        ),
        epochs=results["epochs"],
        threads=results["machine"]["threads"],
    ).strip()


def score_rows(name: str, rows: Results, *, real: bool = True) -> list[tuple[str, ...]]:
    """Return the table's rows of a generator; TRTR, the same for all, where `real`."""
    shown = []
    for protocol, row in rows.items():
        if protocol == "TRTR" and not real:
            continue
        metric = row["metrics"]["roc_auc"]
        interval = "" if metric["value"] is None else f"{metric['low']:.3f}-{metric['high']:.3f}"
        cells = (row["labels"].get(label, {}).get("roc_auc") for label in LABELS)
        shown.append(
            (
                "real" if protocol == "TRTR" else name,
                protocol,
                *(number(cell) for cell in cells),
                f"{number(metric['value'])} ({interval})" if interval else "n/a",
            )
        )
    return shown


def number(value: float | None) -> str:
    """Write a number, or that there is none."""
    return "n/a" if value is None else f"{value:.3f}"


_TEXT = """
{records} simulated records stand for real ones, {records} others for each generator
(`python -m bench.truth --epochs {epochs}`, {threads} threads).
ROC-AUC of classifiers of three labels at once:

{scores}

The same under white noise of {noise_mv:g} mV on both sides:

{noisy}

{verdicts}
"""


if __name__ == "__main__":
    raise SystemExit(main())
