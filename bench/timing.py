"""Timing shared by the benchmarks: medians and quantiles, and what machine they were taken on."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def measure(work: Callable[[], object], *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return median, 20 % and 80 % quantile of the wall time of `work()` in seconds."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    times.sort()
    return {
        "median_s": statistics.median(times),
        "low_s": times[int(0.2 * (repeats - 1))],
        "high_s": times[-1 - int(0.2 * (repeats - 1))],
        "repeats": float(repeats),
    }


def machine() -> dict[str, str]:
    """Describe the processor, the versions and the commit that a result belongs to."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def record(name: str, result: dict[str, Any]) -> None:
    """Print a result and store it as `bench/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **result}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
