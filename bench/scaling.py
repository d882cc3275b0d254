"""What training on many GPUs would cost: the model of `bench/cluster.py`, checked here.

    python -m bench.scaling [--page] [--steps 9]

Measures runs of 1, 2 and 4 ranks, the collectives alone and the disk on this machine, and writes
bench/results/scaling.json and docs/scaling.md; --page writes the page alone from the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import cluster
from bench.assumed import CLUSTERS, DEVICES, HEARTBEAT_S, PCIE, STORAGE, USABLE
from bench.cluster import Disk
from bench.model import NUM_LABELS, NUM_LEADS
from bench.scaling_page import page
from bench.timing import RESULTS, ROOT, machine, say
from sssd_hpc import config as configs
from sssd_hpc.train.describe import held

Results = dict[str, Any]

PAGE = ROOT / "docs" / "scaling.md"
PAPER = "sssd_ecg"
LENGTH = 1000
WIDER = 896
"""Channels of a network with about ten times the papers' parameters."""
PLAN = {
    **{"blocks": 4, "channels": 64, "N": 64, "L": 250, "batch": 4, "repeats": 9},
    "sizes": [65536, 1 << 20, 1 << 22, 1 << 23],
}
WORLDS = (1, 2, 4)
TIMES = ("step_s", "waiting_s", "sending_s", "alone_s")
OPERATIONS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""Torch's collectives that a step makes, as the model calls them."""
NETWORKS = (PAPER, "ten times")
GPUS = (8, 64, 512)
USUAL = ("H100 tf32", "400 Gb/s a GPU")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args(arguments)
    path = RESULTS / "scaling.json"
    kept = json.loads(path.read_text())["measured"] if options.page else None
    measured = kept or measure(options.steps)
    path.write_text(json.dumps({"measured": measured}))
    results = {"measured": measured, "model": derive(measured)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    return 0


def presets() -> dict[str, dict[str, Any]]:
    """Return the sizes of every preset, and of the papers' network made wider, by name."""
    trees = {n: configs.read_yaml(configs.preset_path(n)) for n in configs.preset_names()}
    found = {name: sizes(tree) for name, tree in trees.items()}
    wider = {**trees[PAPER], "model": {**trees[PAPER].get("model", {}), "channels": WIDER}}
    return {**found, "ten times": sizes(wider)}


def sizes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's widths, parameters, buffers and bytes kept for backward."""
    from sssd_hpc.model import SSSDECG

    config = configs.parse(configs.Config, configs.flags(tree), prog="scaling")
    arguments = {k: v for k, v in vars(config.model).items() if k != "leads"}
    with torch.device("meta"):
        model = SSSDECG(num_leads=NUM_LEADS, num_labels=NUM_LABELS, **arguments)
    named = {name for name, _ in model.named_parameters()}
    state = {name: t for name, t in model.state_dict().items() if name not in named}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": sum(t.numel() * t.element_size() for t in state.values()),
        "blocks": config.model.num_blocks,
        "channels": config.model.channels,
        "states": config.model.d_state // 2,
    }


def kept_per_record() -> int:
    """Return the bytes that the papers' network keeps a record from forward to backward."""
    from types import SimpleNamespace

    from sssd_hpc.train.describe import _activations

    tree = configs.read_yaml(configs.preset_path(PAPER))
    store: Any = SimpleNamespace(length=LENGTH, label_names=["label"] * NUM_LABELS)
    config = configs.parse(configs.Config, configs.flags(tree), prog="scaling")
    kept = _activations(config, store)
    return int(kept(2) - kept(1))


def measure(steps: int) -> Results:
    """Run ranks and the disk on this machine."""
    found: Results = {"machine": machine(), "cores": len(os.sched_getaffinity(0)), "plan": PLAN}
    found["date"] = time.strftime("%Y-%m-%d")
    found["kept_per_record"] = kept_per_record()
    found["disk"] = disk()
    say(f"  disk {found['disk']}")
    found["runs"] = []
    for world in WORLDS:
        stages = [0] if world == 1 else [0, 1, 2, 3]
        run = ranks(world, {**PLAN, "stages": stages, "steps": steps})
        found["runs"].append(run)
        medians = [statistics.median(s["step_s"]) for s in run["stages"]]
        say(f"  {world} ranks: {', '.join(f'{m * 1e3:.0f} ms' for m in medians)} by stage")
    found["load_after"] = f"{os.getloadavg()[0]:.1f}"
    return found


