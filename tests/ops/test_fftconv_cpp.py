"""The compiled convolution at every level of vector instructions, against the sum over samples."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from sssd_hpc.ops import native
from sssd_hpc.ops.fftconv import cpp, plain, reference

lengths = pytest.mark.parametrize("L", [1, 2, 3, 5, 16, 63, 64, 250, 1000, 1023])
features = pytest.mark.parametrize("H", [1, 3, 16, 17, 40])
activations = pytest.mark.parametrize("activation", ["gelu", "none"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


def draw(B: int, H: int, L: int) -> list[Tensor]:
    """Random u, k, D and a gradient of y; outputs of order one, where GELU bends."""
    u, dy = torch.randn(2, B, H, L, dtype=torch.float64)
    k = torch.randn(2, H, L, dtype=torch.float64) / L**0.5
    return [u, k, torch.randn(H, dtype=torch.float64), dy]


def run(u: Tensor, k: Tensor, D: Tensor, dy: Tensor, activation: str) -> tuple[Tensor, ...]:
    """Return y and the gradients of u, k and D."""
    K = cpp.prepare(k, D)
    y, pre = cpp.forward(u, K, activation, True)
    du, dK = cpp.backward(dy, u, K, pre, activation)
    return y, du, *cpp.prepare_backward(dK, *u.shape[1:])


@functools.cache
def case(B: int, H: int, L: int, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return arguments and what `run` should make of them, by the sum over samples."""
    arguments = draw(B, H, L)
    leaves = [leaf.clone().requires_grad_() for leaf in arguments[:3]]
    y = reference.run(*leaves, None if activation == "none" else activation)
    return arguments, [y.detach(), *torch.autograd.grad((y * arguments[3]).sum(), leaves)]


def inner(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


@lengths
@features
def test_output_and_gradients_equal_the_sums_over_samples(level, L, H):
    B = 1 if L > 500 else 3 - L % 2
    for activation in ("none",) if L == 1023 else ("gelu",) if L == 1000 else ("gelu", "none"):
        # Features are independent: the truth of 40 serves for fewer.
        arguments, truths = case(B, 40, L, activation)
        first = [(slice(None), slice(H))] * 2 + [slice(H)]
        u, k, D, dy = (
            a[i].contiguous() for a, i in zip(arguments, [*first, first[0]], strict=True)
        )
        truths = [t[i] for t, i in zip(truths, [first[0], *first], strict=True)]
        # One sum of a few hundred terms may be near zero by chance, two kernels are not.
        sizes = [true.norm() for true in (*truths[:3], truths[2])]
        for dtype, bound in BOUND.items():
            ours = run(*(a.to(dtype) for a in (u, k, D, dy)), activation)
            for name, mine, true, size in zip(
                ("y", "u", "k", "D"), ours, truths, sizes, strict=True
            ):
                assert mine.dtype == dtype
                error = (mine - true).norm()
                assert error <= (1 if name == "y" else 3) * bound * size, (name, dtype)
            assert not ours[2][1, :, -1].any(), "lag -L reaches no output"


@lengths
@pytest.mark.parametrize("H", [3, 17])
def test_every_linear_piece_has_its_adjoint(level, L, H):
    """Any K, not only spectra of kernels: its gradient must hold entry by entry."""
    u, k, D, dy = draw(2, H, L)
    K = torch.randn(cpp.spectrum_shape(H, L), dtype=torch.float64)
    empty = u.new_empty(0)
    dk, dD = cpp.prepare_backward(K, H, L)
    P = cpp.prepare(k, D)
    scale = float(K.norm() * P.norm())
    assert abs(inner(P, K) - inner(k, dk) - inner(D, dD)) < 1e-13 * scale
    y, _ = cpp.forward(u, K, "none", False)
    du, dK = cpp.backward(dy, u, K, empty, "none")
    scale = float(y.norm() * dy.norm())
    assert abs(inner(y, dy) - inner(u, du)) < 1e-13 * scale
    assert abs(inner(y, dy) - inner(K, dK)) < 1e-13 * scale


@pytest.mark.parametrize("L", [1, 4, 7, 20])
def test_the_gradient_of_each_entry_of_a_spectrum_is_its_effect(level, L):
    u, _, _, dy = draw(2, 1, L)
    K = torch.zeros(cpp.spectrum_shape(1, L), dtype=torch.float64)
    _, dK = cpp.backward(dy, u, K, u.new_empty(0), "none")
    effects = torch.zeros_like(K)
    for entry in range(K.numel()):
        K.view(-1)[entry] = 1.0
        effects.view(-1)[entry] = inner(cpp.forward(u, K, "none", False)[0], dy)
        K.view(-1)[entry] = 0.0
    torch.testing.assert_close(dK, effects, rtol=1e-12, atol=1e-12)


@dtypes
def test_the_number_of_threads_changes_no_bit(dtype):
    arguments = [a.to(dtype) for a in draw(3, 40, 250)]
    one = run(*arguments, "gelu")
    torch.set_num_threads(2)
    try:
        two = run(*arguments, "gelu")
    finally:
        torch.set_num_threads(1)
    again = run(*arguments, "gelu")
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, again, strict=True)
    )


