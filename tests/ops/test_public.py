"""What all public ops promise alike: one graph under torch.compile, first derivatives only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sssd_hpc.ops import convolve, prepare


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_ops_compile_into_one_graph_and_refuse_second_derivatives(backend):
    program = Path(__file__).with_name("public_ops.py")
    result = subprocess.run(
        [sys.executable, str(program), backend],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_kept_spectra_serve_narrow_signals(backend, dtype):
    u, spectrum = (
        torch.randn(2, 3, 10).to(dtype),
        prepare(torch.randn(2, 3, 10), torch.ones(3), backend),
    )
    y = convolve(u, spectrum)
    assert y.dtype == dtype
    torch.testing.assert_close(y, convolve(u.float(), spectrum).to(dtype))
