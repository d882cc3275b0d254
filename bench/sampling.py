"""How many records a second the networks draw, and what a data set costs on 1, 8 and 64 GPUs.

    python -m bench.sampling [--quick] [--page]

Times one call of the denoiser by batch, and drawing at 20 steps from noise to millivolts; a record
at K steps takes K calls. Weights are random: they change no time. GPUs that are not here are
predicted by `bench/cluster.py` from counts, and the writer is that of bench/results/prepare.json.
Writes bench/results/sampling.json and the section of docs/samplers.md between its marks; with
--page only the section. Two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cluster
from bench.assumed import DEVICES
from bench.model import NUM_LABELS, NUM_LEADS
from bench.scaling import presets
from bench.scaling_page import between, table
from bench.timing import RESULTS, ROOT, machine, say
from sssd_hpc.diffusion import Denoiser, NoiseSchedule, captured, from_velocity
from sssd_hpc.diffusion.denoiser import in_bfloat16
from sssd_hpc.diffusion.method import choose
from sssd_hpc.ecg.leads import EIGHT
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.draw import Sampler, draw_signals
from sssd_hpc.model.export import export_path, load_export

Results = dict[str, Any]

NETWORKS = ("sssd_ecg", "tiny")
LENGTH = 1000
BATCHES = {"cpu": (1, 4, 16, 32), "cuda": (1, 4, 16, 64, 256, 512)}
METHODS = {"ddpm": 200, "ddim": 50, "dpmpp": 20, "distilled": 8}
STEPS = 20
ROUNDED = 16
"""Records that bfloat16 is tried on."""
SETS = {"one copy of PTB-XL": 21_799, "a million": 1_000_000}
GPUS = (1, 8, 64)
ASSUMED = "H100 tf32"
"""The GPU whose cost is predicted, and the batch that it is predicted at."""
ASSUMED_BATCH = 256
PAGE = ROOT / "docs" / "samplers.md"
MARK = "<!-- speed -->"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results and the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the demo's network alone, small")
    parser.add_argument("--run", type=Path, help="a trained run: measure what bf16 does to it")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.json")
    options = parser.parse_args(arguments)
    if not options.page:
        names, batches = (NETWORKS, None) if not options.quick else (NETWORKS[1:], (1, 2))
        results = measure(names, batches)
        if options.run:
            results["bfloat16"] = rounding(options.run)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if not options.quick:
        PAGE.write_text(page(PAGE.read_text(), json.loads(options.out.read_text())))
    return 0


def page(text: str, results: Results) -> str:
    """Return the page with its section made again."""
    return between(text, MARK, section(results))


def measure(names: tuple[str, ...], batches: tuple[int, ...] | None) -> Results:
    """Time the networks on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    found: Results = {"machine": machine(), "device": gpu or device, "networks": {}}
    for name in names:
        size = presets()[name]
        network = build(name, device)
        calls: list[Results] = []
        # The largest first: what it frees serves the others, as it does in a long run.
        for batch in sorted(batches or BATCHES[device], reverse=True):
            times = call_s(network, batch, device)
            calls.append({"batch": batch, "call_s": statistics.median(times), "times_s": times})
            say(f"  {name}, batch {batch}: {calls[-1]['call_s'] * 1e3:.0f} ms a call")
        calls.reverse()
        best: int = min(calls, key=lambda row: float(row["call_s"] / row["batch"]))["batch"]
        at = min(best, 4) if device == "cpu" else best
        seconds = draw_s(network, at, device)
        say(f"  {name}: {seconds / at:.2f} s a record at {STEPS} steps, batch {at}")
        found["networks"][name] = {
            **{key: size[key] for key in ("blocks", "channels", "states")},
            "calls": calls,
            "drawn": {"steps": STEPS, "batch": at, "seconds": seconds, "record_s": seconds / at},
        }
    return found


