"""Clocks shared by the benchmarks, and the description of the machine they ran on.

Candidates that are compared take turns (A B A B), so that a slow minute of the machine falls on all
of them. On a GPU a turn is timed by events, after the caches were flushed, and where it can be
captured it is the replay of a graph.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# More than the last-level cache of any GPU that this runs on.
FLUSH_BYTES = 256 << 20
# A candidate much quicker than the slowest one is timed several times in a turn, at most so often.
MAX_SHOTS = 8


@dataclass(frozen=True)
class Effort:
    """How long one comparison may take: turns until `budget_s` is spent, at least and at most."""

    budget_s: float
    least: int
    most: int


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return the median, the 20 % and the 80 % quantile of times in seconds, and their number."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median_s": statistics.median(ordered),
        "low_s": ordered[round(0.2 * last)],
        "high_s": ordered[round(0.8 * last)],
        "repeats": float(len(ordered)),
    }


def measure(work: Callable[[], object], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return the quantiles of the wall time of `work()` alone."""
    for _ in range(warmup):
        work()
    clock = Clock("cpu")
    return quantiles([clock(work) for _ in range(repeats)])


def interleave(
    works: Sequence[Callable[[], object]], device: str, effort: Effort, first_s: float = 0.0
) -> list[list[float]]:
    """Return the times of each work in seconds, taken in turns; the works are warm already.

    Args:
        works: what to time.
        device: cpu or cuda.
        effort: how long it may take.
        first_s: time of an earlier call of the first work, where it counts as one of its turns.
    """
    clock = Clock(device)
    times: list[list[float]] = [[] for _ in works]
    shots = [1] * len(works)
    begin = time.perf_counter()
    for turn in range(effort.most):
        for number, work in enumerate(works):
            if turn == 0 and number == 0 and first_s:
                times[0].append(first_s)
                continue
            times[number] += [clock(work) for _ in range(shots[number])]
        if turn == 0:
            slowest = max(mine[0] for mine in times)
            shots = [min(MAX_SHOTS, max(1, int(slowest / mine[0] / 2))) for mine in times]
        if turn + 1 >= effort.least and time.perf_counter() - begin > effort.budget_s:
            break
    return times


class Clock:
    """Times one call: wall time on a processor, events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work()` takes."""
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Empties the caches, and lets the launches run ahead of the device.
        self.flush.zero_()
        begin_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event)) / 1e3


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of `work` as a CUDA graph, or `work` itself where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - what a library cannot do under capture may raise anything
        torch.cuda.synchronize()
        return work

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def release(device: str) -> None:
    """Give back the memory of what is no longer named."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_gb() -> float:
    """Return this process's peak resident memory in GB (1e9 bytes) since `forget_peak`.

    Not ru_maxrss, which begins at the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def forget_peak() -> None:
    """Begin a new peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def available_gb() -> float:
    """Return the memory that could be taken now, in GB."""
    meminfo = Path("/proc/meminfo").read_text()
    return int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024 / 1e9


def say(text: str) -> None:
    """Show progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    """Name the commit that is measured; "-dirty" if tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine(device: str = "cpu") -> dict[str, str]:
    """Describe the device, the versions and the commit that a result belongs to."""
    found = {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
        }
    return found


def device_slug(device: str) -> str:
    """Return the name of the device's file of results, such as cpu-intel-xeon-processor."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    words = re.sub(r"\((r|tm)\)", "", name.lower())
    return f"{device}-{re.sub(r'[^a-z0-9]+', '-', words).strip('-')}"


def record(name: str, result: dict[str, Any]) -> None:
    """Print a result and store it as `bench/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **result}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"
