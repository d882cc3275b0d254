"""What every launcher leans on: refusals, block sizes, a dot that the interpreter reads right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sssd_hpc.errors import UserError
from sssd_hpc.ops import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _matmul(X, Y, Z, N: tl.constexpr):
    index = tl.arange(0, N)
    tile = index[:, None] * N + index[None, :]
    x, y = tl.load(X + tile), tl.load(Y + tile)
    tl.store(Z + tile, launch.dot(x, y, tl.zeros((N, N), tl.float32), "ieee"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_multiplies_numbers_not_their_bit_patterns(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 16, 16, device=DEVICE).to(dtype)
    z = torch.empty(16, 16, device=DEVICE)
    with launch.on(x):
        _matmul[(1,)](x, y, z, 16, **launch.options(num_warps=4))
    truth = x.double() @ y.double()
    assert (z - truth).norm() < 1e-6 * truth.norm()


def test_a_cpu_tensor_is_refused_where_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    with pytest.raises(UserError, match="need a GPU tensor and this one is on cpu"):
        launch.on(torch.ones(1))


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(UserError, match=r"triton is 3\.5\.1; 3\.6 or newer is needed"):
        launch.on(torch.ones(1, device=DEVICE))


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 16), (16, 16), (17, 32), (32, 32), (100, 128), (9999, 128)]
)
def test_a_block_is_the_next_power_of_two_within_its_limits(n: int, expected: int) -> None:
    assert launch.block(n, 16, 128) == expected
