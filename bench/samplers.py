"""Which sampler stands in for the paper's 200 steps: what each set is worth to a classifier.

    python -m bench.samplers --data STORE --run RUN --student RUN8 --work FOLDER [--page]

Draws one set of each sampler and seed from a trained run, times the drawing at equal batch, and
scores every set by TSTR and TRTS with a classifier of the same seed, TRTR beside them; signals are
held against the real ones by amplitude and by the share of noise. Sets and scores stay in FOLDER,
so that a command that was stopped goes on. Writes bench/results/samplers.json and the section of
docs/samplers.md between its marks; with --page only the section.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import welch

from bench.scaling_page import between, table
from bench.timing import RESULTS, ROOT, machine, say
from sssd_hpc.ecg.leads import EIGHT
from sssd_hpc.ecg.store import Store
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.evaluate.protocols import choose_label, open_store_or_root
from sssd_hpc.evaluate.splits import FOLDS, split
from sssd_hpc.evaluate.utility import Arm, Cell, Laboratory, binary_rows
from sssd_hpc.generate import sampling
from sssd_hpc.model.draw import draw_signals

Results = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    "ddpm, 200": {"sampler": "ddpm"},
    "ddim, 50": {"sampler": "ddim", "steps": 50},
    "dpmpp, 20": {"sampler": "dpmpp", "steps": 20},
    "dpmpp, 20, eta 1": {"sampler": "dpmpp", "steps": 20, "eta": 1.0},
    "dpmpp, 10": {"sampler": "dpmpp", "steps": 10},
    "dpmpp, 10, eta 1": {"sampler": "dpmpp", "steps": 10, "eta": 1.0},
    "distilled, 8": {},
}
BASELINE = "ddpm, 200"
"""The paper's sampler; the others are measured by the spread of its seeds."""
SCORES = {
    "TSTR": ("synthetic", "real"),
    "TRTS": ("real", "synthetic"),
}
METRICS = {"roc_auc": "ROC-AUC", "g_mean": "G-mean", "f1": "F1"}
NOISE_HZ = 25.0
PAGE = ROOT / "docs" / "samplers.md"
MARK = "<!-- sets -->"


