"""Compare this version with another one on the same machine: `python -m bench --base GIT_REF`.

The other version is checked out into a temporary git worktree, its extension is built, and this
version's bench code runs there in a process of its own; suites of both versions take turns. What
the other version's ops do not have is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.cases import Record, label
from bench.targets import BASELINES
from bench.timing import ROOT, commit, say


def compare(ref: str, suites: list[str], device: str, quick: bool) -> int:
    """Run suites in both versions and print the ratio of every case; return an exit code."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        if not add_worktree(ref, tree):
            return 2
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            kept_out = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=kept_out)
            build(tree)
            return _compare(ref, suites, device, quick, tree, Path(folder))
        finally:
            git("worktree", "remove", "--force", str(tree))


def _compare(
    ref: str, suites: list[str], device: str, quick: bool, tree: Path, folder: Path
) -> int:
    failed = 0
    for suite in suites:
        found: list[list[Record]] = []
        for name, root in ((ref, tree), (commit(), ROOT)):
            say(f"{suite} of {name}")
            out = folder / f"{suite}-{len(found)}.json"
            flags = ["--device", device, "--out", str(out), *(["--quick"] if quick else [])]
            # -m takes the package beside it before any that is installed.
            command = [sys.executable, "-m", "bench", suite, *flags]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            subprocess.run(command, cwd=root, env=environment, check=False)
            found.append(records(out, suite))
        if not all(found):
            lacking = ref if not found[0] else "this version"
            print(f"{suite}: {lacking} has no results (see above)")
            failed |= not found[1]
            continue
        print(table(suite, ref, *found))
    return int(failed)


def table(suite: str, ref: str, base: list[Record], here: list[Record]) -> str:
    """Return a line a case: both times and the ratio, over 1 where this version is quicker.

    The ratios of baselines, which are the same code in both, show how far the machine drifted.
    """
    before = {(label(entry), entry["backend"]): entry["median_s"] for entry in base}
    lines = [f"{suite}: {ref} ms, here ms, ratio"]
    for entry in here:
        key = (label(entry), entry["backend"])
        if key not in before:
            lines.append(f"  {' '.join(key)}: new, {entry['median_s'] * 1e3:.4g}")
            continue
        old, new = before.pop(key), entry["median_s"]
        note = " (baseline)" if entry["backend"] in BASELINES else ""
        times = f"{old * 1e3:.4g}, {new * 1e3:.4g}, {old / new:.2f}"
        lines.append(f"  {' '.join(key)}{note}: {times}")
    lines += [f"  {' '.join(key)}: only in {ref}" for key in before]
    return "\n".join(lines)


def records(out: Path, suite: str) -> list[Record]:
    """Return the records of a suite, none if it was not kept."""
    if not out.exists():
        return []
    found: list[Record] = json.loads(out.read_text())["suites"].get(suite, {}).get("records", [])
    return found


def add_worktree(ref: str, tree: Path) -> bool:
    """Check a version out into a new folder; say why not."""
    done = git("worktree", "add", "--detach", "--force", str(tree), ref)
    if done.returncode:
        say(f"--base {ref}: {done.stderr.strip()}")
    return done.returncode == 0


def build(tree: Path) -> None:
    """Build the version's extension in place, if it has one; without it its backend is left out."""
    if (tree / "setup.py").exists() and (tree / "csrc").is_dir():
        say("building the extension of the other version")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, capture_output=True, check=False)


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in this version's repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
