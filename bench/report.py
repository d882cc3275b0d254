"""Write docs/performance.md and docs/roofline.png from the results of all devices.

    python -m bench.report [--results FOLDER] [--docs FOLDER]

Every number on that page is in bench/results; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.targets import BASELINES, TARGETS, Record, Results

ROOT = Path(__file__).parents[1]
TITLES = {
    "kernels": "Kernels and Cauchy sums",
    "convolution": "Two-sided convolution",
    "block": "Pointwise parts and the whole block",
    "training_step": "Training step",
    "denoising_step": "Denoising step",
}
# The shapes of the papers' network, which come first and in detail.
CENTRE = {"H": 512, "N": 64, "L": 1000, "C": 256}
INTRODUCTION = """# Performance

Written by `python -m bench.report` from the files in `bench/results`; `make bench` measures this
machine again and writes both. A suite whose results differ from their float64 oracle by more than
the bounds of `bench/cases.py` is not reported.

Candidates of one comparison run in one process and take turns. Times are medians of *n*, with the
20 % and 80 % quantiles. On a CPU a baseline that takes over a second (a step: over 15 s) has no
warm-up, its first call counts. *x* is the speed-up over the baseline of the comparison, its first
row. Per cents are counted bytes against the copy bandwidth and counted FLOPs against the rate of a
large matrix product of the same precision, both measured at the start of the same run; the counts
are those of `ops/counts.py` and `docs/math.md`, section 9 (over 100 % of the bandwidth: the data
came from a cache). Errors are relative norms against float64, of the value and of the worst
gradient; for whole steps they are differences from the textbook network in float32.

Baselines: *textbook* is the complex64 formula under autograd, *keops textbook* the same with its
Cauchy sums by KeOps, *torch.fft* the convolution as separate operations, *public form* the
operations and permutes of the public codes (`bench/textbook.py`). *auto* is what a user gets. The
gradient of `log_dt`, a cancelling sum of the others, is timed but not compared: the textbook
itself errs by 1e-4 there.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    devices = load(options.results)
    if not devices:
        parser.error(f"{options.results} holds no results of `python -m bench`")
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "performance.md").write_text(page(devices))
    roofline(devices, options.docs / "roofline.png")
    return 0


def load(folder: Path) -> list[Results]:
    """Read the results of every device in a folder; other benchmarks' files are passed over."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [results for results in found if results.get("suites")]


def page(devices: list[Results]) -> str:
    """Return the text of docs/performance.md."""
    parts = [INTRODUCTION, "![Roofline](roofline.png)\n"]
    for results in devices:
        parts.append(f"## {name_of(results)}\n")
        parts.append(_machines(results))
        parts.append(_targets(results))
        parts += [
            _suite(name, results["suites"][name]) for name in TITLES if name in results["suites"]
        ]
    return "\n".join(parts)


def name_of(results: Results) -> str:
    """Return the name of the device that results belong to."""
    machine = next(iter(results["suites"].values()))["machine"]
    return str(machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads")


def _machines(results: Results) -> str:
    """Say where each suite ran, and what the machine could do then."""
    head = ["suite", "commit", "torch", "triton", "load", "took", "copy GB/s"]
    first = next(iter(results["suites"].values()))
    precisions = [key.partition("_")[0] for key in first["ceilings"] if key.endswith("flops_per_s")]
    rows = []
    for name, suite in results["suites"].items():
        machine, ceilings = suite["machine"], suite["ceilings"]
        rates = [f"{ceilings[f'{p}_flops_per_s'] / 1e9:,.0f}" for p in precisions]
        quick = " (quick: tiny sizes)" if suite["quick"] else ""
        rows.append(
            [
                name + quick,
                machine["commit"],
                machine["torch"],
                machine["triton"],
                machine["load"],
                f"{suite['seconds']:.0f} s",
                f"{ceilings['copy_bytes_per_s'] / 1e9:.1f}",
                *rates,
            ]
        )
    table = _table([*head, *(f"{p} GFLOP/s" for p in precisions)], rows)
    driver = first["machine"].get("driver")
    return f"Driver {driver}, CUDA {first['machine']['cuda']}.\n\n{table}" if driver else table


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        if target.device != results["device"]:
            continue
        value = target.value(results)
        sign = "at least" if target.over else "at most"
        bound = f"{sign} {target.bound:g}{target.unit}"
        if value is None:
            rows.append([target.text, bound, "", "not measured"])
        else:
            verdict = "met" if target.met(value) else "**missed**"
            rows.append([target.text, bound, f"{_digits(value)}{target.unit}", verdict])
    return "### Targets\n\n" + _table(["target", "bound", "measured", ""], rows)


def _suite(name: str, suite: dict[str, Any]) -> str:
    records = suite["records"]
    detail = [entry for entry in records if _is_central(entry)]
    rest = [entry for entry in records if not _is_central(entry)]
    text = f"### {TITLES[name]}\n\n{_detail(detail or records)}"
    if detail and rest:
        text += f"\n<details><summary>Other shapes</summary>\n\n{_sweep(rest)}\n</details>\n"
    return text


def _is_central(entry: Record) -> bool:
    return all(entry["shape"].get(key, size) == size for key, size in CENTRE.items())


def _detail(records: list[Record]) -> str:
    memory = any(entry.get("peak_gb") for entry in records)
    head = ["", "shape", "dtype", "backend", "median", "20-80 %", "n", "x"]
    head += ["peak"] if memory else []
    head += ["% copy", "% GEMM", "error", "gradients"]
    rows, last = [], ("", "", "")
    for entry in records:
        group = (entry["op"], _shape(entry), entry["dtype"])
        named = group if group != last else ("", "", "")
        last = group
        spread = ""
        if "low_s" in entry:
            spread = f"{_time(entry['low_s'])} - {_time(entry['high_s'])}"
        speedup = entry.get("speedup")
        row = [
            *named,
            entry["backend"] + ("" if entry.get("graph", True) else " (eager)"),
            _time(entry["median_s"]),
            spread,
            f"{entry['repeats']:.0f}",
            f"{_digits(speedup)}" if speedup else "",
        ]
        if memory:
            peak = entry.get("peak_gb")
            row.append(f"{peak:.2f} GB" if peak else "")
        row += [_percent(entry, "copy"), _percent(entry, "gemm")]
        row += [_error(entry.get("error")), _error(entry.get("error_gradient"))]
        rows.append(row)
    return _table(head, rows)


def _sweep(records: list[Record]) -> str:
    """Return one row a comparison: each backend's median, and its speed-up over the baseline."""
    backends = list(dict.fromkeys(entry["backend"] for entry in records))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in records:
        row = rows.setdefault((entry["op"], _shape(entry), entry["dtype"]), {})
        speedup = entry.get("speedup") or 0
        times = "" if entry["backend"] in BASELINES[:1] else f" ({_digits(speedup)}x)"
        row[entry["backend"]] = _time(entry["median_s"]) + (times if speedup else "")
    body = [[*key, *(row.get(b, "") for b in backends)] for key, row in rows.items()]
    return _table(["", "shape", "dtype", *backends], body)