def main(arguments: list[str] | None = None) -> int:
    """Draw, score, write the results and the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="store of the real records")
    parser.add_argument("--run", type=Path, help="trained run of 200 diffusion steps")
    parser.add_argument("--student", type=Path, help="run distilled from it to 8 steps")
    parser.add_argument("--work", type=Path, help="folder of the sets and scores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "samplers.json")
    options = parser.parse_args(arguments)
    if not options.page:
        found = measure(options)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    results = json.loads(options.out.read_text())
    PAGE.write_text(between(PAGE.read_text(), MARK, section(results)))
    return 0


def measure(options: argparse.Namespace) -> Results:
    """Draw what is missing and score every set."""
    real = Store.open(options.data)
    label, _ = choose_label(real, None)
    options.work.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    found: Results = {
        "machine": machine(),
        "label": label,
        "epochs": options.epochs,
        "seeds": list(seeds),
        "test_records": len(real.indices(FOLDS["test"])),
        "draw_s": draw_s(real, options),
        "sets": [],
    }
    sides = {part: split(real, [label], part) for part in FOLDS}
    arm = Arm("real", sides["training"], sides["validation"])
    for seed in seeds:
        laboratory = Laboratory(Recipe(epochs=options.epochs), (seed,), options.work / "cache")
        stores = {}
        for name in METHODS:
            stores[name] = drawn(name, real, seed, options)
        cells = [Cell("TRTR", arm, "real", sides["test"])]
        for name, store in stores.items():
            parts = {part: split(store, [label], part) for part in FOLDS}
            taught = Arm(name, parts["training"], parts["validation"])
            cells.append(Cell(f"{name}: TSTR", taught, "real", sides["test"]))
            cells.append(Cell(f"{name}: TRTS", arm, name, parts["test"]))
        rows = binary_rows(cells, laboratory, seed=seed)
        scores = {
            name: {metric: row["metrics"][metric]["value"] for metric in METRICS}
            for name, row in rows.items()
        }
        found["sets"].append({"seed": seed, "method": "real", "TRTR": scores["TRTR"]})
        for name, store in stores.items():
            found["sets"].append(
                {
                    "seed": seed,
                    "method": name,
                    **{protocol: scores[f"{name}: {protocol}"] for protocol in SCORES},
                    **shape(store),
                }
            )
    found["real"] = shape(real)
    return found


def drawn(name: str, real: Store, seed: int, options: argparse.Namespace) -> Store:
    """Return the set of a sampler and a seed, drawn now unless it is there."""
    out = options.work / f"{name.replace(', ', '-').replace(' ', '')}-{seed}"
    began = time.monotonic()
    count = sampling.sample(source(name, options), real, out, seed=seed, **METHODS[name])
    if count:
        say(f"  {out.name}: {count} records in {time.monotonic() - began:.0f} s")
    return open_store_or_root(out, options.work / "cache", real)


def source(name: str, options: argparse.Namespace) -> Path:
    """Return the run that a sampler draws from."""
    run: Path = options.student if name.startswith("distilled") else options.run
    return run


def draw_s(real: Store, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of one batch of 16 by each sampler: medians of rounds through them all."""
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(3):
        for name, method in METHODS.items():
            plan = sampling.plan(source(name, options), real, **method)
            sampler = plan.sampler()
            labels = real.labels_of(range(16))
            began = time.perf_counter()
            draw_signals(sampler, np.arange(16), labels, seed=0, batch_size=16)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def shape(store: Store) -> dict[str, float]:
    """Return the standard deviation of the signals in uV, and that of what lies above 25 Hz."""
    signals: NDArray[np.float32] = 1000 * store.signals_mv(range(store.num_records), EIGHT)
    hertz, power = welch(signals, store.rate_hz, nperseg=min(256, store.length))
    noise = power[..., hertz >= NOISE_HZ].sum(-1) * (hertz[1] - hertz[0])
    return {"sd_uv": float(signals.std()), "noise_uv": float(np.sqrt(noise.mean()))}


def spread(values: list[float]) -> str:
    """Write a mean with the least and the greatest of the seeds."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def section(results: Results) -> str:
    """Return the text between the marks."""
    rows = []
    trtr = [row["TRTR"] for row in results["sets"] if row["method"] == "real"]
    shapes = (f"{results['real'][name]:.0f}" for name in ("sd_uv", "noise_uv"))
    rows.append(
        ("real records", "", *(spread([one[m] for one in trtr]) for m in METRICS), "", "", *shapes)
    )
    base = results["draw_s"][BASELINE]
    for name in METHODS:
        sets = [row for row in results["sets"] if row["method"] == name]
        cells = [
            spread([row[protocol][metric] for row in sets])
            for protocol in SCORES
            for metric in (METRICS if protocol == "TSTR" else ("roc_auc", "g_mean"))
        ]
        rows.append(
            (
                name,
                f"{base / results['draw_s'][name]:.1f}x",
                *cells,
                f"{statistics.mean(row['sd_uv'] for row in sets):.0f}",
                f"{statistics.mean(row['noise_uv'] for row in sets):.0f}",
            )
        )
    heads = [f"TSTR {title}" for title in METRICS.values()]
    text = table(
        (
            "sampler, steps",
            "faster",
            *heads,
            "TRTS ROC-AUC",
            "TRTS G-mean",
            "SD, uV",
            "above 25 Hz, uV",
        ),
        rows,
    )
    return _TEXT.format(
        label=results["label"],
        tests=results["test_records"],
        seeds=len(results["seeds"]),
        table=text,
    ).strip()


_TEXT = """
The demo's network, all records of the demo, label {label}, {tests} test records: means over {seeds}
seeds (of drawing and of classifiers), least and greatest in brackets; in the first line TRTR
(`python -m bench.samplers`).

{table}
"""


if __name__ == "__main__":
    raise SystemExit(main())
