"""What must hold on every node before training starts; the batch script runs this on each.

Finds in seconds what would else end a job minutes later on one rank with another rank's error.
That it runs at all proves that the node has Python and this package.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sssd_hpc import files

NEEDED = ("torch", "deepspeed")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - NCCL's and DeepSpeed's place
MIN_SHARED_MB = 64
# Heartbeats are compared across nodes; the start of a step takes seconds of it.
MAX_SKEW_S = 30.0
EXIT_OK, EXIT_USER = 0, 2


def problems(run: Path, *, sent: float, now: float, min_free_gb: float) -> Iterator[str]:
    """Yield one line for each thing that would keep this node from training in `run`.

    `sent` and `now` are seconds since 1970, by the first node's clock and by this one's.
    """
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            yield f"{sys.executable} has no {name}; install the package with what it needs"
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = files.temp_name(run / "preflight")
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        yield f"--run {run} cannot be written: {error}; name a folder that every node shares"
    else:
        free = shutil.disk_usage(run).free / 1e9
        if free < min_free_gb:
            yield f"--run {run} has {free:.2f} GB left, {min_free_gb:g} GB are needed; make room"
    if not SHARED_MEMORY.is_dir():
        yield f"{SHARED_MEMORY} is missing; mount a tmpfs there"
    else:
        shared = shutil.disk_usage(SHARED_MEMORY).free / 1e6
        if shared < MIN_SHARED_MB:
            yield (
                f"{SHARED_MEMORY} has {shared:.0f} MB left, {MIN_SHARED_MB} MB are needed; "
                "remove what dead jobs left there"
            )
    if abs(now - sent) > MAX_SKEW_S:
        yield (
            f"the clock is {now - sent:+.0f} s from the first node's, {MAX_SKEW_S:.0f} s are "
            "allowed; have NTP set it, or leave the node out with --exclude"
        )


def main(args: Sequence[str] | None = None) -> int:
    """Print every problem of this node on a line of its own; return 2 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m sssd_hpc.train.preflight", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--time", type=float, required=True, help="first node's clock, s since 1970"
    )
    parser.add_argument("--min-free-gb", type=float, default=1.0, help="free disk space, GB")
    given = parser.parse_args(args)
    found = list(
        problems(given.run, sent=given.time, now=time.time(), min_free_gb=given.min_free_gb)
    )
    for problem in found:
        print(f"error: {socket.gethostname()}: {problem}", file=sys.stderr)
    return EXIT_USER if found else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
