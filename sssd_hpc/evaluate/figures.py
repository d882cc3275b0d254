"""The report's pictures: ROC curves, score histograms, spectra, amplitudes, records side by side.

Each function returns a matplotlib figure; matplotlib loads only when a picture is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from sssd_hpc.evaluate.self_test import SelfTest

SIDE_COLOURS = {"real": "#1f4e79", "synthetic": "#d1661b"}
PROTOCOL_COLOURS = {"TRTR": "#1f4e79", "TSTR": "#d1661b", "TRTS": "#4b8b3b", "TSTS": "#8a6d9e"}
LEAD_GROUPS = {
    "limb leads I, II, III": ("I", "II", "III"),
    "augmented leads aVR, aVL, aVF": ("AVR", "AVL", "AVF"),
    "right chest leads V1-V3": ("V1", "V2", "V3"),
    "left chest leads V4-V6": ("V4", "V5", "V6"),
}
ROC_POINT = ("sensitivity", "specificity")
STATUS = {
    "seen": ("#a9d4a0", ""),
    "also seen": ("#cfe2f3", ""),
    "not seen": ("#f2f2f2", "-"),
    "called better": ("#ffe08a", "better"),
    "missed": ("#e57373", "missed"),
    "forbidden": ("#b39ddb", ""),
}
"""Colour and words of a place of the self-test's matrix; where it is seen its dose is the word."""
LEGEND = {
    "seen": "declared and seen",
    "also seen": "seen, not declared",
    "not seen": "not seen, not declared",
    "called better": "not declared, called better than undamaged",
    "missed": "declared and MISSED",
    "forbidden": "seen, and MUST NOT be",
}
LARGEST_SHIFT = 300.0
MAX_RECORDS = 400
PAIRS_A_CLASS = 2
MIN_MAPPED = 10


def roc_points(
    labels: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return false and true positive rates from (0, 0) to (1, 1), ties as one step."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    true = np.cumsum(labels[order])[last_of_tie]
    false = np.cumsum(1 - labels[order])[last_of_tie]
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def roc(protocols: dict[str, Any], label: str) -> Figure:
    """Draw the ROC curve of each protocol with the point that the threshold chooses."""
    label = plain(label)
    figure = _figure(6.2, 5.4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1, label="chance")
    for name, row in protocols.items():
        auc = row["metrics"]["roc_auc"]
        if auc["value"] is None:
            continue
        colour = PROTOCOL_COLOURS[name]
        text: str | None = f"{name}: {auc['value']:.2f} ({auc['low']:.2f} to {auc['high']:.2f})"
        for scores in row["test"]["scores"]:
            points = roc_points(np.array(row["test"]["label"]), np.array(scores))
            axes.plot(*points, color=colour, linewidth=1.8, label=text)
            text = None
        sensitivity, specificity = (row["metrics"][m]["value"] for m in ROC_POINT)
        if sensitivity is not None:
            axes.plot(1 - specificity, sensitivity, "o", color=colour, markersize=7)
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        title=f"ROC curves for {label}; dots: threshold from fold 9",
        aspect="equal",
    )
    axes.legend(loc="lower right", frameon=False, title="ROC-AUC (95 % interval)")
    return figure


