"""The Triton parts where the op's own tests do not lead them; without a GPU, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sssd_hpc.ops import launch
from sssd_hpc.ops.block import reference
from sssd_hpc.ops.block import triton as kernels

# The interpreter takes CPU tensors; where kernels are compiled the same tests run on the GPU.
DEVICE = "cpu" if launch.interpreted() else "cuda"
# The interpreter multiplies exactly; a device cuts float32 to tf32. A narrow sum would err by more.
EXACT = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e-6)
PRODUCT = EXACT if DEVICE == "cpu" else {**dict.fromkeys(EXACT, 1e-5), torch.float32: 3e-3}


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def skip_inputs(batch: int, C: int, L: int, narrow: torch.dtype) -> list[Tensor]:
    h, x, skips = torch.randn(3, batch, C, L)
    weight, bias = torch.randn(2 * C, C) / C**0.5, torch.randn(2 * C)
    tensors = [h.to(narrow), x, skips, weight.to(narrow), bias]
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "C", "L"), [(1, 1, 1), (2, 3, 63), (1, 17, 130), (2, 64, 200), (1, 130, 40)]
)
def test_the_product_keeps_its_sums_in_single_precision(batch, C, L, narrow):
    inputs = skip_inputs(batch, C, L, narrow)
    truth = reference.residual_skip(*(t.double() for t in inputs))
    for ours, true in zip(kernels._residual_skip(*inputs), truth, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, true) < PRODUCT[narrow]


def test_tensor_cores_take_single_precision_only_where_it_is_allowed(monkeypatch):
    calls = []

    def launch(h: Tensor, x: Tensor, skips: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(h.dtype)
        return x, skips

    monkeypatch.setattr(kernels, "_residual_skip", launch)
    precision = "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    for narrow in (torch.float32, torch.bfloat16):
        kernels.residual_skip(*skip_inputs(1, 2, 3, narrow))
    assert calls == [torch.bfloat16]
    precision = "high"
    kernels.residual_skip(*skip_inputs(1, 2, 3, torch.float32))
    assert calls == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("H", "L"), [(1025, 5), (3000, 3), (1, 130), (100, 8)])
def test_the_norm_takes_any_number_of_features(H, L):
    x, y, g = torch.randn(3, 2, H, L, device=DEVICE)
    weight, bias = torch.randn(2, H, device=DEVICE)
    shift = torch.randn(2, H, device=DEVICE)
    out, mean, rstd = kernels.residual_norm(x, y, weight, bias, shift, 1e-5)
    leaves = [t.double().requires_grad_() for t in (x, weight, shift)]
    true = reference.residual_norm(leaves[0], y.double(), leaves[1], bias.double(), leaves[2], 1e-5)
    assert relative(out, true.detach()) < 1e-6
    gradients = kernels.residual_norm_backward(g, x, y, weight, mean, rstd)
    truths = torch.autograd.grad(true, leaves, g.double())
    for ours, truth in zip(gradients, truths, strict=True):
        # One feature's gradient is zero but for rounding.
        assert float((ours - truth).norm()) < 1e-5 * max(1.0, float(truth.norm()))


def test_a_tile_holds_every_feature_and_as_many_columns_as_fit():
    assert kernels._tile(512, 1000, torch.float32, 16384) == {"BLOCK_H": 512, "BLOCK": 32}
    assert kernels._tile(512, 1000, torch.float64, 16384) == {"BLOCK_H": 512, "BLOCK": 16}
    assert kernels._tile(100_000, 1000, torch.float32, 16384) == {"BLOCK_H": 131072, "BLOCK": 1}
    assert kernels._tile(3, 5, torch.bfloat16, 16384) == {"BLOCK_H": 4, "BLOCK": 8}
