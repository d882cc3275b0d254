"""The package with faults in its shards: test_sampling.py places it over the real one.

DISTURB holds the folder of the faults: `plan.json` by shard and attempt, and a folder `attempts`
that counts these, whoever starts them.
- kill: SIGKILL at the n-th change of a file or folder below OUT once the shard is locked;
- gate: the n-th change waits till the folder has a file `go`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

CHANGES = ("os.rename", "os.link", "os.mkdir", "os.remove")


def install(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    fault: dict[str, int] = {}
    changes: int | None = None

    def count(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal fault, changes
        path = str(arguments[0]) if arguments else ""
        if not path.startswith(f"{plan['out']}/"):
            return
        lock = re.search(r"/0*([0-9]+)-of-[0-9]+\.lock$", path)
        if changes is None and name == "open" and lock:
            changes = 0
            fault = next_fault(folder, lock[1], plan["faults"].get(lock[1], []))
        if changes is None or name not in CHANGES or "/.submitit/" in path:
            return
        changes += 1
        if changes == fault.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if changes == fault.get("gate"):
            (folder / f"gate-{fault['shard']}-{os.environ['SLURMD_NODENAME']}").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)

    sys.addaudithook(count)


def next_fault(folder: Path, shard: str, faults: list[dict[str, int]]) -> dict[str, int]:
    for attempt in range(1000):
        try:
            (folder / "attempts" / f"{shard}-{attempt}").mkdir(parents=True)
        except FileExistsError:
            continue
        chosen = faults[attempt] if attempt < len(faults) else {}
        return {**chosen, "shard": int(shard)}
    return {}


if "SLURM_ARRAY_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ:
    install(Path(os.environ["DISTURB"]))
