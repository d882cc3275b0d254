"""The pointwise parts of a block against their definitions, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops.block.op import gate, pointwise, residual_norm, residual_skip

# batch, H or C, L; a power of two and not, below and above a tile.
SIZES = [(1, 1, 1), (3, 3, 63), (2, 16, 100), (1, 17, 3), (2, 64, 1000), (1, 512, 100)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-H{}-L{}".format(*size))
shifted = pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no-shift"])
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


def norm_inputs(size: tuple[int, int, int], with_shift: bool = True) -> list[Tensor | None]:
    batch, H, _ = size
    shift = draw(batch, H) if with_shift else None
    return [draw(*size), 3 + 2 * draw(*size), draw(H), draw(H), shift]


def skip_inputs(size: tuple[int, int, int]) -> list[Tensor | None]:
    C = size[1]
    return [draw(*size), draw(*size), draw(*size), draw(2 * C, C) / C**0.5, draw(2 * C)]


def gate_inputs(size: tuple[int, int, int]) -> list[Tensor | None]:
    batch, C, L = size
    return [3 * draw(batch, 2 * C, L)]


PARTS: dict[str, tuple[Callable, Callable]] = {
    "residual_norm": (residual_norm, norm_inputs),
    "gate": (gate, gate_inputs),
    "residual_skip": (residual_skip, skip_inputs),
}
parts = pytest.mark.parametrize("part", PARTS)


def run(part: Callable, inputs: list[Tensor | None], backend: str) -> list[Tensor]:
    """Return outputs and the gradient of every input, for output gradients that are all unlike."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = part(*leaves, backend=backend)
    outputs = list(out) if isinstance(out, tuple) else [out]
    weights = [
        (0.7 * torch.arange(o.numel()) + i).sin().reshape(o.shape).to(o.dtype)
        for i, o in enumerate(outputs)
    ]
    present = [t for t in leaves if t is not None]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, present, weights))