def roofline(devices: list[Results], path: Path) -> None:
    """Draw attained FLOP/s against FLOPs per byte, the best of ours and the baselines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2 * len(devices)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(devices), 1, squeeze=False)[:, 0]
    for axis, results in zip(axes, devices, strict=True):
        _draw(axis, results)
    figure.savefig(path, dpi=110)


def _draw(axis: Any, results: Results) -> None:
    comparisons = _drawn(results)
    intensities = [e["flops"] / e["bytes"] for pair in comparisons for e in pair]
    ceilings = next(iter(results["suites"].values()))["ceilings"]
    low, high = min(intensities, default=1) / 3, max(intensities, default=10) * 3
    copy = ceilings["copy_bytes_per_s"]
    rates = {key.partition("_")[0]: rate for key, rate in ceilings.items() if "flops" in key}
    high = max(high, 3 * max(rates.values()) / copy)
    for number, (name, rate) in enumerate(sorted(rates.items(), key=lambda item: item[1])):
        axis.plot([low, rate / copy, high], [low * copy, rate, rate], color="0.55", lw=1)
        # Alternate sides, so that two rates that are close keep their words apart.
        place = "bottom" if number % 2 else "top"
        axis.text(high, rate, f" {name} GEMM", va=place, ha="right", color="0.35", fontsize=9)
    middle = (low * min(rates.values()) / copy) ** 0.5
    axis.text(middle, middle * copy * 1.15, "copy bandwidth", color="0.35", fontsize=9, ha="right")
    markers = "osD^vP*Xph<>"
    for number, (base, best) in enumerate(comparisons):
        color, marker = f"C{number % 10}", markers[number % len(markers)]
        points = [(e["flops"] / e["bytes"], e["flops"] / e["median_s"]) for e in (base, best)]
        axis.annotate(
            "",
            points[1],
            points[0],
            arrowprops={"arrowstyle": "->", "color": color, "lw": 1, "alpha": 0.6},
        )
        axis.plot(*points[0], marker=marker, mfc="white", mec=color, ms=8, ls="")
        shape = " ".join(f"{k}{v}" for k, v in best["shape"].items() if k in ("layers", "B"))
        text = f"{best['op']} {shape} {best['dtype']}: {best['backend']}"
        axis.plot(*points[1], marker=marker, color=color, ms=9, ls="", label=text)
    axis.set(xscale="log", yscale="log", xlim=(low, high))
    axis.set(xlabel="counted FLOPs per byte", ylabel="attained FLOP/s")
    axis.set_title(f"{name_of(results)}: hollow the baseline, filled the quickest of ours")
    axis.grid(visible=True, which="major", color="0.9")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _drawn(results: Results) -> list[tuple[Record, Record]]:
    """Return baseline and quickest of ours of each central comparison that counts FLOPs."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for name in ("kernels", "convolution", "block"):
        for entry in results["suites"].get(name, {}).get("records", []):
            quick = results["suites"][name]["quick"]
            if entry["flops"] and (quick or _is_central(entry)) and "gradients" not in entry["op"]:
                groups.setdefault((entry["op"], _shape(entry), entry["dtype"]), []).append(entry)
    pairs, seen = [], set()
    for (op, _, dtype), entries in groups.items():
        ours = [entry for entry in entries if entry["backend"] not in BASELINES]
        # One batch of each op and dtype keeps the picture readable: the first measured.
        if ours and dtype != "float64" and (op, dtype) not in seen:
            seen.add((op, dtype))
            pairs.append((entries[0], min(ours, key=lambda entry: float(entry["median_s"]))))
    return pairs


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shape(entry: Record) -> str:
    return " ".join(f"{name} {size}" for name, size in entry["shape"].items())


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{_digits(seconds * scale)} {unit}"
    raise AssertionError


def _digits(value: float) -> str:
    """Return three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(entry: Record, ceiling: str) -> str:
    value = entry.get(f"percent_of_{ceiling}")
    return f"{value:.2g}" if value and value < 10 else (f"{value:.0f}" if value else "")


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


if __name__ == "__main__":
    raise SystemExit(main())
