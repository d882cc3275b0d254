"""`python -m sssd_hpc`: the same as the `sssd-hpc` command."""

import sys

from sssd_hpc.cli import main

if __name__ == "__main__":
    sys.exit(main())