@dtypes
@activations
def test_not_a_number_stays_within_its_row_and_feature(level, dtype, activation):
    arguments = [a.to(dtype) for a in draw(2, 19, 63)]
    clean = run(*arguments, activation)
    for value in (float("nan"), float("inf")):
        u = arguments[0].clone()
        u[1, 17, 5] = value
        y, du, dk, dD = run(u, *arguments[1:], activation)
        assert y[1, 17].isnan().any()
        for mine, before in ((y, clean[0]), (du, clean[1])):
            touched = ~torch.isclose(mine, before, rtol=0, atol=0).all(-1)
            assert touched.nonzero().tolist() in ([[1, 17]], [])
        assert not dk[:, 17, :-1].isfinite().any()
        others = torch.arange(19) != 17
        assert torch.equal(dk[:, others], clean[2][:, others])
        assert torch.equal(dD[others], clean[3][others])


@dtypes
def test_kernels_with_a_nan_spoil_only_their_feature(dtype):
    u, k, D, dy = (a.to(dtype) for a in draw(2, 19, 63))
    y = run(u, k, D, dy, "gelu")[0]
    k[1, 3, 7] = torch.nan
    spoiled = run(u, k, D, dy, "gelu")[0]
    others = torch.arange(19) != 3
    assert spoiled[:, 3].isnan().all()
    assert torch.equal(spoiled[:, others], y[:, others])


@activations
def test_inputs_of_any_size_keep_their_relative_error(level, activation):
    """1e30 is past the square root of the largest float32; 1e-30 below that of the smallest."""
    u, k, D, _ = draw(1, 16, 250)
    for size in (1e-30, 1e30):
        K = cpp.prepare(k.float(), D.float())
        y, _ = cpp.forward((u * size).float(), K, activation, False)
        true = reference.run(u * size, k, D, None if activation == "none" else activation)
        assert (y / size - true / size).norm() < 1e-6 * (true / size).norm()


def test_gelu_and_its_slope_follow_the_error_function_to_both_tails(level):
    x = torch.cat([torch.linspace(-14, 14, 9999), torch.tensor([0.0, 99.0, -99.0, 1e38, -1e38])])
    x, zero = x[None, :, None], torch.zeros(2, x.numel(), 1)
    # A kernel of one sample is the identity where the skip is one.
    K = cpp.prepare(zero, torch.ones(x.shape[1]))
    y, pre = cpp.forward(x, K, "gelu", True)
    assert torch.equal(pre, x)
    slope = cpp.backward(torch.ones_like(x), x, K, x, "gelu")[0]
    leaf = x.double().requires_grad_()
    true = leaf * 0.5 * torch.special.erfc(leaf * -(0.5**0.5))
    (true_slope,) = torch.autograd.grad(true.sum(), leaf)
    # Where x < 0 the textbook's 1 + erf would have no digits left.
    bound = torch.where(x < 0, 1e-5, 4e-7) * true.abs() + 1e-33
    assert ((y - true).abs() <= bound).all()
    assert ((slope - true_slope).abs() <= 5e-7).all()


def test_the_value_before_gelu_is_kept_only_when_asked_for():
    u, k, D, _ = draw(2, 3, 16)
    K = cpp.prepare(k, D)
    y, pre = cpp.forward(u, K, "gelu", True)
    torch.testing.assert_close(pre, cpp.forward(u, K, "none", True)[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.nn.functional.gelu(pre), y, rtol=1e-14, atol=1e-14)
    assert cpp.forward(u, K, "gelu", False)[1].shape == (0,)
    assert cpp.forward(u, K, "none", True)[1].shape == (0,)


@lengths
def test_a_spectrum_is_hardly_larger_than_half_the_circle(L):
    shape = cpp.spectrum_shape(40, L)
    assert cpp.prepare(torch.zeros(2, 40, L), torch.zeros(40)).shape == shape
    half = 48 * (plain.circle(L) // 2 + 1) * 2
    assert torch.Size(shape).numel() <= half + 48 * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda e, u, k, D, K: e.fftconv_forward(u, K[:, :-1], True, True),
        lambda e, u, k, D, K: e.fftconv_forward(u.double(), K, True, True),
        lambda e, u, k, D, K: e.fftconv_forward(u.bfloat16(), K, True, True),
        lambda e, u, k, D, K: e.fftconv_forward(u[0], K, True, True),
        lambda e, u, k, D, K: e.fftconv_forward(u[:0], K, True, True),
        lambda e, u, k, D, K: e.fftconv_forward(u.transpose(1, 2), K, True, True),
        lambda e, u, k, D, K: e.fftconv_backward(u, u, K, u[:1], True),
        lambda e, u, k, D, K: e.fftconv_backward(u[:1], u, K, u, True),
        lambda e, u, k, D, K: e.fftconv_prepare(k[:1], D),
        lambda e, u, k, D, K: e.fftconv_prepare(k, D[:2]),
        lambda e, u, k, D, K: e.fftconv_prepare_backward(K, 30, 16),
    ],
)
def test_the_door_refuses_what_would_read_past_a_tensor(call):
    u, k, D, _ = (a.float() for a in draw(2, 16, 16))
    K = cpp.prepare(k, D)
    with pytest.raises(RuntimeError, match="fftconv: "):
        call(native.load(), u, k, D, K)
