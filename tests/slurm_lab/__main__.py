"""A Slurm lab by hand: `python -m tests.slurm_lab start`, then what it prints."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.slurm_lab import packages
from tests.slurm_lab.lab import Lab, LabError, environment

PYTHON = Path(sys.executable)
if PYTHON.is_relative_to(Path.cwd()):
    PYTHON = PYTHON.relative_to(Path.cwd())
ME = f"{PYTHON} -m tests.slurm_lab"
HELP = f"""\
{ME} exec sinfo                   any command on the controller's machine
{ME} exec                         a shell there
{ME} exec --on node2 ps ax        on a node
{ME} power-off node2              power-on, cut-link, heal-link: the same form
{ME} kill-controller              start-controller brings it back
{ME} restore                      no jobs, no faults
{ME} stop"""
ON_A_NODE = ("power-off", "power-on", "cut-link", "heal-link")
ON_THE_LAB = ("kill-controller", "start-controller", "restore")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=ME, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(tempfile.gettempdir(), "slurm-lab")
    parser.add_argument("--folder", type=Path, default=default, help="(default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("install", help="install what is missing, as root on Debian")
    start = verbs.add_parser("start", help="bring a cluster of four nodes up")
    start.add_argument(
        "--accounting", action="store_true", help="with slurmdbd, so that sacct works"
    )
    execute = verbs.add_parser("exec", help="run a command, or a shell, on one of its machines")
    execute.add_argument("--on", metavar="NODE", default="", help="(default: the controller)")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    for verb in ON_A_NODE:
        verbs.add_parser(verb).add_argument("node")
    for verb in (*ON_THE_LAB, "stop"):
        verbs.add_parser(verb)
    return parser.parse_args()


def main() -> None:
    options = parse()
    lab = Lab(options.folder, accounting=getattr(options, "accounting", False))
    if options.verb == "install":
        packages.install()
    elif options.verb == "start":
        if reason := packages.missing(lab.accounting):
            raise LabError(reason)
        try:
            lab.start()
        except LabError:
            if not lab.pid():
                raise
            raise LabError(f"a lab runs in {lab.folder} already:\n{HELP}") from None
        print(f"a Slurm cluster of {len(lab.nodes)} nodes; logs in {lab.folder}/log\n{HELP}")
    elif options.verb == "exec":
        command = [*lab.entrance(options.on), *(options.command or ["bash"])]
        os.execvpe(command[0], command, environment())
    elif options.verb == "stop":
        lab.stop()
        if (lab.folder / "etc" / "slurm.conf").exists():
            shutil.rmtree(lab.folder)
    else:
        node = [options.node] if options.verb in ON_A_NODE else []
        getattr(lab, options.verb.replace("-", "_"))(*node)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"error: {error}")
