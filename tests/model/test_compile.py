"""torch.compile sees the whole network as one graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_compiled_network_and_its_gradients_equal_the_eager_ones():
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled_model.py"))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "equal\n"
