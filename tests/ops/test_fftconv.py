"""The two-sided convolution against the sum over pairs of samples."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends, bidirectional_conv, convolve, prepare
from sssd_hpc.ops.fftconv import op, plain
from sssd_hpc.ops.fftconv.plain import circle

lengths = pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 250])
activations = pytest.mark.parametrize("activation", ["gelu", None])


def draw(L: int, H: int = 3, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((batch, H, L), (2, H, L), (H,))]


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def widest(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes."""
    dtypes = getattr(backends.module("fftconv", backend), "DTYPES", backends.WIDE)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def test_an_impulse_reads_out_both_kernels_and_the_skip(backend):
    u = torch.zeros(1, 1, 5)
    u[..., 2] = 1.0
    k = torch.tensor([[[1.0, 2, 3, 4, 5]], [[10.0, 20, 30, 40, 50]]])
    # Backward lags -2, -1; then lag 0 with the skip; then forward lags 1, 2.
    truth = torch.tensor([[[20.0, 10, 101, 2, 3]]])
    for name in (backend, "reference"):
        y = bidirectional_conv(u, k, torch.tensor([100.0]), None, name)
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-4)


@lengths
@activations
def test_the_output_and_every_gradient_equal_the_sums_over_samples(backend, L, activation):
    leaves, dtype = draw(L), widest(backend)
    weight = torch.randn_like(leaves[0])
    bound = 1e-12 if dtype == torch.float64 else 1e-6

    def both(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        copies = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
        y = bidirectional_conv(*copies, activation, name)
        return [y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), copies)]

    y, *gradients = both(backend, dtype)
    true_y, *truths = both("reference", torch.float64)
    assert y.dtype == dtype
    assert relative(y, true_y) < bound
    for name, ours, truth in zip("ukD", gradients, truths, strict=True):
        assert (ours.double() - truth).norm() <= 3 * bound * truth.norm(), name
    assert not gradients[1][1, :, -1].any(), "lag -L reaches no output"


@pytest.mark.parametrize(("batch", "H"), [(1, 1), (3, 17), (5, 2)])
def test_any_batch_and_number_of_features_is_served(backend, batch, H):
    arguments = [a.float() for a in draw(40, H, batch)]
    truth = bidirectional_conv(*(a.double() for a in arguments), "gelu", "reference")
    assert relative(bidirectional_conv(*arguments, "gelu", backend), truth) < 1e-6


@lengths
def test_float32_errs_by_less_than_a_millionth(backend, L):
    arguments = draw(L)
    truth = bidirectional_conv(*arguments, None, "reference")
    ours = bidirectional_conv(*(a.float() for a in arguments), None, backend)
    assert ours.dtype == torch.float32
    assert relative(ours, truth) < 1e-6


@activations
def test_gradcheck(backend, activation):
    if widest(backend) != torch.float64:
        with pytest.raises(UserError, match=r"not torch.float64"):
            bidirectional_conv(*draw(4), activation, backend)
        return
    leaves = [leaf.requires_grad_() for leaf in draw(4, H=2)]
    assert torch.autograd.gradcheck(
        lambda u, k, D: bidirectional_conv(u, k, D, activation, backend), leaves
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_but_not_computed_in(dtype):
    u, k, D = (a.float() for a in draw(50))
    u = u.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = bidirectional_conv(u, k, D, backend="torch")
    assert y.dtype == dtype
    assert torch.equal(y, bidirectional_conv(u.float(), k, D, backend="torch").to(dtype))


def test_strided_input_gives_the_same_output(backend):
    u, k, D = (a.float() for a in draw(20))
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        bidirectional_conv(strided, k.flip(0).flip(0), D, "gelu", backend),
        bidirectional_conv(u, k, D, "gelu", backend),
    )