def relative(ours: Tensor, truth: Tensor) -> float:
    """Return the error's share of the norm; of a vanishing truth the error itself."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-3))


@sizes
@shifted
def test_the_norm_and_every_gradient_equal_the_reference(backend, size, shifted):
    inputs = norm_inputs(size, shifted)
    for ours, truth in zip(
        run(residual_norm, inputs, backend), run(residual_norm, inputs, "reference"), strict=True
    ):
        assert ours.shape == truth.shape
        assert ours.is_contiguous()
        assert relative(ours, truth) < 1e-12


@sizes
@pytest.mark.parametrize("part", ["gate", "residual_skip"])
def test_gate_and_skip_and_every_gradient_equal_the_reference(backend, part, size):
    function, inputs_of = PARTS[part]
    inputs = inputs_of(size)
    for ours, truth in zip(
        run(function, inputs, backend), run(function, inputs, "reference"), strict=True
    ):
        assert ours.shape == truth.shape
        assert relative(ours, truth) < 1e-12


@parts
def test_single_precision_errs_by_less_than_a_millionth(backend, part):
    function, inputs_of = PARTS[part]
    inputs = [t if t is None else t.float() for t in inputs_of((2, 64, 100))]
    double = [t if t is None else t.double() for t in inputs]
    ours, truth = run(function, inputs, backend), run(function, double, "reference")
    outputs = len(ours) - len(inputs)
    for i, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert mine.dtype == F32
        assert relative(mine, true) < (1e-6 if i < outputs else 3e-6)


@parts
def test_bfloat16_signals_err_by_their_rounding_alone(backend, part):
    function, inputs_of = PARTS[part]
    inputs = [t if t is None else t.to(BF16) for t in inputs_of((2, 32, 50))]
    double = [t if t is None else t.double() for t in inputs]
    for mine, true in zip(
        run(function, inputs, backend), run(function, double, "reference"), strict=True
    ):
        assert mine.dtype == BF16
        # Half a unit of the last place is 2^-9; sums of two roundings stand here as well.
        assert relative(mine, true) < 5e-3


def test_small_signals_pass_the_gate_with_all_their_digits(backend):
    h = torch.cat([torch.logspace(-8, 0, 50), torch.zeros(50)]).reshape(1, 2, 50)
    ours, truth = gate(h, backend), gate(h.double(), "reference")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


def test_the_gate_saturates_without_overflow(backend):
    ends = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30, torch.inf, -torch.inf])
    h = torch.cartesian_prod(ends, ends).T.reshape(1, 2, 49).contiguous()
    ours, truth = run(gate, [h], backend), run(gate, [h.double()], "reference")
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-15)


def test_a_mean_far_above_the_spread_costs_the_variance_nothing(backend):
    # Multiples of 1/256, so that the sum is exact and the statistics alone are tested.
    x, y = ((256 * draw(2, 64, 40)).round() / 256 for _ in range(2))
    inputs = [x + 4096, y, draw(64), draw(64), None]
    single = [t if t is None else t.float() for t in inputs]
    inputs = [t if t is None else t.double() for t in single]
    ours, truth = (
        run(residual_norm, single, backend),
        run(residual_norm, inputs, "reference"),
    )
    # The mean itself is rounded to half of 4.9e-4.
    for mine, true in zip(ours, truth, strict=True):
        assert relative(mine, true) < 1e-3


def test_constant_columns_give_the_bias(backend):
    x = torch.ones(2, 5, 3)
    out = residual_norm(x, x, torch.ones(5), torch.arange(5.0), backend=backend)
    torch.testing.assert_close(out, torch.arange(5.0)[:, None].expand(2, 5, 3))


def test_gradcheck(backend):
    def leaves(inputs: list[Tensor | None]) -> list[Tensor]:
        return [t.requires_grad_() for t in inputs if t is not None]

    size = (1, 2, 3)
    for function, inputs_of in PARTS.values():
        assert torch.autograd.gradcheck(
            lambda *t, f=function: f(*t, backend=backend), leaves(inputs_of(size))
        )


@parts
def test_strided_inputs_give_the_same_bits(backend, part):
    function, inputs_of = PARTS[part]
    inputs = inputs_of((2, 6, 20))
    strided = [t if t is None else t.mT.contiguous().mT if t.dim() > 1 else t for t in inputs]
    assert not strided[0].is_contiguous()
    for mine, true in zip(
        run(function, strided, backend), run(function, inputs, backend), strict=True
    ):
        assert torch.equal(mine, true)


@parts
def test_the_same_inputs_give_the_same_bits(backend, part):
    function, inputs_of = PARTS[part]
    inputs = [t if t is None else t.float() for t in inputs_of((2, 20, 70))]
    once, twice = (run(function, inputs, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@parts
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_column_alone(backend, part, bad):
    function, inputs_of = PARTS[part]
    inputs = [t if t is None else t.float() for t in inputs_of((2, 6, 40))]
    clean = function(*inputs, backend=backend)
    inputs[0][1, 2, 33] = bad
    spoiled = function(*inputs, backend=backend)
    clean, spoiled = (out[0] if isinstance(out, tuple) else out for out in (clean, spoiled))
    if bad != bad:
        rows = slice(2, 3) if part == "gate" else slice(None)
        assert spoiled[1, rows, 33].isnan().all()
    elif part != "gate":
        assert not spoiled[1, :, 33].isfinite().any()
    clean[1, :, 33] = spoiled[1, :, 33] = 0
    assert torch.equal(spoiled, clean)


@parts
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(backend, part):
    function, inputs_of = PARTS[part]
    results = run(function, inputs_of((0, 4, 10)), backend)
    for mine, true in zip(results, run(function, inputs_of((0, 4, 10)), "reference"), strict=True):
        assert mine.shape == true.shape
        assert not mine.any()


@shifted
def test_the_registered_norm_passes_opcheck(opcheck, backend, shifted):
    x, y = (torch.randn(2, 4, 5, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, requires_grad=True) for _ in range(2))
    shift = torch.randn(2, 4, requires_grad=True) if shifted else None
    opcheck(torch.ops.sssd_hpc.residual_norm, (x, y, weight, bias, shift, 1e-5, backend))
    tensors = [t.detach() for t in (x, x, y, weight)]
    statistics = torch.randn(2, 5), torch.rand(2, 5)
    opcheck(torch.ops.sssd_hpc.residual_norm_backward, (*tensors, *statistics, backend))


def test_the_registered_gate_and_skip_pass_opcheck(opcheck, backend):
    h, x, skips = (torch.randn(2, 4, 5, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(8, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    opcheck(torch.ops.sssd_hpc.gate, (h, backend))
    opcheck(torch.ops.sssd_hpc.gate_backward, (torch.randn(2, 2, 5), h.detach(), backend))
    opcheck(torch.ops.sssd_hpc.residual_skip, (h, x, skips, weight, bias, backend))
    tensors = [t.detach() for t in (x, skips, h, weight)]
    opcheck(torch.ops.sssd_hpc.residual_skip_backward, tuple(tensors))


def test_a_whole_block_compiles_into_one_graph_under_autocast(backend):
    C = 4
    x, skips, y = draw(2, C, 9, dtype=F32), draw(2, C, 9, dtype=F32), draw(2, 2 * C, 9, dtype=F32)
    parameters = [draw(*s, dtype=F32) for s in ((8, 8), (8,), (8,), (8,), (2, 8), (8, 4), (8,))]

    def block(x: Tensor, *parameters: Tensor) -> Tensor:
        linear, offset, weight, bias, shift, both, biases = parameters
        h = residual_norm(y, pointwise(y, linear, offset), weight, bias, shift, backend=backend)
        x_out, skips_out = residual_skip(gate(h, backend), x, skips, both, biases, backend)
        return x_out * skips_out

    def results(function: Callable) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        with torch.autocast(torch.get_default_device().type, dtype=BF16):
            out = function(*leaves)
        assert out.dtype == F32
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(results(compiled), results(block), strict=True):
        torch.testing.assert_close(ours, truth)


def test_autocast_narrows_linear_layers_and_nothing_else(backend):
    x, y = draw(2, 8, 20, dtype=F32), draw(2, 8, 20, dtype=F32)
    weight, bias = draw(8, dtype=F32), draw(8, dtype=F32)
    linear, biases = draw(16, 8, dtype=F32), draw(16, dtype=F32)
    plain = residual_norm(x, y, weight, bias, backend=backend), gate(x, backend)
    exact = pointwise(x, linear, biases)
    sums = residual_skip(x, y, y, linear, biases, backend)
    with torch.autocast(torch.get_default_device().type, dtype=BF16):
        assert torch.equal(residual_norm(x, y, weight, bias, backend=backend), plain[0])
        assert torch.equal(gate(x, backend), plain[1])
        assert pointwise(x, linear, biases).dtype == BF16
        assert pointwise(x.double(), linear.double(), biases.double()).dtype == F64
        assert relative(pointwise(x, linear, biases), exact) < 1e-2
        for ours, truth in zip(residual_skip(x, y, y, linear, biases, backend), sums, strict=True):
            assert ours.dtype == F32
            assert not torch.equal(ours, truth)
            assert relative(ours, truth) < 1e-2


def test_mixed_dtypes_follow_the_residual_stream(backend):
    x, y = draw(2, 8, 5, dtype=F32), draw(2, 8, 5, dtype=BF16)
    weight, bias, shift = draw(8, dtype=BF16), draw(8), draw(2, 8, dtype=BF16)
    out = residual_norm(x, y, weight, bias, shift, backend=backend)
    truth = residual_norm(
        x.double(), y.double(), weight.double(), bias, shift.double(), backend="reference"
    )
    assert out.dtype == F32
    assert relative(out, truth) < 1e-6
    assert residual_norm(y, x, weight, bias, shift, backend=backend).dtype == BF16


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 64, 64, 100), (0, 3, 5, 7)])
def test_pointwise_is_a_convolution_of_size_one(size):
    batch, inside, outside, L = size
    inputs = draw(batch, inside, L), draw(outside, inside), draw(outside)

    def results(function: Callable) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    convolution = results(lambda x, w, b: torch.nn.functional.conv1d(x, w[..., None], b))
    for ours, truth in zip(results(pointwise), convolution, strict=True):
        torch.testing.assert_close(ours, truth)


x, w1, w2 = torch.ones(2, 4, 5), torch.ones(4), torch.ones(8, 4)
REFUSED = {
    "norm-y": lambda: residual_norm(x, x[..., :3], w1, w1),
    "norm-dimensions": lambda: residual_norm(x[0], x[0], w1, w1),
    "norm-weight": lambda: residual_norm(x, x, w1[:3], w1),
    "norm-bias": lambda: residual_norm(x, x, w1, w1[:, None]),
    "norm-shift": lambda: residual_norm(x, x, w1, w1, torch.ones(4)),
    "norm-complex": lambda: residual_norm(x, x * 1j, w1, w1),
    "norm-integer": lambda: residual_norm(x.int(), x.int(), w1, w1),
    "norm-float8": lambda: residual_norm(x.to(torch.float8_e5m2), x, w1, w1),
    "norm-device": lambda: residual_norm(x, x.to("meta"), w1, w1),
    "gate-odd": lambda: gate(x[:, :3]),
    "gate-dimensions": lambda: gate(x[0]),
    "skip-h": lambda: residual_skip(x[:, :2], x, x, w2, torch.ones(8)),
    "skip-skips": lambda: residual_skip(x, x, x[:1], w2, torch.ones(8)),
    "skip-weight": lambda: residual_skip(x, x, x, w2.T, torch.ones(8)),
    "skip-bias": lambda: residual_skip(x, x, x, w2, w1),
    "pointwise-weight": lambda: pointwise(x, torch.ones(4, 8), w1),
    "pointwise-bias": lambda: pointwise(x, w2, w1),
    "pointwise-kernel": lambda: pointwise(x, w2[..., None], torch.ones(8)),
    "backend": lambda: gate(x, "fortran"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_inputs_that_do_not_fit_are_refused_in_one_line(call):
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        call()
