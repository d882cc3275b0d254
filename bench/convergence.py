"""Measure each sampler's error against its network calls where the answer is known.

    python -m bench.convergence [--page]

The denoiser is exact (`bench/mixture.py`), so every error is the sampler's. Writes
bench/results/convergence.json, docs/samplers.png and the table in docs/samplers.md; with --page
only picture and table are made again. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.mixture import THREE
from bench.scaling_page import between
from bench.timing import RESULTS, ROOT
from sssd_hpc.diffusion import (
    Denoiser,
    NoiseSchedule,
    ddim_sample,
    dpmpp_sample,
    guided,
    plms_sample,
    split_sample,
    timesteps,
)
from sssd_hpc.diffusion.denoiser import both
from sssd_hpc.diffusion.grid import adams_bashforth, intervals

PAPER = NoiseSchedule.linear()
# Levels smooth in t down to x_0, and so many that 320 steps have one length.
FINE = NoiseSchedule.linear(num_steps=1920, beta_start=1e-6, beta_end=0.01)
LEVEL = FINE.num_steps // 5 - 1
POINTS, WEIGHT = 256, 4.0
STEPS = (4, 5, 8, 10, 20, 25, 40, 50, 100, 199)
FINE_STEPS = (5, 10, 20, 40, 80, 160, 320)
TABLE_CALLS = (10, 20, 40, 100)
MARK = "<!-- measured -->"
PICTURE = ROOT / "docs" / "samplers.png"
PAGE = ROOT / "docs" / "samplers.md"
COLOURS = {
    "ddim": "#d1661b",
    "dpmpp": "#1f4e79",
    "plms": "#4b8b3b",
    "split": "#8b2f6b",
    "STSP4 as published": "#999999",
}

Walk = Callable[[Denoiser, Tensor, Tensor, NoiseSchedule, int, float], Tensor]


def unsplit(
    sampler: Callable[..., Tensor],
    denoiser: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    weight: float,
) -> Tensor:
    """Walk with ordinary guidance."""
    return sampler(guided(denoiser, weight), x_T, labels, schedule, steps=steps)


def split(
    denoiser: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    weight: float,
) -> Tensor:
    """Walk by our splitting method."""
    return split_sample(denoiser, x_T, labels, schedule, steps=steps, weight=weight)


def published(
    denoiser: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    weight: float,
) -> Tensor:
    """Walk by STSP4 as Wizadwongsa and Suwajanakorn have it, for comparison.

    Half a step of the guidance by Euler's rule, Adams-Bashforth over the whole walk for the rest,
    half a step of the guidance. Theirs are the weights for even spacing.
    At x_0 the last value stands in for one that no network gives.
    """
    walk = intervals(timesteps(schedule.num_steps, steps))
    y = x_T / math.sqrt(schedule.alpha_bar_at(walk[0][0]))
    history: list[tuple[float, Tensor]] = []

    def ask(t: int) -> tuple[Tensor, Tensor]:
        at = torch.full(y.shape[:1], t)
        known, unknown = both(denoiser, math.sqrt(schedule.alpha_bar_at(t)) * y, at, labels)
        return known, weight * (known - unknown)

    for t, after in walk:
        level, end = schedule.noise_level(t), schedule.noise_level(after)
        _, guidance = ask(t)
        y = y + 0.5 * (end - level) * guidance
        at = torch.full(y.shape[:1], t)
        e = denoiser(math.sqrt(schedule.alpha_bar_at(t)) * y, at, labels)
        history = [(level, e), *history[:3]]
        weights = adams_bashforth([node for node, _ in history], end)
        for w, (_, value) in zip(weights, history, strict=True):
            y = y + (end - level) * w * value
        if after >= 0:
            _, guidance = ask(after)
        y = y + 0.5 * (end - level) * guidance
    return y


WALKS: dict[str, Walk] = {
    "ddim": functools.partial(unsplit, ddim_sample),
    "dpmpp": functools.partial(unsplit, dpmpp_sample),
    "plms": functools.partial(unsplit, plms_sample),
    "split": split,
    "STSP4 as published": published,
}


class Cost:
    """The exact denoiser, counting rows of its batches and keeping what it was asked about."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.denoiser, self.rows = THREE.denoiser(schedule), 0
        self.asked: dict[int, Tensor] = {}

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the exact noise."""
        self.rows += len(x_t)
        # PLMS asks twice about its second level; the first answer is only Euler's.
        self.asked[int(t[0])] = x_t
        return self.denoiser(x_t, t, labels)


def measure() -> dict[str, Any]:
    """Return RMS errors over points and coordinates, by panel and sampler."""
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(POINTS, 1, 2, dtype=torch.float64, generator=generator)
    one_class = torch.ones(POINTS, 1, dtype=torch.int64)
    mixed = torch.tensor([-1, 0, 1, 1]).repeat(POINTS // 4)[:, None]
    plain = [name for name in WALKS if name != "STSP4 as published"]
    at_x_0 = {
        "paper": errors(plain, x_T, mixed, PAPER, STEPS, 0.0),
        "paper, guided": errors(list(WALKS), x_T, one_class, PAPER, STEPS, WEIGHT),
        "fine, guided": errors(list(WALKS), x_T, one_class, FINE, FINE_STEPS, WEIGHT),
    }
    inside = errors(plain, x_T, mixed, FINE, FINE_STEPS, 0.0, LEVEL)
    return {"points": POINTS, "weight": WEIGHT, **at_x_0, "fine, at a level": inside}


def errors(
    names: list[str],
    x_T: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    steps: tuple[int, ...],
    weight: float,
    t: int = -1,
) -> dict[str, list[dict[str, float]]]:
    """Return for each sampler its error at step t, and the rows that it asked of the network."""
    exact = THREE.solution(x_T, labels, schedule, weight, t)
    found: dict[str, list[dict[str, float]]] = {}
    for name in names:
        found[name] = []
        for number in steps:
            cost = Cost(schedule)
            # One call more than levels.
            calls = number + (name == "plms")
            x_0 = WALKS[name](cost, x_T, labels, schedule, calls, weight)
            error = (x_0 if t < 0 else cost.asked[t]) - exact
            found[name].append(
                {
                    "steps": number,
                    "calls_a_record": cost.rows / len(x_T),
                    "error": error.square().mean().sqrt().item(),
                }
            )
    return found


def order(points: list[dict[str, float]]) -> float:
    """Return the order of convergence between the two finest walks."""
    coarse, fine = points[-2:]
    return math.log(coarse["error"] / fine["error"]) / math.log(fine["steps"] / coarse["steps"])


def table(results: dict[str, Any]) -> str:
    """Return the measured table as Markdown."""
    inside, guided_fine = results["fine, at a level"], results["fine, guided"]
    heads = [f"{calls} calls" for calls in TABLE_CALLS]
    lines = [
        "| sampler | order | order, guided | " + " | ".join(heads) + " | "
        "guided, 40 calls | guided, 80 calls |",
        "|---" * (5 + len(heads)) + "|",
    ]
    for name in WALKS:
        orders = [
            f"{order(inside[name]):.2f}" if name in inside else "",
            f"{order(guided_fine[name]):.2f}",
        ]
        plain = [at_cost(results["paper"].get(name, []), calls) for calls in TABLE_CALLS]
        with_guidance = [at_cost(results["paper, guided"][name], calls) for calls in (40, 80)]
        lines.append("| " + " | ".join([name, *orders, *plain, *with_guidance]) + " |")
    return "\n".join(lines)


def at_cost(points: list[dict[str, float]], calls: int) -> str:
    """Return the error of the walk that comes nearest to a cost, at most a tenth off."""
    near = min(points, key=lambda point: abs(point["calls_a_record"] - calls), default=None)
    if near is None or abs(near["calls_a_record"] - calls) > 0.1 * calls:
        return ""
    return f"{near['error']:.1e}"


def draw(results: dict[str, Any]) -> None:
    """Draw docs/samplers.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "paper": "Paper's schedule, x_0",
        "paper, guided": f"Paper's schedule, guidance {results['weight']:g}, x_0",
        "fine, at a level": "Order: 1,920 levels, at an inner level",
        "fine, guided": f"Order: 1,920 levels, guidance {results['weight']:g}, x_0",
    }
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (panel, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name, points in results[panel].items():
            calls = [point["calls_a_record"] for point in points]
            axes.loglog(
                calls,
                [point["error"] for point in points],
                marker="o",
                markersize=4,
                linestyle="--" if name.startswith("STSP4") else "-",
                color=COLOURS[name],
                label=name,
            )
        low, high = axes.get_xlim()
        bottom, top = axes.get_ylim()
        for power in (1, 2):
            begin = 0.6 * top
            axes.plot([low, high], [begin, begin * (low / high) ** power], ":", color="0.6", lw=1)
            reach = min(high, low * (begin / bottom) ** (1 / power)) * 0.9
            place = {"ha": "right", "va": "bottom", "color": "0.4", "size": 8}
            axes.text(reach, 1.1 * begin * (low / reach) ** power, f"order {power}", **place)
        axes.set(xlim=(low, high), ylim=(bottom, top), title=title)
        axes.set_xlabel("network calls a record (a doubled batch counts twice)")
        axes.set_ylabel("RMS error")
        axes.grid(which="major", color="0.9")
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(PICTURE, dpi=85)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, the picture and the table."""
    parser = argparse.ArgumentParser("python -m bench.convergence", description=__doc__)
    parser.add_argument("--page", action="store_true", help="only picture and table")
    options = parser.parse_args(arguments)
    path = RESULTS / "convergence.json"
    if not options.page:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    results = json.loads(path.read_text())
    draw(results)
    PAGE.write_text(between(PAGE.read_text(), MARK, table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