def convergence(table: dict[str, Any]) -> Figure:
    """Draw a table's metrics over samples seen, with intervals, and the paper's own points."""
    from matplotlib.ticker import LogLocator, NullLocator

    labels = list(table["rows"])
    papers = {int(name.split()[1]) for theirs in table["paper"].values() for name in theirs}
    reached = papers | set(table["samples"])
    figure = _figure(2.2 + 3.4 * len(labels), 6.2)
    panels = figure.subplots(2, len(labels), sharex=True, sharey=True, squeeze=False)
    for row, (metric, title) in enumerate((("g_mean", "G-mean"), ("f1", "F1"))):
        for axes, label in zip(panels[row], labels, strict=True):
            found, theirs = table["rows"][label], table["paper"][label]
            ceiling = found["TRTR"]["metrics"][metric]
            if ceiling["value"] is not None:
                colour = PROTOCOL_COLOURS["TRTR"]
                axes.axhspan(ceiling["low"], ceiling["high"], color=colour, alpha=0.12, linewidth=0)
                axes.axhline(ceiling["value"], color=colour, linewidth=1, label="TRTR")
            for protocol in ("TSTR", "TRTS"):
                colour = PROTOCOL_COLOURS[protocol]
                cells = {n: found[f"{protocol} {n}"]["metrics"][metric] for n in table["samples"]}
                known = {n: cell for n, cell in cells.items() if cell["value"] is not None}
                if known:
                    low, middle, high = (
                        np.array([cell[name] for cell in known.values()])
                        for name in ("low", "value", "high")
                    )
                    # The value is of the records, the interval of draws: it may lie outside.
                    bars = np.maximum([middle - low, high - middle], 0)
                    axes.errorbar(list(known), middle, bars, fmt="o-", color=colour, label=protocol)
                paper = {
                    int(name.split()[1]): values[metric]
                    for name, values in theirs.items()
                    if name.startswith(protocol)
                }
                if paper:
                    text = f"{protocol}, paper"
                    axes.plot(*zip(*sorted(paper.items()), strict=True), "s:", color=colour)
                    axes.lines[-1].set(markerfacecolor="none", alpha=0.7, label=text)
            axes.set(
                xscale="log", xlim=(min(reached) / 1.5, max(reached) * 1.5), ylim=(-0.03, 1.03)
            )
            if row == 0:
                axes.set_title(label)
        panels[row][0].set_ylabel(title)
    ticks = (1, 3) if max(reached) >= 100 * min(reached) else (1, 2, 5)
    for axes in panels[1]:
        axes.set_xlabel("samples seen in training")
        axes.xaxis.set_major_locator(LogLocator(subs=ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))
    # The paper has not every label: each line's name is taken from where it is drawn.
    handles = {
        text: handle
        for axes in panels.flat
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[0][-1].legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return figure


def _short_count(value: float) -> str:
    """Return a count as the paper writes it: 4k, 1.2m."""
    for size, letter in ((1e6, "m"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def score_histograms(protocols: dict[str, Any], label: str) -> Figure:
    """Draw how the classifier scores records with and without the label."""
    label = plain(label)
    figure = _figure(9.6, 3.0 * -(-len(protocols) // 2))
    panels = list(figure.subplots(-(-len(protocols) // 2), 2, sharex=True, squeeze=False).flat)
    bins = np.linspace(0, 1, 11)
    for axes in panels[len(protocols) :]:
        axes.set_visible(False)
    for axes, (name, row) in zip(panels, protocols.items(), strict=False):
        labels = np.array(row["test"]["label"])
        # Of several classifiers the first: a mean of scores is no classifier's.
        scores = np.array(next(iter(row["test"]["scores"]), []))
        axes.set(title=f"{name}: tested on {row['tested_on']}", xlabel=f"score for {label}")
        if len(scores) == 0:
            axes.text(0.5, 0.5, "not computed", ha="center", transform=axes.transAxes)
            continue
        groups = [scores[labels == 0], scores[labels == 1]]
        names = [f"not {label} ({len(groups[0])})", f"{label} ({len(groups[1])})"]
        axes.hist(groups, bins, color=["0.7", "#1f4e79"], label=names)
        if row["thresholds"] and row["thresholds"][0] is not None:
            axes.axvline(row["thresholds"][0], color="#b03030", linestyle="--", label="threshold")
        # Room above the bars for the legend.
        axes.set_ylim(top=axes.get_ylim()[1] * 1.35)
        axes.legend(framealpha=1, edgecolor="none", fontsize=8, ncols=2, loc="upper left")
        axes.set_ylabel("records")
    return figure


def spectra(sides: dict[str, NDArray[np.float32]], rate_hz: int) -> Figure:
    """Draw the median power spectrum of each lead group with its 10 to 90 % band."""
    from scipy.signal import welch

    def panel(axes: Any, leads: list[int]) -> None:
        for side, signals in sides.items():
            chosen = signals[:, leads]
            hertz, power = welch(chosen, rate_hz, nperseg=min(4 * rate_hz, chosen.shape[-1]))
            # Baseline wander alone lives below 0.5 Hz; at 100 Hz PTB-XL is filtered above 45 Hz.
            keep = (hertz >= 0.5) & (hertz <= 45)
            power = power[..., keep].reshape(-1, int(keep.sum())) + 1e-12
            low, middle, high = np.percentile(power, [10, 50, 90], axis=0)
            axes.fill_between(hertz[keep], low, high, color=SIDE_COLOURS[side], alpha=0.18)
            axes.plot(hertz[keep], middle, color=SIDE_COLOURS[side], label=side)
        axes.set(xscale="log", yscale="log", xlabel="frequency, Hz", ylabel="power, mV²/Hz")
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 40], ["0.5", "1", "2", "5", "10", "20", "40"])
        axes.minorticks_off()

    return _by_lead_group(panel)


def amplitudes(sides: dict[str, NDArray[np.float32]]) -> Figure:
    """Draw the distribution of sample values of each lead group."""
    bins = np.linspace(-2.5, 2.5, 101)

    def panel(axes: Any, leads: list[int]) -> None:
        for side, signals in sides.items():
            values = signals[:, leads].ravel()
            counts, _ = np.histogram(values, bins)
            axes.stairs(
                np.where(counts > 0, counts, np.nan) / (values.size * np.diff(bins)),
                bins,
                baseline=None,
                linewidth=1.5,
                color=SIDE_COLOURS[side],
                label=f"{side} (SD {values.std():.2f} mV)",
            )
        axes.set(yscale="log", xlabel="amplitude, mV", ylabel="density, 1/mV")

    return _by_lead_group(panel)


def calibration(protocols: dict[str, Any], label: str) -> Figure:
    """Draw the share of positives among records of like scores, five groups of equal size."""
    label = plain(label)
    figure = _figure(5.4, 4.8)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1, label="calibrated")
    for name, row in protocols.items():
        labels = np.array(row["test"]["label"])
        scores = np.array(next(iter(row["test"]["scores"]), []))
        if len(scores) == 0:
            continue
        groups = np.array_split(np.argsort(scores, kind="stable"), min(5, len(scores)))
        axes.plot(
            [scores[rows].mean() for rows in groups],
            [labels[rows].mean() for rows in groups],
            "o-",
            color=PROTOCOL_COLOURS[name],
            label=f"{name} (Brier score {np.mean((scores - labels) ** 2):.2f})",
        )
    axes.set(
        xlabel=f"mean score for {label}", ylabel=f"share with {label}", xlim=(0, 1), ylim=(0, 1)
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def distributions(
    columns: dict[str, dict[str, NDArray[np.float64]]], titles: dict[str, tuple[str, str]]
) -> Figure:
    """Draw each quantity's distribution on each side: side -> quantity -> values."""
    figure = _figure(9.6, 5.6)
    panels = figure.subplots(2, -(-len(titles) // 2)).flat
    for axes, (quantity, (title, unit)) in zip(panels, titles.items(), strict=False):
        sides = {side: values[quantity] for side, values in columns.items()}
        both = np.concatenate(list(sides.values()))
        axes.set_title(title, fontsize=9, wrap=True)
        axes.set_xlabel(unit)
        axes.set_yticks([])
        if len(both) == 0:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            continue
        # A few wild values would leave one bar of all the others.
        low, high = np.percentile(both, [1, 99])
        bins = np.linspace(low - 1e-6, high + 1e-6, 21)
        for side, values in sides.items():
            if len(values):
                weights = np.full(len(values), 1 / len(values))
                axes.hist(
                    np.clip(values, bins[0], bins[-1]),
                    bins,
                    weights=weights,
                    alpha=0.5,
                    color=SIDE_COLOURS[side],
                    label=f"{side} ({len(values)})",
                )
        axes.legend(frameon=False, fontsize=7)
    return figure


def feature_map(features: dict[str, NDArray[np.float64]], seed: int) -> Figure:
    """Draw the sides' features (n, d) in the plane, as many records of each."""
    from sklearn.manifold import TSNE

    figure = _figure(6.2, 5.4)
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    count = min(MAX_RECORDS, *map(len, features.values()))
    if count < MIN_MAPPED:
        axes.text(0.5, 0.5, f"{count} records are too few", ha="center", transform=axes.transAxes)
        return figure
    generator = np.random.default_rng(seed)
    chosen = {n: v[generator.permutation(len(v))[:count]] for n, v in features.items()}
    both = np.concatenate(list(chosen.values()))
    spread = both.std(axis=0)
    points = TSNE(
        init="pca", perplexity=min(30, count / 2), random_state=seed, n_jobs=1
    ).fit_transform((both - both.mean(axis=0)) / np.where(spread > 0, spread, 1))
    # In random order: no side lies on top of the other.
    order = generator.permutation(len(points))
    colours = np.repeat([SIDE_COLOURS[name] for name in chosen], count)
    x, y = points[order].T
    axes.scatter(x, y, s=12, c=colours[order], alpha=0.7, linewidths=0)
    for name in chosen:
        axes.scatter([], [], s=30, c=SIDE_COLOURS[name], label=f"{name} ({count})")
    axes.legend(frameon=False)
    return figure


def self_test_matrix(result: SelfTest) -> Figure:
    """Draw what each measure says of each damage, a line of its worsening with dose in each place.

    Lines are on a logarithmic scale of undamaged standard deviations, the same in every place; the
    thin line is no change.
    """
    rows, columns = len(result.measures), len(result.damages)
    figure = _figure(2.2 + 1.15 * columns, 1.7 + 0.42 * rows)
    axes = figure.subplots()
    for row, measure in enumerate(result.measures):
        for column, damage in enumerate(result.damages):
            cell = result.cell(measure, damage)
            colour, words = STATUS[cell.status]
            axes.add_patch(_tile(column, row, colour))
            shifts = np.nan_to_num(np.array(cell.shifts), posinf=1e6, neginf=-1e6)
            heights = np.sign(shifts) * np.log1p(np.abs(shifts)) / np.log1p(LARGEST_SHIFT)
            across = column + 0.06 + 0.36 * np.array([0.0, *result.doses])
            foot = row + 0.74
            axes.plot([across[0], across[-1]], [foot, foot], color="0.75", linewidth=0.6)
            axes.plot(across, foot - 0.6 * np.clip(heights, -0.3, 1), color="0.15", linewidth=1.3)
            text = words if cell.least_dose is None else _percent(cell.least_dose)
            axes.text(column + 0.72, row + 0.5, text, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xticks(np.arange(columns) + 0.5, [name.replace("_", " ") for name in result.damages])
    axes.set_yticks(np.arange(rows) + 0.5, [name.replace("_", " ") for name in result.measures])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title(
        f"What each measure sees of each damage: the dose from which on it is seen\n"
        f"(doses {', '.join(map(_percent, result.doses))}; {result.repeats} repeats of "
        f"{result.num_records} records a side)",
        fontsize=11,
    )
    used = {cell.status for cell in result.cells}
    shown = [status for status in STATUS if status in used]
    axes.legend(
        [_tile(0, 0, STATUS[status][0]) for status in shown],
        [LEGEND[status] for status in shown],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _tile(column: float, row: float, colour: str) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=2)


def sample_signals(store: Store, seed: int) -> NDArray[np.float32]:
    """Return at most `MAX_RECORDS` records (n, 12, L) in mV, chosen by the seed."""
    rows = np.arange(store.num_records)
    if len(rows) > MAX_RECORDS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_RECORDS, replace=False))
    return store.signals_mv(rows, LEADS)


def pairs(real: Store, synthetic: Store, label: str, seed: int, path: Path) -> None:
    """Draw real beside synthetic records: some that carry the label, then some that do not."""
    from sssd_hpc.ecg.plot import plot_pair

    column = real.label_names.index(label)
    generator = np.random.default_rng(seed)
    rows: tuple[list[int], list[int]] = ([], [])
    notes: list[str] = []
    for value, note in ((1, label), (0, f"not {label}")):
        found = [
            generator.permutation(np.flatnonzero(store.labels[:, column] == value))
            for store in (real, synthetic)
        ]
        count = min(PAIRS_A_CLASS, *map(len, found))
        for chosen, candidates in zip(rows, found, strict=True):
            chosen.extend(candidates[:count].tolist())
        notes.extend([note] * count)
    if not notes:
        # One side has the label everywhere, the other nowhere.
        rows, notes = ([0], [0]), [""]
    signals = [
        list(store.signals_mv(chosen, LEADS))
        for store, chosen in zip((real, synthetic), rows, strict=True)
    ]
    plot_pair(signals[0], signals[1], real.rate_hz, path, notes)


def save(figure: Figure, path: Path) -> bytes:
    """Write a figure as a picture and return its bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(path, buffer.getvalue(), durable=False)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Return text that matplotlib draws as it stands: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _by_lead_group(panel: Callable[[Any, list[int]], None]) -> Figure:
    figure = _figure(9.6, 6.4)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for place, (title, leads) in zip(axes.flat, LEAD_GROUPS.items(), strict=True):
        panel(place, [LEADS.index(lead) for lead in leads])
        place.set_title(title, fontsize=10)
        place.label_outer()
        place.legend(frameon=False, fontsize=8)
    return figure