def ranks(world: int, plan: Mapping[str, Any]) -> Results:
    """Return what rank 0 of `world` new processes measured, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.scaling_rank", json.dumps(plan)]
    started = []
    for rank in range(world):
        wanted = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        wanted |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **{name: str(value) for name, value in wanted.items()}}
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
            )
        )
    try:
        text, _ = started[0].communicate(timeout=300)
    finally:
        for process in started:
            process.kill()
            process.wait()
    if started[0].returncode:
        raise RuntimeError(f"rank 0 of {world} ended with {started[0].returncode}")
    found: Results = json.loads(text.splitlines()[-1])
    return found


def disk() -> dict[str, float]:
    """Return the rates of a checkpoint's steps, and the seconds of a real one and a heartbeat."""
    from safetensors.torch import load_file, save_file

    from sssd_hpc import files
    from sssd_hpc.model.checkpoint import Checkpoint
    from sssd_hpc.train import checkpoint
    from sssd_hpc.train.ranks import Group

    size = 1 << 28
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        tensors = {str(n): torch.randn(size // 4 // 16) for n in range(16)}
        file = folder / "tensors"

        def write() -> None:
            save_file(tensors, file)
            files.fsync_path(file)

        kept = {name: torch.empty_like(t) for name, t in tensors.items()}
        copy_s = seconds(lambda: [kept[name].copy_(t) for name, t in tensors.items()], 5)
        write_s, hash_s = seconds(write, 3), seconds(lambda: files.sha256_file(file), 3)
        # Cloned, because loading alone maps the file.
        read_s = seconds(lambda: [t.clone() for t in load_file(file).values()], 3)
        beat = {"rank": 0, "host": "node", "pid": 1, "time": 0.0, "samples": 1, "phase": "step"}
        beat_s = seconds(
            lambda: files.atomic_write_text(folder / "rank-00000.json", json.dumps(beat)), 21
        )
        paper = presets()[PAPER]
        quarter = cluster.checkpoint_bytes(paper["parameters"], paper["buffers"]) // 16
        named = {f"{n}": torch.randn(quarter // 16) for n in range(16)}
        stems = {stem: named for stem in ("model", "optimizer", "ema", "rest")}
        saves = []
        for number in range(3):
            part = Checkpoint(number, stems, {})
            begin = time.perf_counter()
            checkpoint.save(folder / "run", part, group=Group(), keep=1)
            saves.append(time.perf_counter() - begin)
    return {
        "copy_bytes_per_s": size / copy_s,
        "write_bytes_per_s": size / write_s,
        "hash_bytes_per_s": size / hash_s,
        "read_bytes_per_s": size / read_s,
        "heartbeat_s": beat_s,
        "saved_bytes": 4 * 16 * (quarter // 16) * 4,
        "save_s": statistics.median(saves),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median of a few times."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def line(rows: list[Results], op: str) -> tuple[float, float]:
    """Return seconds to begin and seconds a byte of a collective that was measured alone."""
    mine = sorted((r["bytes"], statistics.median(r["times_s"])) for r in rows if r["op"] == op)
    (small, first), (large, last) = mine[0], mine[-1]
    slope = max(0.0, (last - first) / (large - small))
    return max(0.0, first - slope * small), slope


def check(measured: Results) -> list[Results]:
    """Return prediction beside measurement for every run."""
    alone = measured["runs"][0]["stages"][0]
    base_held = alone["held_bytes"] - held(alone["parameters"], 0, 1).rest
    rows = []
    for run in measured["runs"]:
        n = run["world"]
        for found in run["stages"]:
            P, stage = found["parameters"], found["stage"]
            sent = cluster.volumes(P, stage) if n > 1 else {}
            told = 0.0
            for op, calls in found["calls"].items() if n > 1 else ():
                begin_s, byte_s = line(run["collectives"], OPERATIONS[op])
                told += calls * begin_s + found["bytes"][op] * byte_s
            times = {key: statistics.median(found[key]) for key in TIMES}
            rows.append(
                {
                    "ranks": n,
                    "stage": stage,
                    **times,
                    "predicted_sending_s": told,
                    "predicted_step_s": times["alone_s"] + told,
                    "bytes": sum(found["bytes"].values()),
                    "predicted_bytes": sum(sent.values()),
                    "held": found["held_bytes"] - base_held,
                    "predicted_held": held(P, stage, n).rest,
                }
            )
    return rows


def gpu_step(size: Mapping[str, Any], stage: int, n: int, B: int, gpu: str, net: str) -> Results:
    """Return the predicted step of n GPUs with B records each, and its efficiency."""
    device, e = DEVICES[gpu]
    P = size["parameters"]
    widths = size["blocks"], B, size["channels"], size["states"], LENGTH
    compute = cluster.compute_s(*widths, device, e)
    sending = cluster.communication_s(P, stage, n, CLUSTERS[net])
    step = compute + cluster.update_s(P, stage, n, device) + sending
    alone = compute + cluster.update_s(P, 0, 1, device)
    return {"step_s": step, "communication_s": sending, "efficiency": alone / step}


def derive(measured: Results) -> Results:
    """Return all that the page says beyond what was measured."""
    sized = presets()
    rates = (measured["disk"][f"{name}_bytes_per_s"] for name in ("copy", "write", "hash", "read"))
    disk_here = Disk(*rates)
    storage = disk_here._replace(copy=PCIE, write=STORAGE, read=STORAGE)
    return {
        "sizes": sized,
        "check": check(measured),
        "most": BATCHES[-1],
        "every": configs.TrainConfig().checkpoint_every,
        "gap_s": configs.TrainConfig().checkpoint_gap_s,
        "efficiency": efficiency(sized, measured["kept_per_record"]),
        "steps": [
            {"model": name, "batch": B, "gpus": n, **gpu_step(sized[name], 0, n, B, *USUAL)}
            for name in NETWORKS
            for B in (1, 8, 64)
            for n in (1, *GPUS)
        ],
        "memory": memory(sized, measured["kept_per_record"]),
        "checkpoint": saving(sized, storage),
        "here": here(sized[PAPER], measured["disk"], disk_here),
    }


def per_record(sized: Mapping[str, Results], name: str, kept: float) -> float:
    """Return the bytes a record keeps in a network: in proportion to the channels."""
    share: float = sized[name]["channels"] / sized[PAPER]["channels"]
    return kept * share


def fitting(P: int, stage: int, n: int, record: float, capacity: float) -> int:
    """Return the records a GPU that fit beside what a rank holds."""
    return int((USABLE * capacity - sum(held(P, stage, n))) / record)


def efficiency(sized: Mapping[str, Results], kept: float) -> list[Results]:
    """Return the fewest records a GPU for 90 % by network, GPU, link, stage and number of GPUs."""
    rows = []
    for name, gpu, net, stage in itertools.product(NETWORKS, DEVICES, CLUSTERS, (0, 1)):
        row: Results = {"model": name, "gpu": gpu, "net": net, "stage": stage}
        for n in GPUS:
            least = next(
                (
                    B
                    for B in BATCHES
                    if gpu_step(sized[name], stage, n, B, gpu, net)["efficiency"] >= 0.9
                ),
                None,
            )
            record, capacity = per_record(sized, name, kept), DEVICES[gpu][0].memory_bytes
            most = fitting(sized[name]["parameters"], stage, n, record, capacity)
            row |= {str(n): least, f"fits_{n}": least is not None and least <= most}
        rows.append(row)
    return rows


def memory(sized: Mapping[str, Results], kept: float) -> list[Results]:
    """Return what a rank of 8 holds by network and stage, and the records that then fit."""
    rows = []
    for name, stage in itertools.product(NETWORKS, range(4)):
        P, record = sized[name]["parameters"], per_record(sized, name, kept)
        rows.append(
            {
                "model": name,
                "stage": stage,
                "held_8": sum(held(P, stage, 8)),
                "record": record,
                "records_80gb": fitting(P, stage, 8, record, 80e9),
            }
        )
    return rows


def saving(sized: Mapping[str, Results], storage: Disk) -> list[Results]:
    """Return what checkpoints cost on GPUs at the default interval and gap."""
    rows = []
    train = configs.TrainConfig()
    for name, (n, B) in itertools.product(NETWORKS, ((1, 8), (8, 8), (64, 8), (512, 8))):
        size = sized[name]["parameters"], sized[name]["buffers"], n, storage
        step = gpu_step(sized[name], 0, n, B, *USUAL)["step_s"]
        due = max(1.0, train.checkpoint_every / (n * B)) * step
        interval = cluster.interval_s(due, train.checkpoint_gap_s)
        waited = cluster.waited_s(*size, interval)
        rows.append(
            {
                "model": name,
                "gpus": n,
                "batch": B,
                "bytes": cluster.checkpoint_bytes(*size[:2]),
                "save_s": cluster.save_s(*size),
                "due_s": due,
                "interval_s": interval,
                "share": waited / (waited + interval),
            }
        )
    return rows


def here(paper: Results, rates: Mapping[str, float], disk_here: Disk) -> Results:
    """Return what checkpoints and heartbeats of the papers' network cost on this machine."""
    size = paper["parameters"], paper["buffers"], 1, disk_here
    work, record_s = cluster.save_s(*size), cpu_seconds_per_record()
    interval = configs.TrainConfig().checkpoint_every * record_s
    return {
        "save_s": work,
        "record_s": record_s,
        # Written beside the training, but on its cores: all of it counts.
        "share": work / (work + interval),
        "waited_share": cluster.waited_s(*size, interval) / interval,
        "heartbeat_share": rates["heartbeat_s"] / HEARTBEAT_S,
        "saved_predicted_s": rates["saved_bytes"] * (1 / disk_here.write + 1 / disk_here.hash),
    }


def cpu_seconds_per_record() -> float:
    """Return the seconds a record of the papers' network in a training step here, as measured."""
    results = json.loads((RESULTS / "cpu-intel-xeon-processor.json").read_text())
    times: Iterable[float] = (
        row["median_s"] / row["shape"]["B"]
        for row in results["suites"]["training_step"]["records"]
        if row["op"] == "training step"
        and row["backend"] == "auto"
        and row["shape"]["blocks"] == 36
    )
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
