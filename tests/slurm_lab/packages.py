"""What a lab needs of the machine: root, namespaces and Debian's Slurm packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
ACCOUNTING_PROGRAMS = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}

POLICY = Path("/usr/sbin/policy-rc.d")


def absent(accounting: bool) -> list[str]:
    """List the packages whose programs are not there."""
    programs = PROGRAMS | (ACCOUNTING_PROGRAMS if accounting else {})
    return [package for program, package in programs.items() if not shutil.which(program)]


def missing(accounting: bool = False) -> str:
    """Say what this machine lacks for a lab, "" where it has everything."""
    if os.geteuid() != 0:
        return "a Slurm lab needs root"
    if packages := absent(accounting):
        return f"not installed: {' '.join(packages)}; `make slurm-packages` does so on Debian"
    trial = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "mount"]
    if subprocess.run([*trial, "-t", "tmpfs", "lab", "/run"], capture_output=True).returncode:
        return "no namespace can be made here (a container without CAP_SYS_ADMIN?)"
    return ""


def install(policy: Path = POLICY) -> None:
    """Install what is absent where that is possible; elsewhere say what is."""
    packages = absent(accounting=True)
    if not packages:
        return
    names = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"slurm: not installed: {names}; root on Debian or Ubuntu gets them from make")
        return
    print(f"slurm: installing {names}", flush=True)
    # 101 forbids packages to start their services; a policy of the machine's own stays.
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        output = subprocess.PIPE, subprocess.STDOUT
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            result = subprocess.run(
                ["apt-get", "-qq", *command], env=quiet, stdout=output[0], stderr=output[1]
            )
            if result.returncode:
                sys.stderr.buffer.write(result.stdout)
                print(f"slurm: apt-get {command[0]} failed; the Slurm tests are left out")
                return
    finally:
        if ours:
            policy.unlink()