def rounding(run: Path) -> Results:
    """Return how far bfloat16 moves records of a trained run, in uV, from the same noise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, metadata = load_export(export_path(run))
    schedule = NoiseSchedule.linear(**metadata["diffusion"])
    network: Denoiser = model.to(device).for_sampling(metadata["length"], schedule.num_steps)
    labels = np.zeros((ROUNDED, len(metadata["labels"])), dtype=np.int64)
    drawn = []
    for precise in (network, in_bfloat16(network, device)):
        denoiser = precise
        if metadata["prediction"] == "velocity":
            denoiser = from_velocity(precise, schedule.to(device))
        sampler = Sampler(
            denoiser=denoiser,
            schedule=schedule,
            method=choose(schedule, sampler="dpmpp", steps=min(STEPS, schedule.num_steps)),
            leads=tuple(metadata["leads"]),
            length=metadata["length"],
            scale_mv=metadata["scale_mv"],
            device=device,
        )
        given = (sampler, np.arange(ROUNDED), labels)
        drawn.append(1000.0 * draw_signals(*given, seed=0, batch_size=ROUNDED))
    apart = drawn[1] - drawn[0]
    return {
        "records": ROUNDED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rms_uv": float(np.sqrt(np.mean(apart**2))),
        "most_uv": float(np.abs(apart).max()),
        "signal_rms_uv": float(np.sqrt(np.mean(drawn[0] ** 2))),
    }


def build(name: str, device: str) -> Denoiser:
    """Return a network of a preset, as `sample` uses it."""
    from sssd_hpc import config as configs

    tree = configs.read_yaml(configs.preset_path(name))
    config = configs.parse(configs.Config, configs.flags(tree), prog="sampling")
    arguments = {k: v for k, v in vars(config.model).items() if k != "leads"}
    torch.manual_seed(0)
    model = SSSDECG(num_leads=NUM_LEADS, num_labels=NUM_LABELS, **arguments).to(device)
    return captured(model.for_sampling(LENGTH, 200))


@torch.no_grad()
def call_s(network: Denoiser, batch: int, device: str) -> list[float]:
    """Return the seconds of calls, the first ones left out."""
    given = (
        torch.randn(batch, NUM_LEADS, LENGTH, device=device),
        torch.full((batch,), 100, device=device),
        torch.zeros(batch, NUM_LABELS, dtype=torch.int64, device=device),
    )
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        network(*given)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times[2:]


def draw_s(network: Denoiser, batch: int, device: str) -> float:
    """Return the seconds from noise to millivolts of a batch at `STEPS` steps of dpmpp."""
    schedule = NoiseSchedule.linear()
    sampler = Sampler(
        denoiser=network,
        schedule=schedule,
        method=choose(schedule, sampler="dpmpp", steps=STEPS),
        leads=tuple(EIGHT),
        length=LENGTH,
        scale_mv=1.0,
        device=torch.device(device),
    )
    labels = np.zeros((batch, NUM_LABELS), dtype=np.int64)
    begin = time.perf_counter()
    draw_signals(sampler, np.arange(batch), labels, seed=0, batch_size=batch)
    return time.perf_counter() - begin


def predicted_call_s(network: Results, batch: int) -> float:
    """Return the seconds of a call on the assumed GPU: forward is a third of a training step."""
    device, e = DEVICES[ASSUMED]
    widths = (network["blocks"], batch, network["channels"], network["states"], LENGTH)
    return cluster.compute_s(*widths, device, e) / 3


def section(results: Results) -> str:
    """Return the text between the marks."""
    writer = json.loads((RESULTS / "prepare.json").read_text())["write_set"]["records_per_s"]
    paper = results["networks"]["sssd_ecg"]
    rates = []
    for name, network in results["networks"].items():
        for row in network["calls"]:
            per_s = {m: row["batch"] / (steps * row["call_s"]) for m, steps in METHODS.items()}
            cells = (f"{rate:.3g}" for rate in per_s.values())
            rates.append((name, row["batch"], f"{row['call_s'] * 1e3:.0f}", *cells))
    heads = (f"{name}, {steps} steps" for name, steps in METHODS.items())
    best = STEPS / paper["drawn"]["record_s"]
    one = ASSUMED_BATCH / predicted_call_s(paper, ASSUMED_BATCH)
    costs = []
    for name, steps in METHODS.items():
        here = [hours(n * steps / best) for n in SETS.values()]
        there = [hours(n * steps / (g * one)) for n in SETS.values() for g in GPUS]
        costs.append((f"{name}, {steps}", *here, *there))
    drawn = paper["drawn"]
    return _TEXT.format(
        device=results["device"],
        processor=results["machine"]["processor"],
        threads=results["machine"]["threads"],
        rates=table(("network", "batch", "ms a call", *heads), rates),
        record_s=f"{drawn['record_s']:.1f}",
        rounded=_ROUNDED.format(**results["bfloat16"]) if "bfloat16" in results else "",
        batch=drawn["batch"],
        steps=STEPS,
        writer=f"{writer:,.0f}",
        gpu=ASSUMED,
        gpu_batch=ASSUMED_BATCH,
        gpu_rate=f"{one / 20:.0f}",
        costs=table(
            (
                "sampler, steps",
                *(f"{name}, here" for name in SETS),
                *(f"{name}, {g} GPU" for name in SETS for g in GPUS),
            ),
            costs,
        ),
    ).strip()


def hours(seconds: float) -> str:
    """Return a time as people say it."""
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


_ROUNDED = """
With `--precision bf16` the same noise ends {rms_uv:.1f} uV (RMS) from float32, {most_uv:.0f} uV at
most, where the signal has {signal_rms_uv:.0f} uV: {records} records of the demo's network,
{parameters:,} parameters.
"""

_TEXT = """
Measured on {device}, {processor}, {threads} thread(s), float32, random weights: records a second by
sampler, from the time of one call of the denoiser (`python -m bench.sampling`).

{rates}

Drawn from noise to millivolts at {steps} steps of `dpmpp`, batch {batch}, the papers' network takes
**{record_s} s a record** here. Guidance doubles a call. The writer makes {writer} records a second
on one core, in a thread beside the drawing: it limits no network here.
{rounded}
What the papers' network costs, here at that rate, and on GPUs. **No GPU has run this**: theirs
is a prediction by `bench/cluster.py` for an {gpu}, batch {gpu_batch}, a forward pass taken as a
third of a training step: {gpu_rate} records a second at 20 steps. Shards share nothing, so GPUs add
up.

{costs}
"""


if __name__ == "__main__":
    raise SystemExit(main())