def test_the_same_call_gives_the_same_bits(backend):
    leaves = [a.float() for a in draw(70, H=5, batch=3)]

    def run() -> list[torch.Tensor]:
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        y = bidirectional_conv(*copies, "gelu", backend)
        return [y, *torch.autograd.grad(y.square().sum(), copies)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_a_spectrum_made_once_serves_every_input(backend):
    u, k, D = (a.float() for a in draw(30))
    spectrum = prepare(k, D, backend)
    truth = bidirectional_conv(u, k, D, "gelu", backend)
    assert torch.equal(convolve(u, spectrum), truth)
    with pytest.raises(UserError, match="3 features of 30 samples"):
        convolve(u[..., :29], spectrum)


def test_an_empty_batch_gives_an_empty_output_and_no_gradient(backend):
    u, k, D = (a.float().requires_grad_() for a in draw(9, batch=0))
    y = bidirectional_conv(u, k, D, "gelu", backend)
    assert y.shape == (0, 3, 9)
    du, dk, dD = torch.autograd.grad(y.sum(), (u, k, D))
    assert du.shape == u.shape
    assert not dk.any()
    assert not dD.any()


def test_a_sample_that_is_not_finite_spoils_its_own_row_alone(backend):
    u, k, D = (a.float() for a in draw(20, H=5, batch=4))
    clean = bidirectional_conv(u, k, D, "gelu", backend)
    u[2, 3, 7] = float("nan")
    spoiled = bidirectional_conv(u, k, D, "gelu", backend)
    assert spoiled[2, 3].isnan().all()
    rest = torch.ones(4, 5, dtype=torch.bool)
    rest[2, 3] = False
    if backend == "triton":
        # Rows of a pair share one complex transform.
        rest[3, 3] = False
    torch.testing.assert_close(spoiled[rest], clean[rest])


@activations
def test_the_registered_ops_pass_opcheck(opcheck, backend, activation):
    u, k, D = (a.float().requires_grad_() for a in draw(20))
    ops = torch.ops.sssd_hpc
    K = ops.conv_spectrum(k, D, backend).detach()
    opcheck(ops.conv_spectrum, (k, D, backend))
    opcheck(ops.conv_spectrum_backward, (torch.randn_like(K), 3, 20, backend))
    kind = activation or "none"
    opcheck(ops.convolve, (u, K.clone().requires_grad_(), kind, True, backend))
    y, pre = ops.convolve(u.detach(), K, kind, True, backend)
    opcheck(ops.convolve_backward, (torch.randn_like(y), u.detach(), K, pre, kind, backend))


def test_the_circle_is_long_enough_and_easy_to_transform():
    for L in (1, 2, 37, 1000, 1023):
        n = circle(L)
        assert 2 * L - 1 <= n <= 2.2 * L + 8
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1


def fitting() -> list[torch.Tensor]:
    return [torch.zeros(1, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3)]


@pytest.mark.parametrize(
    ("index", "replacement", "words"),
    [
        (0, torch.zeros(3, 4), "not fit"),
        (0, torch.zeros(1, 3, 0), "not fit"),
        (0, torch.zeros(1, 0, 4), "not fit"),
        (0, torch.zeros(1, 3, 4, dtype=torch.int64), "torch.int64"),
        (0, torch.zeros(1, 3, 4, dtype=torch.complex64), "torch.complex64"),
        (1, torch.zeros(1, 3, 4), "not fit"),
        (1, torch.zeros(2, 3, 4, dtype=torch.int64), "k is torch.int64"),
        (1, torch.zeros(2, 3, 4, dtype=torch.complex64), "k is torch.complex64"),
        (1, torch.zeros(2, 3, 4, device="meta"), "k is on meta"),
        (2, torch.zeros(1), "D torch.float32 .1,."),
        (2, torch.zeros(3, device="meta"), "D on meta"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(index, replacement, words):
    arguments = fitting()
    arguments[index] = replacement
    with pytest.raises(UserError, match=words) as refusal:
        bidirectional_conv(*arguments)
    assert "\n" not in str(refusal.value)
    if index > 0:
        with pytest.raises(UserError, match="prepare: "):
            prepare(*arguments[1:])


def test_a_spectrum_is_refused_for_other_signals():
    spectrum = prepare(torch.zeros(2, 3, 4), torch.zeros(3))
    for u in (torch.zeros(1, 1, 4), torch.zeros(1, 3, 5), torch.zeros(1, 3, 4, device="meta")):
        with pytest.raises(UserError, match="for 3 features of 4 samples on cpu"):
            convolve(u, spectrum)
    with pytest.raises(UserError, match=r"k is torch.float64 and D torch.float32"):
        prepare(torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(3))


def test_a_length_that_a_backend_does_not_reach_is_left_to_another(monkeypatch):
    monkeypatch.setattr(plain, "LONGEST", 8, raising=False)
    monkeypatch.setattr(backends, "AUTO_ORDER", {"cpu": ("torch", "cpp")})
    backends._automatic.cache_clear()
    monkeypatch.setattr(backends, "unless_wished", lambda op, backend: "cpp")
    try:
        assert op.resolve("auto", "cpu", torch.float32, 8) == "torch"
        assert op.resolve("auto", "cpu", torch.float32, 9) == "cpp"
        assert op.resolve("torch", "cpu", torch.float32, 9) == "torch"
    finally:
        backends._automatic.cache_clear()


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="'relu'"):
        bidirectional_conv(*draw(4), "relu")
