"""The compiled parts at every level of vector instructions, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sssd_hpc.ops import native
from sssd_hpc.ops.block import cpp, plain

# Rests of every length below a vector, one and several tiles, features of one and many vectors.
SIZES = [(2, 5, length) for length in range(1, 20)] + [(2, 700, 130), (1, 3, 17000), (2, 64, 1000)]
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 5e-3}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["f32", "f64", "bf16"])


def inputs(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return g, x, y, h as signals and weight, bias, shift as parameters."""
    batch, H, _ = size
    wide = torch.promote_types(dtype, torch.float32)
    signals = [torch.randn(size).to(dtype) for _ in range(3)]
    signals.append((3 * torch.randn(batch, 2 * H, size[2])).to(dtype))
    parameters = [torch.randn(H, dtype=wide), torch.randn(H, dtype=wide)]
    return signals, [*parameters, torch.randn(batch, H, dtype=wide)]


def results(module, signals: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Return what the backend's functions make of signals and parameters."""
    (g, x, y, h), (weight, bias, shift) = signals, parameters
    out, mean, rstd = module.residual_norm(x, y, weight, bias, shift, 1e-5)
    no_shift = module.residual_norm(x, y, weight, bias, None, 1e-5)[0]
    gradients = module.residual_norm_backward(g, x, y, weight, mean, rstd)
    return [out, mean, rstd, no_shift, *gradients, module.gate(h), module.gate_backward(g, h)]


@dtypes
def test_every_level_equals_the_definition(level, dtype):
    for size in SIZES:
        signals, parameters = inputs(size, dtype)
        ours = results(cpp, signals, parameters)
        truth = results(plain, [t.double() for t in signals], [t.double() for t in parameters])
        for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
            error = float((mine.double() - true).norm() / true.norm())
            assert error < 3 * BOUNDS[dtype], (size, i)


def test_results_do_not_depend_on_the_number_of_threads():
    signals, parameters = inputs((3, 300, 1001), torch.float32)
    one = results(cpp, signals, parameters)
    torch.set_num_threads(2)
    try:
        two = results(cpp, signals, parameters)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_bfloat16_is_rounded_as_torch_rounds_it(level):
    # tanh(50) is 1, so that the gate is the sigmoid alone.
    control = torch.randn(1, 1, 4096).to(torch.bfloat16)
    h = torch.cat([torch.full_like(control, 50.0), control], dim=1)
    assert torch.equal(cpp.gate(h), control.float().sigmoid().to(torch.bfloat16))
    nan = torch.full((1, 2, 9), torch.nan, dtype=torch.bfloat16)
    assert cpp.gate(nan).isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.ones(2, 3)),
        ("x", torch.ones(2, 3, 4, dtype=torch.float16)),
        ("y", torch.ones(2, 3, 5)),
        ("y", torch.ones(2, 4, 3).mT),
        ("weight", torch.ones(3, dtype=torch.float64)),
        ("bias", torch.ones(4)),
        ("shift", torch.ones(3, 2)),
    ],
)
def test_the_extension_refuses_what_would_read_past_the_end(name, value):
    arguments = {
        "x": torch.ones(2, 3, 4),
        "y": torch.ones(2, 3, 4),
        "weight": torch.ones(3),
        "bias": torch.ones(3),
        "shift": torch.ones(2, 3),
    }
    with pytest.raises(RuntimeError, match=f"block: {name} "):
        native.load().residual_norm(**{**arguments, name: value}, eps=1e-5)


def test_the_extension_refuses_an_odd_number_of_features_and_a_wrong_gradient():
    h = torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="features"):
        native.load().gate(h)
    with pytest.raises(RuntimeError, match="block: g "):
        native.load().gate_backward(h, torch.ones(2, 4, 4))
